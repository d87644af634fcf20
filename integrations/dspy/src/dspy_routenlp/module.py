"""`RouterModule`: a program that runs on the cheapest language model whose prediction its release accepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self

import dspy

from routenlp_plugins import (
    Answer,
    Auditable,
    Auditor,
    Dispatcher,
    PortfolioError,
    Query,
    Release,
    Trace,
    WrappingTier,
    own_errors,
)

from .messages import TASK, context_task
from .programs import OPTIONS, ProgramCall, ProgramTier, Reading, Result
from .saving import Routing
from .telling import tell, telling

__all__ = ["RouterModule", "decision_of"]

_STATE = "routenlp"


class RouterModule(Auditable, dspy.Module):  # type: ignore[misc]
    """Runs a student program on the cheapest tier whose prediction its release accepts.

    Any program will do: it is run whole, under ``dspy.context(lm=tier)``, so that a predictor with an LM of its own
    keeps that. Rejected attempts reach neither DSPy's trace, from which optimisers learn, nor streams. The decision is
    `decision_of` the prediction. In audits the inputs are ``query.payload.inputs``, a tier's prediction is
    ``completion.payload.prediction``; they run under the settings of the run that is audited, and nobody hears of them.

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

    _dispatcher: Dispatcher

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
        self.auditor: Auditor | None = None
        students = dict(student) if isinstance(student, Mapping) else dict.fromkeys(tiers, student)
        unknown = [name for name in students if name not in tiers]
        if unknown:
            raise PortfolioError(f"student: {', '.join(unknown)} is no tier; tiers: {', '.join(tiers)}")
        for name in tiers:
            if not isinstance(students.get(name), dspy.Module):
                given = type(students.get(name)).__name__
                raise PortfolioError(f"student: tier {name} needs a dspy.Module, got {given}")
        self.students = students
        self.routing = Routing(self)

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
        with own_errors(_any), telling():
            return self._accepted(tell(self._answering.run(self._query(inputs))))

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """As `forward`, without blocking the event loop."""
        with own_errors(_any), telling():
            return self._accepted(tell(await self._answering.arun(self._query(inputs))))

    def routed(self, release: Release | str | Path, students: Mapping[str, dspy.Module] | None = None) -> Self:
        """The same over another release, and other programs."""
        other = copy(self)
        other.take(Release.given(release), dict(students or self.students))
        return other

    def take(self, release: Release, students: dict[str, dspy.Module]) -> None:
        """Go on with another release and other programs.

        Raises:
            PortfolioError: a tier is missing or unknown.
        """
        own = self._dispatcher
        self._dispatcher = Dispatcher(release, own.tiers, own.comparators, own.listeners)
        self.students = students

    def get_lm(self) -> dspy.BaseLM:
        """The frontier's; there are several."""
        return WrappingTier.innermost(self._tiers[self.release.portfolio.frontier])

    def set_lm(self, lm: dspy.BaseLM) -> None:
        """Sample as this one does, as DSPy's own modules ask for copies of `get_lm`: its temperature and rollout are
        those of all tiers from now on, which the certificate does not speak of, nor an audit.

        Raises:
            PortfolioError: it is none of the tiers' models: their LMs are given to the constructor.
        """
        if lm.model not in {WrappingTier.innermost(tier).model for tier in self._tiers.values()}:
            raise PortfolioError(
                f"set_lm: {lm.model} is no tier's; the language models of a RouterModule are its tiers, "
                "RouterModule(student, tiers, release)"
            )
        self.auditor = None
        drawn = {name: lm.kwargs[name] for name in ("temperature", "rollout_id") if lm.kwargs.get(name) is not None}
        self._tiers = {name: _drawn(tier, drawn) for name, tier in self._tiers.items()}
        own, used = self._dispatcher, {name: ProgramTier.of(name, tier) for name, tier in self._tiers.items()}
        self._dispatcher = Dispatcher(own.release, used, own.comparators, own.listeners)

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """The programs of the tiers and the release; LMs are given again to the module that loads it."""
        return {_STATE: self.routing.dump_state(json_mode=json_mode)}

    def load_state(self, state: Mapping[str, Any], *, allow_unsafe_lm_state: bool = False) -> None:
        """Take over programs and release of a state; the module must have the same tiers.

        Raises:
            ReleaseError: the release was edited.
            PortfolioError: the state is another module's, or tiers are missing or unknown.
        """
        if _STATE not in state:
            raise PortfolioError("the state is not that of a RouterModule: load it into the program it was saved from")
        self.routing.load_state(state[_STATE], allow_unsafe_lm_state=allow_unsafe_lm_state)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Programs are copied; tiers and release are shared: connections and local models cannot be copied."""
        other, memo = copy(self), {} if memo is None else memo
        memo[id(self)] = other
        for student in self.students.values():
            if id(student) not in memo:
                memo[id(student)] = student.deepcopy()
        other.students = {name: memo[id(student)] for name, student in self.students.items()}
        return other

    def __copy__(self) -> Self:
        """With the same programs, but a history of its own."""
        other: Self = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.routing = Routing(other)
        other.history, other.callbacks = [], [*self.callbacks]
        return other

    def _query(self, inputs: dict[str, Any]) -> Query:
        given = dict(inputs)
        task = given.pop(TASK, context_task(self._reading.task))
        if "lm" in given:
            raise PortfolioError("lm: the language models of a RouterModule are its tiers; leave lm out of its inputs")
        asked = ProgramCall(self.students, given, self._reading, dspy.settings.copy())
        words = self._reading.query({name: value for name, value in given.items() if name not in OPTIONS})
        return Query(words, task=task, requires=_requires(given), payload=asked)

    def _accepted(self, answer: Answer) -> dspy.Prediction:
        result: Result = answer.payload
        outer, most = dspy.settings.trace, dspy.settings.max_trace_size
        if outer is not None and most > 0:
            outer.extend(result.trace)
            del outer[:-most]
        result.prediction._routenlp = answer.trace
        return result.prediction


_MEDIA = {dspy.Image: "image", dspy.Audio: "audio", dspy.Tool: "tools"}


def _any(*_: Any) -> bool:
    """A program raises whatever it raises without us."""
    return True


def _requires(inputs: Mapping[str, Any]) -> frozenset[str]:
    """What inputs ask of a model beyond text."""
    several = [one for value in inputs.values() for one in (value if isinstance(value, list | tuple) else (value,))]
    return frozenset(name for kind, name in _MEDIA.items() if any(isinstance(one, kind) for one in several))


def _drawn(tier: Any, options: Mapping[str, Any]) -> Any:
    return tier.around(_drawn(tier.tier, options)) if isinstance(tier, WrappingTier) else tier.copy(**options)


def decision_of(prediction: dspy.Prediction) -> Trace | None:
    """How a `RouterModule` came to a prediction: tiers, costs, reasons; None of any other prediction."""
    trace: Trace | None = getattr(prediction, "_routenlp", None) if "_routenlp" in vars(prediction) else None
    return trace
