"""From what is said of answers to labels, and to what is known of their errors.

Audits are the truth, of a few. On a share of them it is learned what the other signals say of it: a source that does
not tell good answers from bad ones better than chance is left out, the others are weighed by their log-likelihood
ratios (naive Bayes; that nothing was said is told too). What comes out is a label of any answer, not its quality. On
the others it is measured how large the label is where answers are good and where they are bad. With these bounds a
promise about the truth can be certified on labels (`routenlp_plugins.cascade.noise`), and they hold however wrong the
weighing was. Or the labels find policies, and those other audits certify them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, isnan, log
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from ..cascade.bounds import betting_p_value
from ..cascade.noise import Noise
from ..errors import DataError
from ..evaluate.units import unit_interval
from .opinions import Judged, Opinion
from .signal import Signal

__all__ = ["LabelModel", "SourceReport", "Weighing"]

CHANCE = 0.05
"""Level at which a source has to be better than chance, shared by all sources."""
LEVELS = 5
"""As many as there are stars; what is finer is rounded."""
PLACES = 400
Name = tuple[str, str]


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What a source is worth, on the audited answers that labels are learned from.

    Attributes:
        on_good, on_bad: its mean value where audits call an answer good, and where they do not; NaN without any.
        answers: audited ones that it spoke of, good and bad.
        p_value: of "no better than chance" (Mann and Whitney 1947, one-sided).
        used: whether it is part of the label.
    """

    kind: str
    source: str
    on_good: float
    on_bad: float
    answers: tuple[int, int]
    p_value: float
    used: bool


@dataclass(frozen=True, slots=True)
class Weighing:
    """Naive Bayes.

    Attributes:
        prior: log-odds of a good answer.
        weights: source -> log-likelihood ratio of each level of its values; the last one of silence.
    """

    prior: float
    weights: Mapping[Name, tuple[float, ...]]

    def label(self, said: Mapping[Name, float]) -> float:
        """In [0, 1]."""
        total = self.prior + sum(ratios[_level(said.get(name))] for name, ratios in self.weights.items())
        return 1 / (1 + exp(-min(max(total, -30.0), 30.0)))


