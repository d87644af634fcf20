"""From evidence to a calibrated confidence: one model per answer and set of tiers called so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..evaluate.table import TaskTable
from ..evidence import SMALLEST
from ..logistic import cross_entropy, log_odds, logistic_regression, probability
from ..policy import DIFFICULTY, Confidence, Term

__all__ = ["Calibrated", "believe", "calibrate", "confidences"]
FOLDS = 5
MIN_ROWS = 30
"""Below this a confidence is one kind of evidence as it is."""
PLACES = 64
TILT = 0.02
MIN_GAIN = 0.002
"""Nats by which a calibration map must lower the held-out log loss of the plain logistic curve to be used."""
PENALTY = 1.0
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A confidence fitted on all rows, and what models that did not see a row say of it.

    Attributes:
        fitted: (n,) the confidence itself; NaN where evidence is missing.
        held_out: (n,) the cross-fitted one.
        log_loss: held-out, in nats.
        method: "logistic", "isotonic", "venn-abers", or "as it is".
    """

    confidence: Confidence
    fitted: NDArray[np.float64]
    held_out: NDArray[np.float64]
    log_loss: float
    method: str


def confidences(table: TaskTable, confidence: Confidence) -> NDArray[np.float64]:
    """(n,) a confidence on every row, as the flow computes it; NaN where evidence is missing."""
    total = np.full(len(table), confidence.intercept)
    for term in confidence.terms:
        total += term.weight * _term(table, term)
    return _on_curve(total, confidence.knots)


def calibrate(
    table: TaskTable,
    tier: str,
    called: tuple[str, ...],
    target: NDArray[np.float64],
    folds: NDArray[np.intp],
    *,
    predicted: bool = False,
) -> Calibrated | None:
    """The confidence in the answer of `tier` once the tiers `called` have answered.

    Evidence of the answer itself and its agreement with the others, weighted by how sure these are, enter a logistic
    regression with a ridge penalty; isotonic regression or Venn-Abers calibration (Vovk, Petej and Fedorova 2015) of
    its log-odds replaces the logistic curve where that lowers the held-out log loss.

    Args:
        called: names of all tiers with an answer, `tier` among them; the others' agreement with it is evidence.
        target: (n,) in [0, 1], NaN where unknown.
        folds: (n,) number of the fold in which a row is held out.
        predicted: whether what a router predicted of the tier and of the frontier is evidence too.

    Returns:
        None if there is no evidence, or none that tells good answers from bad ones.
    """
    terms = _terms(table, tier, called) + (_beforehand(table, tier, folds) if predicted else [])
    found = _fitted(table, terms, tier, target, folds)
    return _as_it_is(table, terms, target) if found is None else found


def believe(
    table: TaskTable, tier: str, called: tuple[str, ...], target: NDArray[np.float64], folds: NDArray[np.intp]
) -> Calibrated | None:
    """The belief in the answer of `tier` before it is called, once the tiers `called` have answered.

    As `calibrate`, of what a router predicted of the tier and of the frontier, of the evidence of the answers there are
    and of their agreement with each other.

    Returns:
        None if nothing is known of it, or too little.
    """
    terms = _beforehand(table, tier, folds)
    terms += [Term(1.0, other, kind) for other in called for kind in table.kinds(other)]
    terms += [Term(1.0, one, None, two) for one, two in table.agreement if one in called and two in called]
    return _fitted(table, terms, tier, target, folds)


def _beforehand(table: TaskTable, tier: str, folds: NDArray[np.intp]) -> list[Term]:
    """What was predicted of the tier and of the frontier, where it tells rows of one fold apart.

    Routers of different folds have seen different rows. If that is most of what varies, it varies against the outcomes
    of the fold that was held out, and not at all when one router serves.
    """
    return [
        Term(1.0, name, DIFFICULTY)
        for name in (tier, table.tiers[-1])
        if name in table.difficulty and _within_folds(log_odds(table.difficulty[name], SMALLEST), folds)
    ]


def _within_folds(values: NDArray[np.float64], folds: NDArray[np.intp]) -> bool:
    known = np.isfinite(values)
    parts = [values[known & (folds == number)] for number in np.unique(folds)]
    parts = [part for part in parts if len(part)]
    if not parts:
        return False
    between = float(np.std([part.mean() for part in parts]))
    within = float(np.sqrt(np.concatenate([(part - part.mean()) ** 2 for part in parts]).mean()))
    return within > max(2 * between, ROUNDING)


def _fitted(
    table: TaskTable, terms: list[Term], tier: str, target: NDArray[np.float64], folds: NDArray[np.intp]
) -> Calibrated | None:
    """None where there is nothing to learn from, or too little."""
    if not terms:
        return None
    features = np.column_stack([_term(table, term) for term in terms])
    known: NDArray[np.bool_] = np.asarray(np.isfinite(features).all(axis=1))
    usable = known & np.isfinite(target)
    if usable.sum() < MIN_ROWS or np.ptp(target[usable]) == 0:
        return None
    x, y, fold = features[usable], target[usable], folds[usable]
    total = np.full(len(table), np.nan)
    for number in np.unique(folds):
        seen, held_out = fold != number, known & (folds == number)
        if not seen.any() or np.ptp(y[seen]) == 0:
            return None
        weights, intercept = _logistic(x[seen], y[seen])
        total[held_out] = features[held_out] @ weights + intercept
    weights, intercept = _logistic(x, y)
    plain = Confidence(
        tier,
        tuple(replace(term, weight=float(weight)) for term, weight in zip(terms, weights, strict=True)),
        float(intercept),
    )
    return _on_best_curve(plain, features @ weights + intercept, total, usable, target, folds)


