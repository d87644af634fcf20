"""Tests of "the risk is too large" with finite-sample validity, and the order in which they are made.

Pure functions of counts and arrays. A p-value p is valid if P(p <= u) <= u for every u whenever the risk really is
too large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, exp, log, log1p, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import beta, binom

from ..errors import DataError

__all__ = [
    "betting_p_value",
    "binomial_p_value",
    "binomial_upper_bound",
    "conformal_risk_control",
    "empirical_bernstein_p_value",
    "fallback",
    "fixed_sequence",
    "hoeffding_bentkus_p_value",
    "hoeffding_p_value",
    "holm",
    "labels_needed",
    "labels_needed_for_mean",
    "monotonized",
    "smallest_sample",
]


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


def hoeffding_p_value(mean: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """p-value of "the expectation exceeds alpha" for n losses in [0, 1] (Hoeffding 1963, equation 2.1).

    Args:
        mean: (...) empirical means.
    """
    mean = np.asarray(mean, dtype=np.float64)
    below = np.minimum(mean, alpha)
    with np.errstate(divide="ignore", invalid="ignore"):
        first = np.where(below > 0, below * np.log(below / alpha), 0.0)
        second = np.where(below < 1, (1 - below) * np.log((1 - below) / (1 - alpha)), 0.0)
    return np.asarray(np.exp(-n * (first + second)))


def hoeffding_bentkus_p_value(mean: ArrayLike, n: int, alpha: float) -> NDArray[np.float64]:
    """p-value of "the expectation exceeds alpha" for n losses in [0, 1] (Bates et al. 2021, Hoeffding-Bentkus).

    Args:
        mean: (...) empirical means.
    """
    mean = np.asarray(mean, dtype=np.float64)
    bentkus = exp(1) * binom.cdf(np.ceil(n * mean - 1e-9), n, alpha)
    return np.asarray(np.minimum(np.minimum(hoeffding_p_value(mean, n, alpha), bentkus), 1.0))


def empirical_bernstein_p_value(losses: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """p-value of "the expectation exceeds alpha" for losses in [0, 1] (Maurer and Pontil 2009, theorem 4, inverted).

    Args:
        losses: (n, ...) independent rows, n >= 2.
    """
    losses = np.asarray(losses, dtype=np.float64)
    n = len(losses)
    room = np.maximum(alpha - losses.mean(axis=0), 0.0)
    variance = losses.var(axis=0, ddof=1)
    # room = sqrt(2 variance x / n) + 7 x / (3 (n - 1)), solved for sqrt(x), x = log(2 / p)
    linear, square = np.sqrt(2 * variance / n), 7 / (3 * (n - 1))
    root = (-linear + np.sqrt(linear**2 + 4 * square * room)) / (2 * square)
    return np.asarray(np.minimum(2 * np.exp(-(root**2)), 1.0))


MOST_ROWS = 1e15
"""Beyond it, counts of rows are no numbers any more."""
LARGEST_STAKE = 0.75
PRIOR_ROWS = 50


def betting_p_value(
    excess: ArrayLike, largest: ArrayLike, delta: float, second_moment: ArrayLike | None = None
) -> NDArray[np.float64]:
    """p-value of "the expected excess is at least 0", by bets that it is below.

    Wealth starts at 1; a row with excess x multiplies it by 1 - stake * x, where the stake depends on earlier rows
    only. If the expected excess is at least 0, wealth is a nonnegative supermartingale, and the chance that it ever
    reaches 1 / p is at most p (Ville 1939; Waudby-Smith and Ramdas 2024, section 4). Any stakes are valid. These have a
    deadline, the last row: at each row they are what would replicate, by Gaussian prices, a claim that pays
    1 / delta if the sum of the rows that are left is low enough for its price to be today's wealth (the betting
    proof of the central limit theorem: Shafer and Vovk 2001, chapter 6). So at level delta the test is nearly as
    powerful as the asymptotic one.

    Args:
        excess: (n, ...) independent rows in a random order, each at most `largest`; columns are different policies.
        largest: (...) bound of the excess, above 0.
        delta: level at which the test should be powerful; it is valid at any.
        second_moment: (...) guess of E[excess ** 2] from other rows; None starts from that of a fair coin.

    Returns:
        (...) one over the largest wealth reached.
    """
    x = np.asarray(excess, dtype=np.float64)
    n, bound = len(x), np.broadcast_to(np.asarray(largest, dtype=np.float64), x.shape[1:])
    if n and (x > bound + 1e-9).any():
        raise DataError(f"excess: at most {bound.max():g} was promised, got {x.max():g}")
    guess = bound**2 / 4 if second_moment is None else np.asarray(second_moment, dtype=np.float64)
    squares = PRIOR_ROWS * np.broadcast_to(np.maximum(guess, 1e-12), x.shape[1:])
    wealth = np.ones(x.shape[1:])
    highest = wealth
    for row, values in enumerate(x):
        price = np.clip(delta * wealth, 1e-300, 1.0)
        quantile = ndtri(np.minimum(price, 0.5 + 0.5 * (price < 1)))
        deviation = np.sqrt(squares / (PRIOR_ROWS + row) * (n - row))
        density = np.exp(-(quantile**2) / 2) / sqrt(2 * np.pi)
        stake = np.where(price < 1, np.minimum(density / (price * deviation), LARGEST_STAKE / bound), 0.0)
        wealth = wealth * (1 - stake * values)
        highest = np.maximum(highest, wealth)
        squares = squares + values**2
    return np.asarray(1 / highest)


def holm(p_values: ArrayLike, delta: float) -> NDArray[np.bool_]:
    """(m,) which hypotheses Holm's step-down procedure rejects at level delta (Holm 1979), in any order."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    passed = p[order] <= delta / np.arange(len(p), 0, -1)
    rejected = np.zeros(len(p), dtype=np.bool_)
    rejected[order[: int(np.argmin(passed)) if not passed.all() else len(p)]] = True
    return rejected