@dataclass(frozen=True, slots=True)
class LabelModel:
    """Labels answers by what was said of them.

    Two uses. Labels certify: ``store.outcomes(model, unaudited=True)`` are outcomes of what was not audited, and
    ``FitOptions(noise=model.noise)`` tells `fit` what they are. Or labels find policies and audits certify them:
    ``store.outcomes(model)`` are hints, with ``FitOptions(hints=..., noise=model.expected)``, and
    ``store.outcomes(labelled=True, without=model.learned_from)`` the outcomes, of which the labels know nothing.

    Of an answer that was not returned it is told whether it says the same as the one that was; if so, what was said of
    that one is said of it. Where none of those was audited, the label is that of the returned answer if both are the
    same, and unknown if not, which counts as the worst.

    Attributes:
        sources: what each source is worth.
        returned, same, others: how what is said of answers is weighed, of those that were returned, of those that say
            the same, and of all others; None where none of them was audited.
        noise: bounds of the label where answers are good and where they are bad, for every tier that was audited.
        audited: answers that the bounds rest on, good and bad.
        expected: mean labels of what they were learned from, for hints, which promise nothing.
        learned_from: units that the weights were learned from.
    """

    sources: tuple[SourceReport, ...]
    returned: Weighing | None
    same: Weighing | None
    others: Weighing | None
    noise: Noise
    audited: tuple[int, int]
    expected: Noise
    learned_from: frozenset[str] = frozenset()

    @classmethod
    def learn(
        cls,
        judged: Iterable[Judged],
        tau: float = 1.0,
        delta: float = 0.05,
        seed: int = 0,
        smallest_propensity: float | None = None,
        frontier: str | None = None,
        share: float = 0.25,
    ) -> LabelModel:
        """Learn from audited answers: ``LabelModel.learn(store.judged())``.

        Args:
            tau: quality from which an answer is good.
            delta: chance that a bound of the noise does not hold.
            seed: of which units are learned from.
            smallest_propensity: that the design of the audits gives to any query, where it does not give all the same.
            frontier: whose answers do not count for the bounds where others were audited: a promise is about those.
                That labels are no harsher on its answers than on others of the same quality is taken for granted.
            share: of the audited units, that are learned from; bounds rest on the others.

        Raises:
            DataError: propensities differ and no smallest is given, there are no good or no bad answers, no source is
                better than chance, or too few are audited for bounds that tell anything.
        """
        if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
            raise DataError(f"delta must be strictly between 0 and 1, got {delta!r}")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise DataError(f"share must be strictly between 0 and 1, got {share!r}")
        known = list(judged)
        silent = next((one for one in known if one.weight is None), None)
        if silent is not None:
            raise DataError(
                f"labels: trace {silent.trace_id or silent.unit} was audited, and nobody told with what probability; "
                "let store.draw choose what is audited, or tell store.design"
            )
        weights_found = {_weight(one) for one in known}
        if smallest_propensity is None and len(weights_found) > 1:
            raise DataError(
                "labels: the audits were drawn with different probabilities; give smallest_propensity, the smallest "
                "that their design gives to any query"
            )
        scale = 1 / max(weights_found, default=1.0) if smallest_propensity is None else smallest_propensity
        if any(weight * scale > 1 + 1e-9 for weight in weights_found):
            raise DataError(f"labels: an audit was drawn with a propensity below the smallest, {scale:g}")
        halves = unit_interval([one.unit for one in known], seed, "labels") < share if known else np.zeros(0)
        first = [one for one, mine in zip(known, halves, strict=True) if mine]
        second = [one for one, mine in zip(known, halves, strict=True) if not mine]
        for part, use in ((first, "to learn from"), (second, "to bound errors on")):
            good = sum(one.quality >= tau for one in part)
            if not 0 < good < len(part):
                raise DataError(
                    f"labels: of {len(known)} audited answers those {use} are {good} good and {len(part) - good} bad "
                    "ones; both are needed, so audit more"
                )
        learned_from, learned_traces = (frozenset(getattr(one, of) for one in first) for of in ("unit", "trace_id"))
        tasks = frozenset(one.task for one in second)
        sources = _reports(first, tau)
        names = [(report.kind, report.source) for report in sources if report.used]
        if not names:
            told = "; ".join(f"{r.kind} of {r.source}: p = {r.p_value:.2g}" for r in sources) or "there is none"
            raise DataError(
                f"labels: no signal tells good answers from bad ones better than chance on {len(first)} audited "
                f"answers ({told})"
            )
        returned, same, others = (
            _weighing([one for one in first if _kind(one.opinion) == kind], names, tau) for kind in _KINDS
        )
        model = cls(sources, returned, same, others, Noise(1.0, 0.0), (0, 0), Noise(1.0, 0.0))
        first, second = ([one for one in part if one.tier != frontier] or part for part in (first, second))
        on_good, on_bad = _bounds(model, first, second, tau, delta, scale)
        good = sum(one.quality >= tau for one in second)
        if not on_bad < on_good:
            raise DataError(
                f"labels: on {good} good and {len(second) - good} bad audited answers their labels are not told apart "
                f"with certainty (at most {on_good:.3f} and {on_bad:.3f}); "
                + ("name the frontier, whose answers need no bound; " if frontier is None else "")
                + "audit more, or find better signals"
            )
        return cls(
            sources,
            returned,
            same,
            others,
            Noise(on_good, on_bad, float(delta), float(tau), tasks, frozenset(one.trace_id for one in known)),
            (good, len(second) - good),
            replace(_expected(model, first, tau), tau=float(tau), seen=learned_traces),
            learned_from,
        )

    def as_dict(self) -> dict[str, Any]:
        """What it rests on, in JSON types; NaN is null."""
        sources = [asdict(source) for source in self.sources]
        for source in sources:
            source |= {name: None if isnan(source[name]) else source[name] for name in ("on_good", "on_bad")}
        noise = {name: getattr(self.noise, name) for name in ("on_good", "on_bad", "delta", "tau")}
        return {"sources": sources, "audited": self.audited, "noise": noise}

    def __call__(self, opinion: Opinion) -> float | None:
        """The label in [0, 1]; None where texts are missing to compare with the answer that was spoken of."""
        of = {"returned": self.returned or self.same, "same": self.same or self.returned, "others": self.others}
        weighing = of[_kind(opinion)]
        if weighing is not None:
            return weighing.label(_said(opinion))
        return None


_KINDS = ("returned", "same", "others")


def _kind(opinion: Opinion) -> str:
    if opinion.is_returned:
        return "returned"
    return "same" if opinion.agreement is not None and opinion.agreement >= 1 else "others"


AGREEMENT = ("agreement", "the answer returned")
AGAINST = ", against another answer"


def _said(opinion: Opinion) -> dict[Name, float]:
    """What each source said last of an answer, or of the one that was returned instead.

    Of the same answer it says the same. Against another it is a source of its own: that users dislike what was returned
    may well speak for an answer that differs from it.
    """
    found = _last(opinion.signals)
    if opinion.is_returned or opinion.agreement is None:
        return found
    instead = _last(opinion.returned)
    if opinion.agreement < 1:
        instead = {(kind, source + AGAINST): 1 - value for (kind, source), value in instead.items()}
    return instead | found | {AGREEMENT: opinion.agreement}


