"""The decision, without any I/O.

`route` is a generator: it yields the `Call` it wants made, is sent the `Completion` (or has the `TierError`
thrown in) and returns the `Answer`. Whoever drives it does the I/O; sync, async and every framework adapter
drive the same generator, so they cannot decide differently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace

from .comparing import Comparator, comparator
from .errors import TierError
from .evidence import Agreement, confidence_in
from .types import Answer, Attempt, Call, Completion, Policy, Query, Rung, Trace

__all__ = ["Flow", "drive", "plan", "route"]

Flow = Generator[Call, Completion, Answer]


def plan(policy: Policy, query: Query) -> tuple[str | None, tuple[Rung, ...], str]:
    """The task of a query, the rungs to climb before the frontier, and why the frontier if there are none."""
    task = query.task
    if task is None and len(policy.ladders) == 1:
        task = next(iter(policy.ladders))
    if policy.void is not None:
        return task, (), f"the certificate is void: {policy.void}"
    if task is None:
        return None, (), f"the query names no task; known tasks: {', '.join(policy.ladders) or 'none'}"
    if task not in policy.ladders:
        return task, (), f"unknown task {task!r}"
    if query.requires:
        return task, (), f"the certificate does not cover calls that need {', '.join(sorted(query.requires))}"
    return task, policy.ladders[task], f"task {task!r} stays on the frontier"


def route(policy: Policy, query: Query, comparators: Mapping[str, Comparator] | None = None) -> Flow:
    """Climb the ladder of the query's task; the frontier answers whatever no rung accepted.

    After each call the best answer there is, by its calibrated confidence, is returned if that reaches the rung's
    threshold. A cheap tier that fails is passed over like a rejected answer. An answer of another model or to another
    prompt than those certified is never returned.

    Args:
        comparators: the user's own, by the names the policy knows them by.

    Raises:
        TierError: the frontier itself failed; carries all attempts.
        DataError: the policy names a comparator that is not supplied.
    """
    task, rungs, reason = plan(policy, query)
    attempts: list[Attempt] = []
    answers: dict[str, Completion] = {}
    agreement = _agreement(policy, task, answers, comparators) if rungs else _no_agreement
    objection = None
    for rung in rungs:
        try:
            completion = yield Call(rung.tier, query)
        except TierError as error:
            attempts.append(Attempt(rung.tier, accepted=False, error=str(error)))
            continue
        objection = _objection(policy, task, rung.tier, completion)
        if objection is not None:
            attempts.append(Attempt(rung.tier, accepted=False, completion=completion))
            break
        answers[rung.tier] = completion
        attempts.append(Attempt(rung.tier, accepted=False, threshold=rung.threshold, completion=completion))
        best = _judge(rung, attempts, answers, agreement)
        if best is not None:
            attempts[best] = replace(attempts[best], accepted=True)
            return _answer(query, task, attempts, attempts[best], _acceptance(attempts[best], rung))
    if objection is not None:
        reason = objection
    elif attempts:
        without = [a.tier for a in attempts if a.completion is not None and a.confidence is None]
        lacking = f"; {', '.join(without)} came without the evidence its confidence needs" if without else ""
        reason = f"no cheaper answer was accepted{lacking}"
    try:
        completion = yield Call(policy.frontier, query)
    except TierError as error:
        attempts.append(Attempt(policy.frontier, accepted=False, error=str(error)))
        raise TierError(_failure(attempts), policy.frontier, tuple(attempts)) from error
    attempts.append(Attempt(policy.frontier, accepted=True, completion=completion))
    return _answer(query, task, attempts, attempts[-1], f"frontier: {reason}")


def drive(flow: Flow, call: Callable[[Call], Completion]) -> Answer:
    """Run a flow to its end, making every call with `call`, which may raise `TierError`."""
    try:
        step = next(flow)
        while True:
            try:
                completion = call(step)
            except TierError as error:
                step = flow.throw(error)
            else:
                step = flow.send(completion)
    except StopIteration as stop:
        answer: Answer = stop.value
        return answer


def _no_agreement(first: str, second: str) -> float | None:
    return None


def _agreement(
    policy: Policy, task: str | None, answers: Mapping[str, Completion], own: Mapping[str, Comparator] | None
) -> Agreement:
    """Agreement between the answers there are; each pair is compared once."""
    compare = comparator(policy.comparators.get(task or "", "text"), own)
    known: dict[tuple[str, str], float] = {}

    def agreement(first: str, second: str) -> float | None:
        if not (first in answers and second in answers and answers[first].text and answers[second].text):
            return None
        pair = (first, second) if first <= second else (second, first)
        if pair not in known:
            known[pair] = compare(answers[pair[0]].text, answers[pair[1]].text)
        return known[pair]

    return agreement


def _objection(policy: Policy, task: str | None, tier: str, completion: Completion) -> str | None:
    """Why an answer is outside of what was certified."""
    models, prompts = policy.models.get(tier, ()), policy.prompts.get(task or "", ())
    if models and completion.model not in models:
        return f"the certificate is void: {tier} answered as {completion.model!r}, certified was {', '.join(models)}"
    if prompts and completion.prompt is not None and completion.prompt not in prompts:
        return f"the certificate is void: the prompt of task {task!r} is not the one it was certified with"
    return None


def _judge(rung: Rung, attempts: list[Attempt], answers: Mapping[str, Completion], agreement: Agreement) -> int | None:
    """Index of the attempt to return, or None; notes the confidences in the attempts."""
    if rung.threshold is None:
        return len(attempts) - 1
    places = {attempt.tier: i for i, attempt in enumerate(attempts)}
    best: int | None = None
    highest = -1.0
    for confidence in rung.confidences:
        value = confidence_in(confidence, answers, agreement)
        place = places.get(confidence.tier)
        if value is None or place is None:
            continue
        attempts[place] = replace(attempts[place], confidence=value, threshold=rung.threshold)
        if value > highest:
            best, highest = place, value
    return best if highest >= rung.threshold else None


def _acceptance(attempt: Attempt, rung: Rung) -> str:
    if rung.threshold is None:
        return f"{attempt.tier}: every answer is accepted for this task"
    return f"{attempt.tier}: confidence {attempt.confidence:.4f} reaches {rung.threshold:.4f}"


def _failure(attempts: list[Attempt]) -> str:
    reasons = "; ".join(f"{a.tier}: {a.error or 'answer rejected'}" for a in attempts)
    return f"no tier answered ({reasons})"


def _answer(query: Query, task: str | None, attempts: list[Attempt], chosen: Attempt, reason: str) -> Answer:
    completion = chosen.completion
    text = "" if completion is None else completion.text
    return Answer(text=text, tier=chosen.tier, trace=Trace(query, task, tuple(attempts), reason))