def fixed_sequence(p_values: ArrayLike, delta: float) -> int:
    """How many hypotheses are rejected when they are tested in order, each at level delta, until one is not.

    The order must not depend on the data of the p-values. The chance of any false rejection is at most delta
    (Maurer, Hothorn and Lehmacher 1995; for risk control: Angelopoulos et al., Learn then Test, 2021).

    >>> fixed_sequence([0.01, 0.02, 0.5, 0.01], delta=0.1)
    2
    """
    passed = np.asarray(p_values) <= delta
    return int(np.argmin(passed)) if not passed.all() else int(passed.size)


def fallback(paths: Sequence[Callable[[float], tuple[int, int]]], shares: Sequence[float], delta: float) -> list[int]:
    """Several fixed sequences, each with its share of delta; one that is rejected to its end hands its level on.

    The chance of any false rejection is at most delta (fallback procedure: Wiens and Dmitrienko 2005).

    Args:
        paths: each takes a level and returns how many of its hypotheses are rejected at it, and how many it has.
        shares: of delta, adding up to at most 1.

    Returns:
        How many hypotheses of each path are rejected.
    """
    if sum(shares) > 1 + 1e-9 or len(shares) != len(paths):
        raise DataError(f"shares: one a path, adding up to at most 1, got {list(shares)!r} for {len(paths)} paths")
    rejected, spare = [], 0.0
    for path, share in zip(paths, shares, strict=True):
        level = spare + share * delta
        passed, length = path(level)
        rejected.append(passed)
        spare = level if passed == length else 0.0
    return rejected


def monotonized(losses: ArrayLike) -> NDArray[np.float64]:
    """(n, m) the largest loss of each row up to each policy, from the safest on: the least monotone loss above it."""
    return np.maximum.accumulate(np.asarray(losses, dtype=np.float64), axis=1)


def conformal_risk_control(losses: ArrayLike, alpha: float, largest: float = 1.0) -> int | None:
    """Index of the last policy whose expected loss on a fresh row is at most alpha, or None.

    ``n / (n + 1) * mean + largest / (n + 1) <= alpha`` (Angelopoulos, Bates, Fisch, Lei and Schuster 2024, theorem 1).
    It holds on average over calibration samples, not with a probability for the one at hand.

    Args:
        losses: (n, m) of n exchangeable rows under m policies, not falling from one policy to the next in any row.
        largest: bound of the loss.

    Raises:
        DataError: a loss falls along a row: the guarantee does not hold then; see `monotonized`.
    """
    losses = np.asarray(losses, dtype=np.float64)
    falls = np.argwhere(np.diff(losses, axis=1) < 0)
    if len(falls):
        row, place = falls[0]
        raise DataError(
            f"loss falls from {losses[row, place]:g} to {losses[row, place + 1]:g} between policies {place} and "
            f"{place + 1} in row {row}: conformal risk control needs losses that never fall; pass monotonized(losses)"
        )
    n = len(losses)
    controlled = (losses.sum(axis=0) + largest) / (n + 1) <= alpha
    return int(controlled.sum()) - 1 if controlled.any() else None


def smallest_sample(alpha: float, delta: float) -> int:
    """The fewest rows with which a risk of alpha can be excluded at level delta: all of them without violation.

    >>> smallest_sample(alpha=0.05, delta=0.1)
    45
    """
    return ceil(min(log(delta) / log1p(-alpha), MOST_ROWS))


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


def labels_needed_for_mean(mean: float, second_moment: float, delta: float, power: float = 0.8) -> int | None:
    """About how many rows `betting_p_value` needs to pass with probability `power`; None if the mean itself fails.

    The sample size of a one-sided Gaussian test, and a tenth more for what bets lose against it.

    Args:
        mean, second_moment: of the excess.
    """
    if mean >= 0:
        return None
    variance = max(second_moment - mean**2, 0.0)
    return ceil(1.1 * variance * ((ndtri(1 - delta) + ndtri(power)) / mean) ** 2) + 1
