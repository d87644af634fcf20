"""Choose what a student is taught, teach it, and judge it on fresh traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from math import exp
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, TierError
from ..evaluate.units import one_row_per_unit
from ..types import Completion
from .asking import Asked
from .dataset import Taught as TaughtQuery
from .dataset import lessons_of, rehearsal
from .files import file_name, read_json, write_json
from .gate import Fresh, Verdict, judge
from .harvest import Served
from .lessons import Lesson, read_lessons, write_lessons
from .parts import check_leaks, leaks
from .results import ClusterFacts, Taught
from .selection import SELECTIONS, Candidates, coverage, covered
from .student import Course, Student
from .work import Work, words

__all__ = ["new_student", "teach"]

Known = tuple[NDArray[np.float32], list[str]] | None
HELD_OUT = ("gate", "certification")


def teach(work: Work, tier: str) -> Taught:
    """Choose lessons for a student, teach it and judge it; what was done before an interruption is kept."""
    file = work.file("taught", tier)
    if file.exists():
        return Taught.from_dict(read_json(file))
    told = _lessons(work, tier)
    if told.skipped is None:
        told = replace(told, **_trained(work, tier))
    if told.skipped is None:
        try:
            told = replace(told, verdict=_judged(work, tier, told.clusters))
        except _NewStudentError as error:
            told = replace(told, skipped=f"the taught student does not answer: {error}")
    write_json(file, asdict(told))
    return told


class _NewStudentError(Exception):
    """A student that was taught fails: a reason to refuse it, not to try again."""


def _trained(work: Work, tier: str) -> dict[str, Any]:
    """Teach, and keep what that took; a task that cannot be learned is a reason to refuse."""
    file = work.file("trained", tier)
    if not file.exists():
        begun, skipped, usd = perf_counter(), None, 0.0
        try:
            usd = getattr(_taught(work, tier), "training_usd", 0.0)
        except DataError as error:
            skipped = f"it cannot be taught: {error}"
        write_json(file, {"seconds": perf_counter() - begun, "usd": usd, "skipped": skipped})
    return read_json(file)


def new_student(work: Work, tier: str) -> Student:
    """A student as the round leaves it: the new one if the gate let it pass."""
    verdict = Taught.from_dict(read_json(work.file("taught", tier))).verdict
    return _taught(work, tier) if verdict is not None and verdict.promoted else work.students[tier]


def _taught(work: Work, tier: str) -> Student:
    lessons = read_lessons(work.file("lessons", tier, "jsonl"))
    heard = read_lessons(work.file("rehearsal", tier, "jsonl"))
    course = Course(lessons, heard, work.seed, work.options.progress)
    return work.students[tier].taught(course, work.folder / "students" / file_name(tier))


def _lessons(work: Work, tier: str) -> Taught:
    """Choose and write what a student is to be taught."""
    file = work.file("lessons", tier)
    if file.exists():
        return Taught.from_dict(read_json(file))
    student, served = work.students[tier], work.those_for(tier, "teaching")
    if not served:
        return Taught(tier, skipped="nothing to teach: no query of its tasks in this traffic")
    own = work.asked(tier, student, served, "teaching")
    may, dropped = _teachable(work, tier, served)
    candidates, known = _candidates(work, tier, may, own), _known(work, student)
    chosen = _chosen(work, candidates, known)
    answers = work.of_frontier([may[i] for i in chosen], f"teacher-{file_name(tier)}")
    said = [_pair(work, may[i], answers) for i in chosen if answers.text(may[i].trace_id) is not None]
    made = lessons_of(said, work.options.filters, student.lessons)
    dropped += Counter(made.dropped) + Counter({"no answer": len(chosen) - len(said)})
    check_leaks(made.lessons, {part: work.parts[part] for part in HELD_OUT}, work.common)
    of_lesson = {lesson.id for lesson in made.lessons}
    taught = [i for i in chosen if may[i].trace_id in of_lesson]
    heard = _heard_again(work, tier, served, own, len(made.lessons))
    told = Taught(
        tier,
        lessons=len(made.lessons),
        rehearsal=len(heard),
        already_paid=sum(may[i].trace_id not in answers.bought for i in taught),
        dropped=dict(dropped),
        clusters=_clusters(work, candidates, taught, known),
        skipped=None if made.lessons else _nothing(candidates, dropped),
    )
    write_lessons(work.file("lessons", tier, "jsonl"), made.lessons)
    write_lessons(work.file("rehearsal", tier, "jsonl"), heard)
    write_json(file, asdict(told))
    return told


def _teachable(work: Work, tier: str, served: Sequence[Served]) -> tuple[list[Served], Counter[str]]:
    """What is left without the answers that were paid for and cannot be taught, and why those cannot."""
    paid = Asked({one.trace_id: o for one in served if (o := one.row.outcomes.get(work.frontier))}, frozenset())
    told = [one for one in served if one.returned != tier and paid.outcomes.get(one.trace_id) is not None]
    made = lessons_of([_pair(work, one, paid) for one in told], work.options.filters, work.students[tier].lessons)
    out = {one.trace_id for one in told} - {lesson.id for lesson in made.lessons}
    left = [one for one in served if one.trace_id not in out]
    held_out = [one.row.query for part in HELD_OUT for one in work.parts[part]]
    alike = {place for place, _ in leaks([one.row.query for one in left], held_out, work.common)}
    dropped = Counter(made.dropped)
    # of what was answered by the student few would have been lessons
    dropped["alike to what judges"] = sum(left[place].returned != tier for place in alike)
    return [one for place, one in enumerate(left) if place not in alike], +dropped


def _pair(work: Work, one: Served, answers: Asked) -> TaughtQuery:
    recorded = one.row.outcomes.get(work.frontier)
    audit = None if recorded is None or one.trace_id in answers.bought else recorded.quality
    return TaughtQuery(one.row.query, answers.outcomes[one.trace_id].completion, audit)


def _candidates(work: Work, tier: str, may: Sequence[Served], own: Asked) -> Candidates:
    paid, usd = [one.answer_of(work.frontier) for one in may], work.frontier_usd
    # what answered instead of the student, where something did
    instead = [None if one.returned == tier else one.answer_of(one.returned) for one in may]
    texts, tasks = words(may)

    def right(one: Served, answer: Completion | None) -> float:
        mine = own.text(one.trace_id)
        if answer is None or mine is None:
            return float("nan")
        found = work.quality(one.row.query, mine, answer.text)
        return float("nan") if found is None else found

    return Candidates(
        queries=[one.row.query for one in may],
        vectors=np.asarray(work.encoder(texts) if texts else np.zeros((0, 1)), dtype=np.float32),
        answers=[None if answer is None else answer.text for answer in paid],
        right=np.array([right(*pair) for pair in zip(may, paid, strict=True)], dtype=np.float64),
        confidence=np.array([_confidence(own.outcomes[one.trace_id].completion) for one in may], dtype=np.float64),
        escalated=np.array([one.returned != tier for one in may], dtype=np.bool_),
        saving=np.array([usd if a is None or a.cost_usd is None else a.cost_usd for a in instead], dtype=np.float64),
        price=np.array([usd if answer is None else 0.0 for answer in paid], dtype=np.float64),
        cluster=np.full(len(may), -1) if work.clusters is None else work.clusters.assign(texts, tasks),
        agreement=work.agreement,
    )


def _chosen(work: Work, candidates: Candidates, known: Known) -> list[int]:
    budget = work.options.budget
    if work.options.selection == "coverage":
        return coverage(candidates, budget, work.seed, known)
    return SELECTIONS[work.options.selection](candidates, budget, work.seed)


def _known(work: Work, student: Student) -> Known:
    if not student.lessons:
        return None
    vectors = work.encoder([lesson.text for lesson in student.lessons])
    return np.asarray(vectors, dtype=np.float32), [lesson.answer for lesson in student.lessons]


def _heard_again(work: Work, tier: str, may: Sequence[Served], own: Asked, new: int) -> tuple[Lesson, ...]:
    """Earlier lessons, and for want of them what the student answered and nobody objected to."""
    most = round(work.options.rehearsal * new)
    if work.students[tier].lessons:
        return rehearsal(work.students[tier].lessons, most, work.seed)
    answered = [(one, own.text(one.trace_id)) for one in may if one.returned == tier]
    accepted = [Lesson.of(one.row.query, text, "rehearsal") for one, text in answered if text]
    return rehearsal(accepted, most, work.seed)


def _clusters(work: Work, of: Candidates, taught: Sequence[int], known: Known) -> tuple[ClusterFacts, ...]:
    if work.clusters is None:
        return ()
    more = (covered(of, taught, known) - covered(of, [], known)) * of.saving
    facts = []
    for number, (task, label) in enumerate(zip(work.clusters.tasks, work.clusters.labels, strict=True)):
        members = np.flatnonzero((of.cluster == number) & of.escalated)
        gap = float(of.failed[members].mean()) if len(members) else 0.0
        expected = float(more[members].sum()) / max(len(of), 1)
        lessons = int((of.cluster[list(taught)] == number).sum())
        exemplars = work.clusters.exemplars[number]
        facts.append(ClusterFacts(number, task, label, exemplars, len(members), gap, expected, lessons))
    return tuple(facts)


def _judged(work: Work, tier: str, clusters: Sequence[ClusterFacts]) -> Verdict:
    """Both students on fresh queries, against the frontier's answers; one query of each unit."""
    new = _taught(work, tier)
    reference = work.labels("gate")
    served = {one.trace_id: one for one in work.judging(tier, reference)}
    drawn = one_row_per_unit([replace(one.row, group=one.unit) for one in served.values()], work.seed, pooled=True)
    fresh = [served[row.query.id or ""] for row in drawn]
    before = work.asked(tier, work.students[tier], list(served.values()), "gate-old")
    try:
        after = work.asked(tier, new, list(served.values()), "gate-new")
    except TierError as error:
        raise _NewStudentError(str(error)) from error

    def scores(of: Asked) -> NDArray[np.float64]:
        pairs = [(one, of.text(one.trace_id), reference.words(one.trace_id)) for one in fresh]
        # a tier that fails is no help
        found = [0.0 if mine is None else work.quality(one.row.query, mine, said) for one, mine, said in pairs]
        return np.array([np.nan if quality is None else quality for quality in found], dtype=np.float64)

    old, now = scores(before), scores(after)
    known = np.flatnonzero(~np.isnan(old) & ~np.isnan(now))
    fresh, old, now = [fresh[i] for i in known], old[known], now[known]
    texts, tasks = words(fresh)
    number = np.full(len(fresh), -1) if work.clusters is None else work.clusters.assign(texts, tasks)
    # bets need rows in a random order
    order = np.random.default_rng(work.seed).permutation(len(fresh))
    said = [reference.words(fresh[i].trace_id) for i in order]
    passed_on = np.array([one.returned != tier for one in fresh], dtype=np.bool_)
    seen = Fresh([tasks[i] for i in order], number[order], passed_on[order], said, old[order], now[order])
    labels = () if work.clusters is None else work.clusters.labels
    taught = [cluster.number for cluster in clusters if cluster.lessons]
    served_here = {one.row.query.task or "" for one in work.those_for(tier, "teaching")}
    verdict = judge(seen, taught, labels, work.options.gate, served_here)
    silence = work.silence("gate", reference)
    return verdict if silence is None else replace(verdict, refusals=(silence, *verdict.refusals))


def _confidence(answer: Completion) -> float:
    if answer.confidence is not None:
        return answer.confidence
    return float("nan") if answer.mean_logprob is None else exp(answer.mean_logprob)


def _nothing(of: Candidates, dropped: Mapping[str, int]) -> str:
    if dropped and not of.escalated.any():
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items()))
        return f"nothing to teach: of the frontier's answers none can be taught ({reasons})"
    if not len(of):
        return "nothing to teach: no query of its tasks in this traffic"
    return f"nothing to teach: none of {len(of)} queries was escalated or is known to have been answered wrongly"
