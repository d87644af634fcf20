"""The decision, without any I/O.

`route` is a generator: it yields the `Call` it wants made, is sent the `Completion` (or has the `TierError`
thrown in) and returns the `Answer`. Whoever drives it does the I/O; sync, async and every framework adapter
drive the same generator, so they cannot decide differently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from math import inf

from .comparing import Comparator, comparator, same_text
from .errors import DataError, TierError
from .evidence import Answers, confidence_in
from .policy import Offer, Policy, RelativeCost, Rung
from .support import supported
from .types import Answer, Attempt, Call, Completion, Final, Query, Skipped, Trace

__all__ = ["Flow", "drive", "plan", "route", "task_of"]
Flow = Generator[Call, Completion, Answer]


def plan(policy: Policy, query: Query) -> tuple[str | None, tuple[Rung, ...], str]:
    """The task of a query, the rungs to climb before the frontier, and why the frontier if there are none."""
    task = task_of(policy, query)
    if policy.void is not None:
        return task, (), f"the certificate is void: {policy.void}"
    if task is None:
        return None, (), f"the query names no task; known tasks: {', '.join(policy.ladders) or 'none'}"
    if task not in policy.ladders:
        return task, (), f"unknown task {task!r}"
    if task in policy.expired:
        return task, (), f"the certificate of task {task!r} has expired: {policy.expired[task]}"
    beyond = sorted(query.requires.difference(policy.requires.get(task, ())))
    if beyond:
        return task, (), f"the certificate does not cover calls that need {', '.join(beyond)}"
    if policy.ladders[task] and task in policy.support and not supported(policy.support[task], query.text):
        return task, (), "the query is unlike those of the certificate"
    return task, policy.ladders[task], f"task {task!r} stays on the frontier"


def task_of(policy: Policy, query: Query) -> str | None:
    """The task of a query, which may leave it out where there is only one."""
    if query.task is None and len(policy.ladders) == 1:
        return next(iter(policy.ladders))
    return query.task


def route(
    policy: Policy,
    query: Query,
    comparators: Mapping[str, Comparator] | None = None,
    difficulty: Mapping[str, float] | None = None,
    stay: str | None = None,
) -> Flow:
    """Climb the ladder of the query's task; the frontier answers whatever no rung accepted.

    A tier that is not believed to be worth its call is skipped. After each call the best answer there is, by its
    calibrated confidence, is returned if that reaches the rung's threshold. A cheap tier that fails is passed over like
    a skipped one, and so is one whose answer is not valid, though it is paid for. An answer of another model or to
    another prompt than those certified is never returned.

    Args:
        comparators: the user's own, by the names the policy knows them by.
        difficulty: what the policy's router predicts for this query: tier -> P(good enough).
        stay: why the frontier answers it although its task has rungs.

    Raises:
        TierError: the frontier itself failed, or a tier whose answer had begun to be passed on; carries all attempts.
        DataError: the policy names a comparator that is not supplied, or a router whose predictions are not.
    """
    task, rungs, reason = plan(policy, query)
    if rungs and stay is not None:
        rungs, reason = (), stay
    if rungs and policy.router is not None and difficulty is None:
        raise DataError("the policy decides by a router: its predictions for the query are missing")
    compare = comparator(policy.comparators.get(task or "", "text"), comparators) if rungs else same_text
    climb = _Climb(Answers(compare, difficulty), policy.relative_cost.get(task or ""), query)
    for rung in climb.begun(rungs, policy.offers.get(task or "", ())):
        if not climb.reaches(rung):
            continue
        try:
            completion = yield Call(rung.tier, query, _final(policy, task, rung))
        except TierError as error:
            climb.calls.append((rung.tier, None, str(error)))
            if error.begun:
                raise climb.failed(error, rung.tier) from error
            continue
        climb.calls.append((rung.tier, completion, None))
        objection = _objection(policy, task, rung.tier, completion)
        if objection is not None:
            reason = objection
            break
        if not completion.valid:
            continue
        climb.answers.add(rung.tier, completion)
        best = climb.judge(rung)
        if best is not None:
            return climb.answer(task, best, climb.acceptance(best, rung))
    else:
        reason = climb.rejection() if climb.calls or climb.skipped else reason
    try:
        completion = yield Call(policy.frontier, query, Final())
    except TierError as error:
        climb.calls.append((policy.frontier, None, str(error)))
        raise climb.failed(error, policy.frontier) from error
    climb.calls.append((policy.frontier, completion, None))
    if rungs:
        reason = _other_model(policy, policy.frontier, completion) or reason
    return climb.answer(task, policy.frontier, f"frontier: {reason}")


class _Climb:
    """What happened so far, in plain lists: attempts are made of it once, at the end."""

    def __init__(self, answers: Answers, relative_cost: RelativeCost | None, query: Query) -> None:
        self.answers = answers
        self.query = query
        self.relative_cost = 1.0 if relative_cost is None else relative_cost.of(query.text)
        self.calls: list[tuple[str, Completion | None, str | None]] = []
        self.skipped: dict[str, Skipped] = {}
        self.confidence: dict[str, float] = {}
        self.threshold: dict[str, float] = {}
        self.asked: set[str] = set()
        self.preferred: tuple[str, float] | None = None

    def begun(self, rungs: tuple[Rung, ...], offers: tuple[Offer, ...]) -> tuple[Rung, ...]:
        """The rungs from that of the best offer on; of equal ones the first."""
        if not offers or not rungs:
            return rungs
        worth = {offer.tier: self._worth(offer) for offer in offers}
        best = max(worth, key=lambda tier: worth[tier])
        self.preferred = best, worth[best]
        first = next((place for place, rung in enumerate(rungs) if rung.tier == best), len(rungs))
        for rung in rungs[:first]:
            self.skipped[rung.tier] = Skipped(rung.tier, worth.get(rung.tier), worth[best])
        return rungs[first:]

    def _worth(self, offer: Offer) -> float:
        belief = confidence_in(offer.belief, self.answers)
        return -inf if belief is None else belief - offer.price * self.relative_cost

    def reaches(self, rung: Rung) -> bool:
        """Whether the call of a rung is to be made."""
        if any(tier == rung.tier for tier, _, _ in self.calls):
            return False
        if rung.after is not None and set(rung.after) != self.answers.tiers:
            return False
        if rung.belief is None:
            return True
        needed = rung.needed(rung.level, self.relative_cost)
        belief = confidence_in(rung.belief, self.answers)
        if belief is not None and belief >= needed:
            return True
        self.skipped[rung.tier] = Skipped(rung.tier, belief, needed)
        return False

    def judge(self, rung: Rung) -> str | None:
        """The tier whose answer is to be returned, or None."""
        if rung.threshold is None:
            return rung.tier
        needed = rung.needed(rung.threshold, self.relative_cost)
        best, highest = None, -1.0
        for confidence in rung.confidences:
            if confidence.tier not in self.answers.tiers:
                # what was predicted of it is known, and there is no answer to return
                continue
            self.asked.add(confidence.tier)
            value = confidence_in(confidence, self.answers)
            if value is None:
                continue
            self.confidence[confidence.tier] = value
            self.threshold[confidence.tier] = needed
            if value > highest:
                best, highest = confidence.tier, value
        return best if highest >= needed else None

    def acceptance(self, tier: str, rung: Rung) -> str:
        if rung.threshold is None:
            if self.preferred is None:
                return f"{tier}: every answer is accepted for this task"
            best, worth = self.preferred
            chosen = f"{best}: of most worth before any call, {worth:.4f} by belief less price"
            return chosen if best == tier else f"{tier}: next to {chosen}"
        return f"{tier}: confidence {self.confidence[tier]:.4f} reaches {self.threshold[tier]:.4f}"

    def rejection(self) -> str:
        if not self.calls:
            return "no cheaper tier was expected to be worth its call"
        mute = self.asked - set(self.confidence)
        came = {tier: completion for tier, completion, _ in self.calls if completion is not None}
        without = [tier for tier in came if tier in mute]
        lacking = f"; {', '.join(without)} came without the evidence its confidence needs" if without else ""
        invalid = [tier for tier, completion in came.items() if not completion.valid]
        failed = [tier for tier, completion, _ in self.calls if completion is None]
        told = (("not valid", invalid), ("failed", failed))
        faults = "".join(f"; {what}: {', '.join(tiers)}" for what, tiers in told if tiers)
        return f"no cheaper answer was accepted{lacking}{faults}"

    def failed(self, error: TierError, tier: str) -> TierError:
        reasons = "; ".join(f"{name}: {why or 'answer rejected'}" for name, _, why in self.calls)
        ended = TierError(f"no tier answered ({reasons})", tier, self.attempts())
        ended.begun = error.begun
        return ended

    def attempts(self, accepted: str | None = None) -> tuple[Attempt, ...]:
        return tuple(
            Attempt(tier, tier == accepted, self.confidence.get(tier), self.threshold.get(tier), completion, error)
            for tier, completion, error in self.calls
        )

    def answer(self, task: str | None, tier: str, reason: str) -> Answer:
        text = next(completion.text for name, completion, _ in self.calls if name == tier and completion is not None)
        called = {name for name, _, _ in self.calls}
        skipped = tuple(skipped for name, skipped in self.skipped.items() if name not in called)
        return Answer(
            text, tier, Trace(self.query, task, self.attempts(tier), reason, skipped, self.answers.difficulty)
        )


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


def _final(policy: Policy, task: str | None, rung: Rung) -> Final | None:
    """Of a rung that accepts every answer: those that the certificate speaks of."""
    if rung.threshold is not None:
        return None
    return Final(policy.models.get(rung.tier, ()), policy.prompts.get(task or "", ()), valid=True)


def _objection(policy: Policy, task: str | None, tier: str, completion: Completion) -> str | None:
    """Why an answer is outside of what was certified."""
    prompts = policy.prompts.get(task or "", ())
    if (other := _other_model(policy, tier, completion)) is not None:
        return other
    if prompts and completion.prompt is not None and completion.prompt not in prompts:
        return (
            f"the certificate is void: prompt, form or options of this call of task {task!r} are not those it was "
            "certified with"
        )
    return None


def _other_model(policy: Policy, tier: str, completion: Completion) -> str | None:
    models = policy.models.get(tier, ())
    if models and completion.model not in models:
        return f"the certificate is void: {tier} answered as {completion.model!r}, certified was {', '.join(models)}"
    return None
