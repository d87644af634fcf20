"""`RouterOptimizer`: prompts for each tier, then a release that is certified for a metric."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import dspy
from dspy.teleprompt import Teleprompter

from routenlp_plugins import (
    Call,
    Completion,
    DataError,
    FitOptions,
    Portfolio,
    PortfolioError,
    Query,
    Reference,
    Release,
    RiskNotControlledError,
    WrappingTier,
    collect,
    fit,
)

from .module import RouterModule
from .programs import ProgramCall, ProgramTier, Result
from .prompts import code_of, digest_of, prompt_of

__all__ = ["RouterOptimizer", "Searched"]

logger = logging.getLogger(__name__)

DspyMetric = Callable[..., Any]
Prompts: TypeAlias = Teleprompter | Mapping[str, Teleprompter | None] | None


@dataclass(frozen=True, slots=True)
class Promise:
    """What is certified.

    Attributes:
        retention: of the frontier's metric, that the routed program keeps at least.
        delta: probability over the calibration examples that the promise fails.
        options: further ones of `routenlp_plugins.fit`.
    """

    retention: float
    delta: float
    options: FitOptions | None = None


@dataclass(frozen=True, slots=True)
class Searched:
    """How the prompt of a tier was chosen: means of the metric on the same examples, that no prompt had seen.

    Attributes:
        plain: of the program as it was.
        optimised: of the optimised one.
    """

    plain: float
    optimised: float

    @property
    def better(self) -> bool:
        """Whether the optimised one is used; where they are equal the shorter prompt is."""
        return self.optimised > self.plain


class RouterOptimizer(Teleprompter):  # type: ignore[misc]
    """Makes a certified `RouterModule` of one: optimises the prompts of each tier, then calibrates over the tiers.

    Prompts are optimised on a part of `trainset` and compared with the plain ones on the rest, so that no tier gets a
    worse one; the frontier is the teacher. On `valset`, of which nothing was seen so far, every tier is run, and
    `routenlp_plugins.fit` searches the cheapest policy whose metric is shown to be at least `retention` of the
    frontier's own. If there is none, the frontier answers everything, and a warning says how many examples would do.

    Args:
        metric: as for any optimiser of DSPy; what it returns must be in [0, 1] as a float.
        retention: of the frontier's metric.
        delta: probability that the promise fails, over the examples of `valset`.
        prompts: an optimiser for the prompts of all tiers, or name of a tier -> one or None; None leaves all as they
            are. `dspy.BootstrapFewShot` is a good one to begin with.
        options: further ones of `routenlp_plugins.fit`.
        outcomes: file that keeps what the tiers said to `valset`: a run that was stopped goes on from there.

    Attributes:
        searched: tier -> how its prompt was chosen, after `compile`.
    """

    def __init__(
        self,
        metric: DspyMetric,
        retention: float = 0.97,
        delta: float = 0.1,
        prompts: Prompts = None,
        options: FitOptions | None = None,
        outcomes: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.metric = metric
        self.promise = Promise(retention, delta, options)
        self.prompts = prompts
        self.outcomes = outcomes
        self.searched: dict[str, Searched] = {}

    def compile(
        self,
        student: RouterModule,
        *,
        trainset: Sequence[dspy.Example] = (),
        valset: Sequence[dspy.Example],
        teacher: dspy.Module | None = None,
        **_: Any,
    ) -> RouterModule:
        """The certified module; `student` stays as it is.

        Args:
            student: with the tiers and a release that names their prices, such as ``Release.frontier_only(portfolio)``.
            trainset: for prompts; may be empty if there are none to optimise.
            valset: for the certificate; it must not have been used for anything else.
            teacher: of the tiers, if it is not the frontier's own program.

        Raises:
            DataError: there is nothing to calibrate on, or an example is in both sets.
            PortfolioError: the student is no `RouterModule`, or `prompts` names an unknown tier.
        """
        if not isinstance(student, RouterModule):
            raise PortfolioError(
                "compile takes a RouterModule: RouterModule(program, tiers, Release.frontier_only(portfolio))"
            )
        _check_apart(trainset, valset)
        students = self._students(student, list(trainset), teacher)
        release = self._certified(student.routed(student.release, students), list(valset))
        compiled = student.routed(release, students)
        compiled._compiled = True
        return compiled

    def _students(
        self, module: RouterModule, trainset: list[dspy.Example], teacher: dspy.Module | None
    ) -> dict[str, dspy.Module]:
        """A program for each tier."""
        optimisers = _by_tier(self.prompts, module)
        self.searched = {}
        if not optimisers:
            return dict(module.students)
        if len(trainset) < 4:
            raise DataError(f"trainset: {len(trainset)} examples; prompts are optimised on a half, compared on another")
        half = len(trainset) // 2
        learn, compare = trainset[:half], trainset[half:]
        frontier = module.release.portfolio.frontier
        lead = teacher or module.students[frontier].deepcopy()
        if any(predictor.lm is None for predictor in lead.predictors()):
            lead = lead.deepcopy()
            for predictor in lead.predictors():
                predictor.lm = predictor.lm or WrappingTier.innermost(module.tiers[frontier])
        found = {}
        for name, plain in module.students.items():
            found[name] = plain.deepcopy()
            if name not in optimisers:
                continue
            with dspy.context(lm=WrappingTier.innermost(module.tiers[name])):
                made = _compiled(optimisers[name], plain.deepcopy(), lead, learn)
                self.searched[name] = Searched(self._mean(plain, compare), self._mean(made, compare))
            if self.searched[name].better:
                # a compiled part is frozen in DSPy, and left out when the whole is saved
                made._compiled = False
                found[name] = made
        return found

    def _mean(self, program: dspy.Module, examples: list[dspy.Example]) -> float:
        score = dspy.Evaluate(devset=examples, metric=self.metric, display_progress=False, provide_traceback=False)
        return float(score(program).score) / 100

    def _certified(self, module: RouterModule, valset: list[dspy.Example]) -> Release:
        release = module.release
        portfolio = release.portfolio
        examples = _Examples(module, valset, self.metric, portfolio)
        with TemporaryDirectory() as scratch:
            file = Path(scratch) / "outcomes.jsonl" if self.outcomes is None else Path(self.outcomes)
            workers = int(dspy.settings.num_threads or 1)
            collect(
                examples.references,
                {name: examples.tier(name) for name in module.tiers},
                file,
                portfolio=portfolio,
                judge=examples.judged,
                workers=workers,
            )
            promise = self.promise
            try:
                return fit(file, portfolio, retention=promise.retention, delta=promise.delta, options=promise.options)
            except RiskNotControlledError as error:
                # a program that works is worth more to its caller than none: it is the frontier's
                logger.warning("the frontier answers everything: %s", error)
                return error.release


@dataclass(slots=True)
class _Examples:
    """Examples as queries with references, and what judges answers to them."""

    module: RouterModule
    examples: list[dspy.Example]
    metric: DspyMetric
    portfolio: Portfolio
    _of: dict[str, dspy.Example] = field(init=False)
    _context: Context = field(default_factory=copy_context, init=False)
    _settings: Mapping[str, Any] = field(default_factory=dspy.settings.copy, init=False)

    def __post_init__(self) -> None:
        # what was kept of another program, metric or model is not asked for again
        told = [
            prompt_of(student, WrappingTier.innermost(self.module.tiers[name]))
            for name, student in self.module.students.items()
        ]
        told += [code_of(self.metric), *(code_of(student) for student in self.module.students.values())]
        told += [f"{name} {WrappingTier.innermost(tier).model}" for name, tier in self.module.tiers.items()]
        made = digest_of(told)
        self._of = {
            f"{place}-{digest_of([made, dict(example.items())])}": example
            for place, example in enumerate(self.examples)
        }

    @property
    def references(self) -> list[Reference]:
        reading = self.module.reading
        task = reading.task or _only_task(self.portfolio)
        return [Reference(Query(reading.query(_inputs(one)), task, name), "") for name, one in self._of.items()]

    def tier(self, name: str) -> Callable[[Call], Completion]:
        """A tier that knows the inputs of an example by its id."""
        own = ProgramTier.of(name, self.module.tiers[name])

        def run(call: Call) -> Completion:
            inputs = _inputs(self._of[call.query.id or ""])
            asked = ProgramCall(self.module.students, inputs, self.module.reading, self._settings)
            query = Query(call.query.text, call.query.task, call.query.id, payload=asked)
            # DSPy's settings are those of the thread that compiles
            made: Completion = self._context.copy().run(own, Call(call.tier, query))
            return made

        return run

    def judged(self, reference: Reference, completion: Completion) -> float | None:
        """What the metric says; nothing is as bad as no prediction."""
        result = completion.payload
        if not isinstance(result, Result):
            return 0.0
        given = self._of[reference.query.id or ""], result.prediction
        said = self._context.copy().run(self.metric, *given, *[None] * _beyond_two(self.metric))
        return None if said is None else float(said)


def _inputs(example: dspy.Example) -> dict[str, Any]:
    return dict(example.inputs().items())


def _beyond_two(metric: DspyMetric) -> int:
    """Arguments that a metric needs beside example and prediction, such as a trace."""
    try:
        parameters = inspect.signature(metric).parameters.values()
    except ValueError:
        return 0
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]
    return max(len(needed) - 2, 0)


def _only_task(portfolio: Portfolio) -> str:
    if len(portfolio.tasks) != 1:
        raise PortfolioError("the portfolio has several tasks: name the one of the program, Reading(task=...)")
    return portfolio.tasks[0].name


def _by_tier(prompts: Prompts, module: RouterModule) -> dict[str, Teleprompter]:
    if isinstance(prompts, Mapping):
        unknown = [name for name in prompts if name not in module.tiers]
        if unknown:
            raise PortfolioError(f"prompts: {', '.join(unknown)} is no tier; tiers: {', '.join(module.tiers)}")
        return {name: one for name, one in prompts.items() if one is not None}
    return {} if prompts is None else dict.fromkeys(module.tiers, prompts)


def _compiled(
    optimiser: Teleprompter, student: dspy.Module, teacher: dspy.Module, trainset: list[dspy.Example]
) -> dspy.Module:
    takes = inspect.signature(optimiser.compile).parameters
    if "trainset" not in takes:
        raise PortfolioError(f"prompts: {type(optimiser).__name__} compiles without a trainset; compile with it before")
    # GEPA names a teacher and refuses one
    more = {"teacher": teacher} if "teacher" in takes and not isinstance(optimiser, dspy.GEPA) else {}
    made: dspy.Module = optimiser.compile(student, trainset=trainset, **more)
    return made


def _check_apart(trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example]) -> None:
    if not valset:
        raise DataError("valset: empty; the certificate needs examples that prompts have not seen")
    seen = {repr(sorted(example.inputs().items())) for example in trainset}
    both = sum(repr(sorted(example.inputs().items())) in seen for example in valset)
    if both:
        raise DataError(f"valset: {both} of its examples are in trainset too; a certificate on them would be void")