def _terms(table: TaskTable, tier: str, called: tuple[str, ...]) -> list[Term]:
    terms = [Term(1.0, tier, kind) for kind in table.kinds(tier)]
    for other in called:
        pair = (tier, other) if table.tiers.index(tier) < table.tiers.index(other) else (other, tier)
        if other == tier or pair not in table.agreement:
            continue
        terms.append(Term(1.0, tier, None, other))
        terms += [Term(1.0, other, kind, tier) for kind in table.kinds(other)[:1]]
    return terms


def _term(table: TaskTable, term: Term) -> NDArray[np.float64]:
    """(n,) the factors of a term, without its weight.

    Raises:
        DataError: the table does not hold this evidence.
    """
    value = np.ones(len(table))
    if term.kind is not None:
        key = (term.tier, term.kind)
        known = table.difficulty.get(term.tier) if term.kind == DIFFICULTY else table.evidence.get(key)
        if known is None:
            raise DataError(f"task {table.task!r}: {term.tier} is judged by its {term.kind}, which the table has not")
        value = log_odds(known, SMALLEST)
    if term.other is not None:
        pair = (term.tier, term.other)
        agreed = table.agreement.get(pair, table.agreement.get(pair[::-1]))
        if agreed is None:
            raise DataError(f"task {table.task!r}: no answers of {' and '.join(pair)} can be compared in the table")
        value = value * (2 * agreed - 1)
    return value


def _logistic(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    scale = x.std(axis=0)
    # rounding is no variation
    scale[scale <= ROUNDING * (1 + np.abs(x).max(axis=0))] = 1.0
    weights, intercept = logistic_regression(x / scale, y, penalty=PENALTY, solver="newton-cholesky")
    return weights / scale, intercept


def _as_it_is(table: TaskTable, terms: list[Term], target: NDArray[np.float64]) -> Calibrated | None:
    """Too little to learn from: the mean log-odds of the answer's own evidence, if there is any."""
    own = [term for term in terms if term.other is None and term.kind != DIFFICULTY]
    if not own:
        return None
    confidence = Confidence(own[0].tier, tuple(replace(term, weight=1 / len(own)) for term in own))
    values = confidences(table, confidence)
    if not np.isfinite(values).any():
        return None
    usable = np.isfinite(values) & np.isfinite(target)
    return Calibrated(confidence, values, values, _log_loss(values[usable], target[usable]), "as it is")


Curve = Callable[[NDArray[np.float64], NDArray[np.float64]], tuple[tuple[float, float], ...]]


def _isotonic(total: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    from sklearn.isotonic import IsotonicRegression

    # one bad and one good answer beyond the ends keep the table away from 0 and 1
    ends = np.array([total.min() - 1e-6, total.max() + 1e-6])
    model = IsotonicRegression(y_min=0, y_max=1).fit(np.concatenate([total, ends]), np.concatenate([target, [0, 1]]))
    return _knots(model.X_thresholds_, model.y_thresholds_)


def _venn_abers(total: NDArray[np.float64], target: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Inductive Venn-Abers at `PLACES` quantiles: p1 / (1 - p0 + p1) of isotonic fits with a bad or good row added."""
    from scipy.optimize import isotonic_regression

    order = np.argsort(total, kind="stable")
    total, target = total[order], target[order]
    places = np.unique(np.quantile(total, np.linspace(0, 1, PLACES)))
    values = []
    for place in places:
        at = int(np.searchsorted(total, place))
        p0, p1 = (isotonic_regression(np.insert(target, at, added)).x[at] for added in (0.0, 1.0))
        values.append(p1 / (1 - p0 + p1))
    return _knots(places, np.maximum.accumulate(values))


def _knots(places: NDArray[np.float64], values: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Strictly rising places, and values tilted a little by the logistic curve: a plateau has an order within it too,
    and a threshold can cut it there."""
    places, first = np.unique(places, return_index=True)
    values = (1 - TILT) * values[first] + TILT * _on_curve(places, ())
    return tuple((float(place), float(value)) for place, value in zip(places, values, strict=True))


CURVES: dict[str, Curve] = {"isotonic": _isotonic, "venn-abers": _venn_abers}
HOPELESS = 0.005
"""Nats by which isotonic regression may be worse than the logistic curve for its smoother kin to be tried."""


def _on_best_curve(
    plain: Confidence,
    fitted: NDArray[np.float64],
    total: NDArray[np.float64],
    usable: NDArray[np.bool_],
    target: NDArray[np.float64],
    folds: NDArray[np.intp],
) -> Calibrated:
    held_out = _on_curve(total, ())
    best = Calibrated(plain, _on_curve(fitted, ()), held_out, _log_loss(held_out[usable], target[usable]), "logistic")
    least = best.log_loss - MIN_GAIN
    for method, curve in CURVES.items():
        values = np.full(len(total), np.nan)
        for number in np.unique(folds):
            seen, rest = usable & (folds != number), folds == number
            values[rest] = _on_curve(total[rest], curve(total[seen], target[seen]))
        loss = _log_loss(values[usable], target[usable])
        if method == "isotonic" and loss > best.log_loss + HOPELESS:
            break
        if loss < least:
            least = loss
            knots = curve(total[usable], target[usable])
            best = Calibrated(replace(plain, knots=knots), _on_curve(fitted, knots), values, loss, method)
    return best


def _log_loss(confidence: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    return float(np.mean(cross_entropy(confidence, target, SMALLEST))) if len(target) else 0.0


def _on_curve(total: NDArray[np.float64], knots: tuple[tuple[float, float], ...]) -> NDArray[np.float64]:
    if not knots:
        return probability(total)
    places, values = np.array(knots).T
    return np.where(np.isnan(total), np.nan, np.interp(total, places, values))
