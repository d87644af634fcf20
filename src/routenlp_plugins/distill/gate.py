"""Whether a student may replace the one it was taught from: tests on fresh traffic, of which nothing was taught.

Each test is about the mean difference of quality on one query, new student less old one, and is valid for any sample
size (`routenlp_plugins.cascade.bounds.betting_p_value`). All that is claimed must be shown, each at the same level, so
that the chance of promoting a student of which any of it is false is at most that level (intersection-union test:
Berger 1982). Harm to a part is looked for, on the contrary: in each cluster, and among the queries with each answer
of the frontier, since what is taught wrongly about one label need be no cluster; and in all of those together that look
worse on one half of the queries, tested on the other half. That none is found is no proof that there is none, and so
the smallest harm that would have been found is told beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from ..cascade.bounds import betting_p_value, holm, labels_needed_for_mean
from ..errors import DataError
from .clusters import ELSEWHERE

__all__ = ["Check", "Fresh", "GateOptions", "Verdict", "judge"]

FEWEST_ALIKE = 5
"""Fresh queries with the same answer, from which harm to them is looked for."""
SHOWN = 8
"""Groups that a refusal names."""
AIM = 0.96
"""Of the level, what bets aim at."""
NEEDED = 0.8
"""Power with which a harm would have been found that is told."""


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What a student must show.

    Attributes:
        margin: of quality, by which the new student may be worse on average, of each task and of what was not taught.
        level: of each test that something is so, and of all tests for harm together.
        fewest: fresh queries with which nothing is tested.
    """

    margin: float = 0.03
    level: float = 0.05
    fewest: int = 30

    def __post_init__(self) -> None:
        for name in ("margin", "level"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise DataError(f"gate: {name} must be strictly between 0 and 1, got {value!r}")
        if isinstance(self.fewest, bool) or not isinstance(self.fewest, int) or self.fewest < 1:
            raise DataError(f"gate: fewest must be 1, 2, ..., got {self.fewest!r}")


@dataclass(frozen=True, slots=True, eq=False)
class Fresh:
    """n queries of which nothing was taught, in a random order, one of each unit.

    Attributes:
        tasks: (n,) of the queries.
        clusters: (n,) where they belong; `ELSEWHERE` where to none.
        escalated: (n,) whether the old student's answer was not returned.
        answers: (n,) of the frontier.
        old, new: (n,) quality of both students' answers, in [0, 1].
    """

    tasks: Sequence[str]
    clusters: NDArray[np.intp]
    escalated: NDArray[np.bool_]
    answers: Sequence[str]
    old: NDArray[np.float64]
    new: NDArray[np.float64]

    def __post_init__(self) -> None:
        sizes = {len(of) for of in (self.tasks, self.clusters, self.escalated, self.answers, self.old, self.new)}
        if len(sizes) != 1:
            raise DataError(f"gate: expected n tasks, clusters and qualities, got {sorted(sizes)}")
        for quality in (self.old, self.new):
            if not ((quality >= 0) & (quality <= 1)).all():
                raise DataError("gate: a quality must be in [0, 1]")


@dataclass(frozen=True, slots=True)
class Check:
    """One test of the gate.

    Attributes:
        about: what it speaks of: a task, "untaught", "taught", a cluster, or the queries with one answer.
        kind: ``non-inferior`` and ``better`` must be shown, ``harm`` must not be found.
        passed: whether it speaks for promotion.
        n: fresh queries.
        old, new: mean quality among them.
        detectable: loss of mean quality that would have been found with 80 % power, for harm; None for others.
    """

    about: str
    kind: Literal["non-inferior", "better", "harm"]
    passed: bool
    n: int
    old: float
    new: float
    p_value: float
    detectable: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate says.

    Attributes:
        refusals: why the student is not promoted, a sentence each; () if it is.
    """

    checks: tuple[Check, ...]
    refusals: tuple[str, ...]
    margin: float
    level: float

    @property
    def promoted(self) -> bool:
        """Whether the student may replace the old one."""
        return not self.refusals

    def as_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Verdict:
        """From what `as_dict` wrote."""
        checks = tuple(Check(**check) for check in facts["checks"])
        return cls(checks, tuple(facts["refusals"]), facts["margin"], facts["level"])


def judge(
    fresh: Fresh,
    taught: Sequence[int],
    names: Sequence[str],
    options: GateOptions | None = None,
    tasks: Collection[str] = (),
) -> Verdict:
    """Test a student against the one it was taught from.

    Taught is what the old student passed on in clusters of which lessons were chosen; untaught all else, above all what
    it answered itself. Where nothing is untaught, nothing has to be shown of it. Where so few queries are untaught that
    nothing could be shown of them, even if none of them changed, what is tested is what they cost all traffic: their
    loss of quality, per fresh query of any kind, must be less than the margin.

    Args:
        taught: clusters of which lessons were chosen.
        names: (C,) what clusters are called in refusals.
        tasks: of which something must be shown, beside those of the fresh queries.
    """
    options = options or GateOptions()
    of_task, in_taught = np.asarray(fresh.tasks), np.isin(fresh.clusters, list(taught)) & fresh.escalated
    gain = fresh.new - fresh.old
    checks, refusals = [], []
    parts = [(task, of_task == task) for task in sorted({*fresh.tasks, *tasks})]
    untaught = ~in_taught
    parts += [("untaught", untaught)] if untaught.any() else []
    for about, places in parts:
        # H0: it is worse by the margin or more
        loss = -gain[places]
        if about == "untaught" and _too_few(len(loss), options):
            loss = np.where(untaught, -gain, 0.0)
        p = _p_value(loss - options.margin, 1 - options.margin, options.level)
        check = _check(fresh, about, "non-inferior", places, p, p <= options.level)
        checks.append(check)
        if not check.passed:
            refusals.append(_not_shown(check, gain[places], options))
    p = _p_value(-gain[in_taught], 1.0, options.level)
    better = _check(fresh, "taught", "better", in_taught, p, p <= options.level)
    checks.append(better)
    if not better.passed:
        refusals.append(
            f"not shown to be better where it was taught: quality {better.old:.3f} before, {better.new:.3f} after, on "
            f"{better.n} fresh queries of those clusters (p {better.p_value:.3f}, needed {options.level:g})"
        )
    harmful = _harm(fresh, gain, names, options)
    refusals += [
        f"harm: {check.about}: quality {check.old:.3f} before, {check.new:.3f} after, on {check.n} fresh queries "
        f"(p {check.p_value:.2g}, Holm over {len(harmful)} groups at {options.level:g})"
        for check in harmful
        if not check.passed
    ]
    if len(gain) < options.fewest:
        refusals.insert(0, f"only {len(gain)} fresh queries to judge it by, at least {options.fewest} are needed")
    return Verdict((*checks, *harmful), tuple(refusals), options.margin, options.level)


def _harm(fresh: Fresh, gain: NDArray[np.float64], names: Sequence[str], options: GateOptions) -> list[Check]:
    """H0 of each cluster, of the queries with each answer, and of what looks worse of either: they are not worse."""
    clusters = {_place(number, names): fresh.clusters == number for number in np.unique(fresh.clusters).tolist()}
    said, of_answer = Counter(fresh.answers), np.asarray(fresh.answers)
    answers = {f"answer {text!r}": of_answer == text for text, n in sorted(said.items()) if n >= FEWEST_ALIKE}
    groups = {**clusters, **answers, **_suspects(clusters, gain), **_suspects(answers, gain)}
    level = options.level / max(len(groups), 1)
    p = [_p_value(gain[of], 1.0, level) for of in groups.values()]
    found = holm(p, options.level)
    return [
        _check(fresh, about, "harm", of, value, not bad, _detectable(gain[of], level))
        for (about, of), value, bad in zip(groups.items(), p, found.tolist(), strict=True)
    ]


def _suspects(groups: Mapping[str, NDArray[np.bool_]], gain: NDArray[np.float64]) -> dict[str, NDArray[np.bool_]]:
    """Harm that is spread over groups, too little in each of them: those that look worse on one half of the queries,
    tested together on the other, which played no part in choosing them."""
    half = np.arange(len(gain)) % 2 == 0
    found = {}
    for name, seen in (("first", half), ("second", ~half)):
        worse = [about for about, of in groups.items() if (of & seen).any() and gain[of & seen].mean() < 0]
        if len(worse) > 1:
            shown = ", ".join(worse[:SHOWN]) + (f" and {len(worse) - SHOWN} more" if len(worse) > SHOWN else "")
            together = np.logical_or.reduce([groups[about] for about in worse]) & ~seen
            if together.any():
                found[f"together, what looks worse on the {name} half of the queries: {shown}"] = together
    return found


def _place(number: int, names: Sequence[str]) -> str:
    return "queries near to no cluster" if number == ELSEWHERE else f"cluster {number} ({names[number]})"


def _check(
    fresh: Fresh,
    about: str,
    kind: Literal["non-inferior", "better", "harm"],
    places: NDArray[np.bool_],
    p: float,
    passed: bool | np.bool_,
    detectable: float | None = None,
) -> Check:
    n = int(places.sum())
    old, new = (float(q[places].mean()) if n else 0.0 for q in (fresh.old, fresh.new))
    return Check(about, kind, bool(passed), n, old, new, p, detectable)


def _not_shown(check: Check, gain: NDArray[np.float64], options: GateOptions) -> str:
    about = "what was not taught" if check.about == "untaught" else f"task {check.about!r}"
    if not check.n:
        return f"{about}: not shown to be less than {options.margin:g} worse: no fresh query of it"
    excess = -gain - options.margin
    moment = max(float((excess**2).mean()), options.margin)
    needed = labels_needed_for_mean(float(excess.mean()), moment, options.level)
    remedy = "" if needed is None or needed <= check.n else f"; about {needed} would do if it is what it seems to be"
    return (
        f"{about}: not shown to be less than {options.margin:g} worse: quality {check.old:.3f} before, {check.new:.3f} "
        f"after, on {check.n} fresh queries (p {check.p_value:.3f}, needed {options.level:g}){remedy}"
    )


def _too_few(n: int, options: GateOptions) -> bool:
    """Whether n queries of which none changes would not show it: known before any answer is looked at."""
    return _p_value(np.full(n, -options.margin), 1 - options.margin, options.level) > options.level


def _p_value(excess: NDArray[np.float64], largest: float, level: float) -> float:
    """Of "the mean excess is at least 0"; 1 without data."""
    if not len(excess):
        return 1.0
    # bets come as near to what they aim at as rounding lets them: aimed at the level itself they might just miss it
    return float(betting_p_value(excess[:, None], np.array([largest]), AIM * level, _second_moment(excess))[0])


def _second_moment(excess: NDArray[np.float64]) -> NDArray[np.float64]:
    # a guess only: any stakes are valid as long as they do not look at rows to come
    return np.array([max(0.05, min(0.25, 4 / len(excess)))])


def _detectable(gain: NDArray[np.float64], level: float) -> float:
    """Of a one-sided Gaussian test with the variance that was seen, or that of one query in n that changes."""
    n = len(gain)
    deviation = max(float(gain.std()), (1 / n) ** 0.5)
    return float(min(1.0, (ndtri(1 - level) + ndtri(NEEDED)) * deviation / n**0.5))
