"""`RouterModule`: a program that runs on the cheapest language model whose prediction its release accepts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path
from typing import Any, Self

import dspy

from routenlp_plugins import Answer, Dispatcher, PortfolioError, Query, Release, TierError, Trace, WrappingTier

from .messages import TASK, context_task
from .programs import ProgramCall, ProgramTier, Reading, Result
from .saving import release_from_state, release_state
from .telling import tell, telling

__all__ = ["RouterModule", "decision_of"]

_STATE = "routenlp"


class RouterModule(dspy.Module):  # type: ignore[misc]
    """Runs a student program on the cheapest tier whose prediction its release accepts.

    Any program will do: it is run whole, under ``dspy.context(lm=tier)``, so that a predictor with an LM of its own
    keeps that. Rejected attempts reach neither DSPy's trace, from which optimisers learn, nor streams. The decision is
    `decision_of` the prediction.

    Args:
        student: the program, or name of a tier -> a program of its own, as `RouterOptimizer` makes them. It is shared
            by the tiers, and what an optimiser makes of it is.
        tiers: name -> `dspy.LM`, or a `ScoredTier` or the like around one.
        release: a release, or the folder it was saved in; ``Release.frontier_only(portfolio)`` to begin with.
        reading: what the query and the answer are, and the task.
        comparators, listeners: see `routenlp_plugins.Dispatcher`.

    Raises:
        PortfolioError: a tier is missing, unknown or no LM, or the release does not know the task.
        ReleaseError: the release cannot be used.
    """

    def __init__(
        self,
        student: dspy.Module | Mapping[str, dspy.Module],
        tiers: Mapping[str, Any],
        release: Release | str | Path,
        reading: Reading | None = None,
        comparators: Mapping[str, Any] | None = None,
        listeners: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self._reading = reading or Reading()
        self._tiers = dict(tiers)
        used = {name: ProgramTier.of(name, tier) for name, tier in tiers.items()}
        self._dispatcher = Dispatcher(release, used, comparators, tuple(listeners))
        self._dispatcher.release.check_task(self._reading.task)
        students = dict(student) if isinstance(student, Mapping) else dict.fromkeys(tiers, student)
        for name in tiers:
            if not isinstance(students.get(name), dspy.Module):
                raise PortfolioError(
                    f"student: tier {name} needs a dspy.Module, got {type(students.get(name)).__name__}"
                )
        self.students = students

    @property
    def release(self) -> Release:
        """What decides."""
        return self._dispatcher.release

    @property
    def tiers(self) -> dict[str, Any]:
        """Name -> what it was given as."""
        return dict(self._tiers)

    @property
    def reading(self) -> Reading:
        """How the program is read."""
        return self._reading

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """The accepted prediction."""
        with self._own_errors(), telling():
            return self._accepted(tell(self._dispatcher.run(self._query(inputs))))

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """As `forward`, without blocking the event loop."""
        with self._own_errors(), telling():
            return self._accepted(tell(await self._dispatcher.arun(self._query(inputs))))

    def routed(self, release: Release | str | Path, students: Mapping[str, dspy.Module] | None = None) -> RouterModule:
        """The same over another release, and other programs."""
        own = self._dispatcher
        return RouterModule(
            students or self.students, self._tiers, release, self._reading, own.comparators, own.listeners
        )

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The programs of the tiers and the release; LMs are given again to the module that loads it."""
        shared = len({id(student) for student in self.students.values()}) == 1
        own = {"release": release_state(self.release), "shared": shared}
        state: dict[str, Any] = super().dump_state(json_mode=json_mode)
        return {**state, _STATE: own}

    def load_state(self, state: Mapping[str, Any], *, allow_unsafe_lm_state: bool = False) -> None:
        """Take over programs and release of a state; the module must have the tiers that the release calls.

        Raises:
            ReleaseError: the release was edited.
            PortfolioError: a tier is missing or unknown.
        """
        if _STATE not in state:
            raise PortfolioError("the state is not that of a RouterModule: load it into the program it was saved from")
        own = state[_STATE]
        students = self.students
        if not own["shared"]:
            students = {name: deepcopy(student) for name, student in students.items()}
        new = self.routed(release_from_state(own["release"]), students)
        super(RouterModule, new).load_state(state, allow_unsafe_lm_state=allow_unsafe_lm_state)
        self.students, self._dispatcher = new.students, new._dispatcher

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Programs are copied; tiers and release are shared: connections and local models cannot be copied."""
        other = copy(self)
        other.students = deepcopy(self.students, memo)
        other.history, other.callbacks = [], [*self.callbacks]
        return other

    def _query(self, inputs: dict[str, Any]) -> Query:
        given = dict(inputs)
        task = given.pop(TASK, context_task(self._reading.task))
        asked = ProgramCall(self.students, given, self._reading)
        return Query(self._reading.query(given), task=task, payload=asked)

    def _accepted(self, answer: Answer) -> dspy.Prediction:
        result: Result = answer.payload
        outer, most = dspy.settings.trace, dspy.settings.max_trace_size
        if outer is not None and most > 0:
            outer.extend(result.trace)
            del outer[:-most]
        result.prediction._routenlp = answer.trace
        return result.prediction

    @contextmanager
    def _own_errors(self) -> Iterator[None]:
        """A failing program raises what it raises without us, so that callers still know it."""
        try:
            yield
        except TierError as error:
            own = error.__cause__.__cause__ if error.__cause__ else None
            if own is None or isinstance(self._dispatcher.tiers[error.tier], WrappingTier):
                raise
            own.add_note(f"routenlp: {error}")
            raise own from own.__cause__


def decision_of(prediction: dspy.Prediction) -> Trace | None:
    """How a `RouterModule` came to a prediction: tiers, costs, reasons; None of any other prediction."""
    trace: Trace | None = getattr(prediction, "_routenlp", None) if "_routenlp" in vars(prediction) else None
    return trace
