"""The decision of a release about a query, without any call: what is decided before it, and the flow that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .comparing import Comparator, comparator
from .errors import DataError, TierError
from .flow import Flow, plan, route
from .release import Release
from .sessions import reason_to_stay
from .tiers.boundary import boundary, received
from .types import Answer, Call, Completion, Query

__all__ = ["ConformalCascade"]


@dataclass(frozen=True, slots=True)
class Before:
    """What is decided about a query before any call of it.

    Attributes:
        difficulty: tier -> P(good enough) as the router predicts it; None where nothing is decided by it.
        stay: why the frontier answers without a climb; None if the policy decides.
    """

    difficulty: Mapping[str, float] | None
    stay: str | None = None


class ConformalCascade:
    """Whether to return an answer that is there or to call a dearer tier, for code that makes its calls itself.

    Holds no state of any query. The calls of one query may be made by different processes, on different days: what was
    answered so far is handed in each time.

    Args:
        release: what decides, or the folder it was saved in.
        comparators: your own, by the names that tasks of the portfolio give them.

    Raises:
        DataError: the policy needs a comparator that is not supplied.
        ReleaseError: the release's router needs an encoder that is not supplied.
    """

    def __init__(self, release: Release | str | Path, comparators: Mapping[str, Comparator] | None = None) -> None:
        self.release = Release.given(release).checked()
        self.comparators = comparators
        policy = self.release.policy
        for task, rungs in policy.ladders.items():
            if rungs:
                comparator(policy.comparators.get(task, "text"), comparators)
        if policy.router is not None and self.release.router is not None:
            self.release.router.usable()

    def before(self, query: Query | str) -> Before:
        """What is decided before any call. It says why if the router failed, and raises nothing."""
        asked = Query.given(query)
        stay = reason_to_stay(self.release, asked)
        if stay is not None or self.release.router is None or not plan(self.release.policy, asked)[1]:
            return Before(None, stay)
        try:
            with boundary("router"):
                (difficulty,) = self.release.difficulty([asked])
        except TierError as error:
            return Before(None, f"the router failed ({error})")
        return Before(difficulty)

    def step(
        self,
        query: Query | str,
        answers: Mapping[str, Completion | Exception] | None = None,
        before: Before | None = None,
    ) -> Call | Answer:
        """The call that is to be made next, or the answer.

        Args:
            answers: what each tier called so far said, or the exception that it failed with.
            before: what `before` found for the query. Left out, it is found again at each step, and a router that fails
                at one of them and not at another changes what is to be called.

        Raises:
            TierError: the frontier failed; carries all attempts.
            DataError: an answer of a tier that this query was never put to.
        """
        given = dict(answers or {})
        flow = self.flow(Query.given(query), before)
        try:
            call = next(flow)
            while call.tier in given:
                try:
                    answer = received(self.release.portfolio.tier(call.tier), call, given.pop(call.tier))
                except TierError as error:
                    call = flow.throw(error)
                else:
                    call = flow.send(answer)
        except StopIteration as stop:
            found: Answer = stop.value
            _refuse(given, f"{found.tier} was accepted")
            return found
        _refuse(given, f"{call.tier} is to be called next")
        return call

    def flow(self, query: Query, before: Before | None = None) -> Flow:
        """The generator that asks for the calls of a query, and returns its answer."""
        known = self.before(query) if before is None else before
        return route(self.release.policy, query, self.comparators, known.difficulty, known.stay)


def _refuse(unasked: Mapping[str, object], instead: str) -> None:
    if unasked:
        raise DataError(
            f"answers: {', '.join(unasked)} was not asked for, with the other answers {instead}; if the router failed "
            "since, keep what was predicted: step(query, answers, before=cascade.before(query))"
        )