def _last(signals: Iterable[Signal]) -> dict[Name, float]:
    return {(signal.kind, signal.source): signal.value for signal in signals if signal.kind != "audit"}


def _weight(one: Judged) -> float:
    return 1.0 if one.weight is None else one.weight


def _level(value: float | None) -> int:
    return LEVELS if value is None else round(value * (LEVELS - 1))


def _reports(judged: Sequence[Judged], tau: float) -> tuple[SourceReport, ...]:
    values: dict[Name, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for one in judged:
        for name, value in _said(one.opinion).items():
            values[name][one.quality < tau].append(value)
    reports = []
    for name, (good, bad) in sorted(values.items()):
        p_value = float(mannwhitneyu(good, bad, alternative="greater").pvalue) if good and bad else 1.0
        on_good, on_bad = (float(np.mean(of)) if of else float("nan") for of in (good, bad))
        used = p_value <= CHANCE / len(values)
        reports.append(SourceReport(*name, on_good, on_bad, (len(good), len(bad)), p_value, used))
    return tuple(reports)


def _weighing(judged: Sequence[Judged], names: Sequence[Name], tau: float) -> Weighing | None:
    """Log-likelihood ratios of the levels of each source, smoothed by half a count each (Jeffreys), and the prior."""
    if not judged:
        return None
    good = np.array([one.quality >= tau for one in judged])
    weight = np.array([_weight(one) for one in judged])
    # in counts: half a count is to mean the same whatever the propensities
    weight = weight / weight.mean()
    said = [_said(one.opinion) for one in judged]
    found = {}
    for name in names:
        levels = np.array([_level(one.get(name)) for one in said])
        counts = [
            np.bincount(levels[good == side], weight[good == side], minlength=LEVELS + 1) + 0.5
            for side in (True, False)
        ]
        ratios = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
        found[name] = tuple(float(ratio) for ratio in ratios)
    totals = [float(weight[good == side].sum()) + 0.5 for side in (True, False)]
    return Weighing(log(totals[0] / totals[1]), found)


def _bounds(
    model: LabelModel, first: Sequence[Judged], second: Sequence[Judged], tau: float, delta: float, scale: float
) -> tuple[float, float]:
    """Upper bounds of the label of good and of bad answers, of every tier in every task: the largest of theirs."""
    of: dict[tuple[str, str], dict[str, Judged]] = defaultdict(dict)
    for one in second:
        # answers of one unit are not independent
        of[one.task, one.tier].setdefault(one.unit, one)
    share = delta / (2 * len(of))
    guesses = [label for one in first if (label := model(one.opinion)) is not None]
    spread = float(np.var(guesses)) if guesses else 0.25

    def largest(good: bool) -> float:
        return max(_upper_bound(model, list(some.values()), good, tau, share, (scale, spread)) for some in of.values())

    return largest(good=True), largest(good=False)


def _expected(model: LabelModel, judged: Sequence[Judged], tau: float) -> Noise:
    """The mean label of good and of bad answers, whatever their tier."""
    known = [(label, one) for one in judged if (label := model(one.opinion)) is not None]
    means = []
    for good in (True, False):
        mine = [(label, _weight(one)) for label, one in known if (one.quality >= tau) == good]
        if not mine:
            means.append(float(good))
            continue
        means.append(float(np.average([label for label, _ in mine], weights=[weight for _, weight in mine])))
    return Noise(means[0], means[1])


def _upper_bound(
    model: LabelModel, judged: Sequence[Judged], good: bool, tau: float, delta: float, known: tuple[float, float]
) -> float:
    """Of the mean label of the good or of the bad ones, by bets that it is below each of many values.

    E[weight (label - a), of the good] is at least 0 if a is at most the mean label of the good ones; the others count
    as rows on which nothing is bet. An answer whose label is not known counts as 1.

    Args:
        known: what weights are scaled by, and a guess of the variance of labels; both from elsewhere.
    """
    scale, spread = known
    found = [model(one.opinion) for one in judged]
    label = np.array([1.0 if value is None else value for value in found])
    weight = np.array([_weight(one) * scale if (one.quality >= tau) == good else 0.0 for one in judged])
    order = np.argsort(unit_interval([one.unit for one in judged], 0, "order of labels"), kind="stable")
    at: NDArray[np.float64] = np.linspace(0, 1, PLACES + 1)[:-1]
    excess = (weight[:, None] * (label[:, None] - at))[order]
    refuted = betting_p_value(excess, 1 - at, delta, np.full(len(at), spread)) <= delta
    # the least value that is refuted with all above it
    kept = np.flatnonzero(~refuted)
    return float(at[0] if not len(kept) else 1.0 if kept[-1] + 1 == len(at) else at[kept[-1] + 1])
