"""Exact binomial tests and the order in which they are made: pure functions of counts and arrays."""

from __future__ import annotations

from math import ceil, log, log1p

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, binom

__all__ = ["binomial_p_value", "binomial_upper_bound", "fixed_sequence", "labels_needed", "smallest_sample"]


def binomial_p_value(violations: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """p-value of "the risk exceeds alpha": P(Binomial(n, alpha) <= violations), exact (Clopper and Pearson 1934).

    Args:
        violations: (...) counts out of n independent rows.

    Returns:
        (...) p-values, super-uniform whenever the true risk is above alpha.
    """
    return np.asarray(binom.cdf(np.asarray(violations), n, alpha), dtype=np.float64)


def binomial_upper_bound(violations: int, n: int, delta: float) -> float:
    """Upper confidence bound of a risk at level 1 - delta (Clopper and Pearson 1934); 1 without data."""
    if violations >= n:
        return 1.0
    return float(beta.ppf(1 - delta, violations + 1, n - violations))


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many hypotheses are rejected when they are tested in order, each at level delta, until one is not.

    The order must not depend on the data of the p-values. The chance of any false rejection is at most delta
    (Maurer, Hothorn and Lehmacher 1995; for risk control: Angelopoulos et al., Learn then Test, 2021).

    >>> fixed_sequence([0.01, 0.02, 0.5, 0.01], delta=0.1)
    2
    """
    passed = np.asarray(p_values) <= delta
    return int(np.argmin(passed)) if not passed.all() else int(passed.size)


def smallest_sample(alpha: float, delta: float) -> int:
    """The fewest rows with which a risk of alpha can be excluded at level delta: all of them without violation.

    >>> smallest_sample(alpha=0.05, delta=0.1)
    45
    """
    return ceil(log(delta) / log1p(-alpha))


def labels_needed(risk: float, alpha: float, delta: float, power: float = 0.8) -> int | None:
    """The fewest rows with which a policy of this true risk passes with probability `power`; None if it fails itself.

    The power of an exact test is a saw-tooth in n; the answer is the first n of a doubling and halving search, so
    it is exact up to one tooth.

    >>> labels_needed(risk=0.02, alpha=0.05, delta=0.1)
    209
    """
    if risk >= alpha:
        return None

    def passes(n: int) -> bool:
        # the largest count that is still rejected at level delta
        critical = int(binom.ppf(delta, n, alpha))
        if binom.cdf(critical, n, alpha) > delta:
            critical -= 1
        return critical >= 0 and float(binom.cdf(critical, n, risk)) >= power

    low, high = 0, smallest_sample(alpha, delta)
    while not passes(high):
        low, high = high, 2 * high
        if high > 10**8:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high
