"""The decision, without any I/O.

`route` is a generator: it yields the `Call` it wants made, is sent the `Completion` (or has the `TierError`
thrown in) and returns the `Answer`. Whoever drives it does the I/O; sync, async and every framework adapter
drive the same generator, so they cannot decide differently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from math import exp
from statistics import fmean

from .errors import TierError
from .types import Answer, Attempt, Call, Completion, Policy, Query, Rung, ScoreKind, Trace

__all__ = ["Flow", "drive", "plan", "route", "score"]

Flow = Generator[Call, Completion, Answer]


def score(completion: Completion, kind: ScoreKind) -> float | None:
    """The evidence of one answer in [0, 1], higher for a better answer; None if the tier did not supply it.

    ``confidence`` is the tier's own; ``token_probability`` is ``1 - u`` with the miss probability
    ``u = mean(1 - p(token))`` of RouteNLP (arXiv 2604.23577, section on the cascade); ``mean_logprob`` is the
    geometric mean of the token probabilities, ``exp(mean log p)``.
    """
    logprobs = completion.token_logprobs
    if kind == "confidence":
        return completion.confidence
    if kind == "token_probability":
        return fmean(map(exp, logprobs)) if logprobs else None
    if completion.mean_logprob is not None:
        return exp(completion.mean_logprob)
    return exp(fmean(logprobs)) if logprobs else None


def plan(policy: Policy, query: Query) -> tuple[str | None, tuple[Rung, ...], str]:
    """The task of a query, the rungs to climb before the frontier, and why the frontier if there are none."""
    task = query.task
    if task is None and len(policy.ladders) == 1:
        task = next(iter(policy.ladders))
    if task is None:
        return None, (), f"the query names no task; known tasks: {', '.join(policy.ladders) or 'none'}"
    if task not in policy.ladders:
        return task, (), f"unknown task {task!r}"
    if query.requires:
        return task, (), f"the certificate does not cover calls that need {', '.join(sorted(query.requires))}"
    return task, policy.ladders[task], f"task {task!r} stays on the frontier"


def route(policy: Policy, query: Query) -> Flow:
    """Climb the ladder of the query's task; the frontier answers whatever no rung accepted.

    A cheap tier that fails is passed over like a rejected answer.

    Raises:
        TierError: the frontier itself failed; carries all attempts.
    """
    task, rungs, reason = plan(policy, query)
    attempts: list[Attempt] = []
    for rung in rungs:
        try:
            completion = yield Call(rung.tier, query)
        except TierError as error:
            attempts.append(Attempt(rung.tier, accepted=False, error=str(error)))
            continue
        attempt = _judge(rung, completion)
        attempts.append(attempt)
        if attempt.accepted:
            return _answer(query, task, attempts, completion, _acceptance(attempt))
    if attempts:
        without = [a.tier for a in attempts if a.completion is not None and a.score is None]
        lacking = f"; {', '.join(without)} gave no score that could be compared" if without else ""
        reason = f"no cheaper answer was accepted{lacking}"
    try:
        completion = yield Call(policy.frontier, query)
    except TierError as error:
        attempts.append(Attempt(policy.frontier, accepted=False, error=str(error)))
        raise TierError(_failure(attempts), policy.frontier, tuple(attempts)) from error
    attempts.append(Attempt(policy.frontier, accepted=True, completion=completion))
    return _answer(query, task, attempts, completion, f"frontier: {reason}")


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


def _judge(rung: Rung, completion: Completion) -> Attempt:
    value = None if rung.score is None else score(completion, rung.score)
    accepted = rung.threshold is None or (value is not None and value >= rung.threshold)
    return Attempt(rung.tier, accepted, score=value, threshold=rung.threshold, completion=completion)


def _acceptance(attempt: Attempt) -> str:
    if attempt.threshold is None:
        return f"{attempt.tier}: every answer is accepted for this task"
    return f"{attempt.tier}: score {attempt.score:.4f} reaches {attempt.threshold:.4f}"


def _failure(attempts: list[Attempt]) -> str:
    steps = "; ".join(f"{attempt.tier}: {attempt.error or 'answer rejected'}" for attempt in attempts)
    return f"no tier answered ({steps})"


def _answer(query: Query, task: str | None, attempts: list[Attempt], completion: Completion, reason: str) -> Answer:
    trace = Trace(query=query, task=task, attempts=tuple(attempts), reason=reason)
    return Answer(text=completion.text, tier=attempts[-1].tier, trace=trace)
