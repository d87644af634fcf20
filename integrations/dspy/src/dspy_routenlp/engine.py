"""`RouterEngine`: an engine of DSPy that is several models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing, closing
from pathlib import Path
from typing import Any, Self

import dspy
from dspy.lm15 import (
    LM15Error,
    Request,
    Response,
    StreamDeltaEvent,
    StreamEndEvent,
    StreamStartEvent,
    TextDelta,
    response_to_events,
)

from routenlp_plugins import (
    Answer,
    Auditable,
    Auditor,
    Delta,
    Dispatcher,
    PortfolioError,
    Query,
    Release,
    WrappingTier,
    own_errors,
)

from .messages import query_of, response_of
from .saving import release_from_state, release_state
from .telling import tell, telling
from .tiers import LMTier

__all__ = ["AsyncRouterEngine", "RouterEngine"]


class RouterEngine(Auditable):
    """Answers each request with the cheapest tier its release accepts.

    ``RouterEngine(tiers, release).lm()`` takes the place of a `dspy.LM`. The decision is in
    ``provider_data["routenlp"]`` of each response, where DSPy's history has it too; usage is that of all attempts.
    Streams come word by word where nothing can reject the answer any more, and else in one piece: see
    `routenlp_plugins.Dispatcher.stream`.

    Args:
        tiers: name -> `dspy.LM`, a `ScoredTier` or the like around one, or any core tier ``Call -> Completion``.
        release: a release, or the folder it was saved in.
        task: of every call; that of ``dspy.context(routenlp_task=...)`` goes first, and ``routenlp_task`` among the
            extensions of a `dspy.lm15.Request`. May be left out if the release knows one task only.
        comparators, listeners: see `routenlp_plugins.Dispatcher`.
        demonstrations: whether earlier turns of a request are part of its prompt, so that other ones void the
            certificate. Of programs that are given a `dspy.History` say False.

    Raises:
        PortfolioError: a tier is missing or unknown, or the release does not know the task.
        ReleaseError: the release cannot be used.
    """

    _dispatcher: Dispatcher

    def __init__(
        self,
        tiers: Mapping[str, Any],
        release: Release | str | Path,
        task: str | None = None,
        comparators: Mapping[str, Any] | None = None,
        listeners: Sequence[Any] = (),
        demonstrations: bool = True,
    ) -> None:
        self.release = Release.given(release)
        self.task = task
        self.demonstrations = demonstrations
        used = {name: LMTier.of(name, tier) for name, tier in tiers.items()}
        self._dispatcher = Dispatcher(self.release, used, comparators, tuple(listeners))
        self.auditor: Auditor | None = None
        self.release.check_task(task)

    def lm(self, **options: Any) -> dspy.LM:
        """The engine as a language model.

        DSPy caches and retries around an engine. Neither is wanted by default: a cached answer would hide what the
        router does, and the tiers retry by themselves. With ``cache=True`` answers are cached for this release only.

        Args:
            options: of `dspy.LM`.

        Raises:
            PortfolioError: it is to have a cache and is audited: an answer would outlive its certificate.
        """
        if self.auditor is not None and options.get("cache"):
            raise PortfolioError("lm: an engine that is audited has no cache, which would outlive its certificate")
        own = {"cache": False, "num_retries": 0, **options}
        model = f"routenlp/{self.release.digest[:16]}"
        return dspy.LM(model, engine=self, async_engine=AsyncRouterEngine(self), **own)

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Itself: DSPy copies programs with all they have, and connections and local models cannot be copied."""
        return self

    # what DSPy asks of an engine

    def complete(self, request: Request) -> Response:
        """The accepted answer."""
        with _own_errors(), telling():
            return response_of(tell(self._answering.run(self.query(request))))

    def stream(self, request: Request) -> Iterator[Any]:
        """The accepted answer as events, of which none is of a rejected one."""
        events = _Events()
        with _own_errors(), telling(), closing(self._answering.stream(self.query(request))) as pieces:
            for piece in pieces:
                yield from events.of(piece)

    def close(self) -> None:
        """Nothing: the tiers are the caller's."""

    @property
    def supports_function_calling(self) -> bool:
        """Whether every tier does."""
        return self._all("supports_function_calling")

    @property
    def supports_reasoning(self) -> bool:
        """Whether every tier does."""
        return self._all("supports_reasoning")

    @property
    def supports_response_schema(self) -> bool:
        """Whether every tier does."""
        return self._all("supports_response_schema")

    @property
    def supported_params(self) -> frozenset[str]:
        """What every tier takes."""
        every = [frozenset(lm.supported_params) for lm in self._lms]
        return frozenset.intersection(*every) if every else frozenset()

    def dump_state(self) -> dict[str, Any]:
        """What `load_state` reads; without keys of providers, as DSPy saves language models.

        Raises:
            TypeError: a tier is no `dspy.LM`, or there are comparators: save the program without this LM, and set it
                again after loading.
        """
        own = {name: tier for name, tier in self._dispatcher.tiers.items() if isinstance(tier, LMTier)}
        foreign = [name for name in self._dispatcher.tiers if name not in own]
        if foreign or self._dispatcher.comparators:
            what = f"tier {foreign[0]!r}, which is no dspy.LM," if foreign else "its comparators"
            raise TypeError(f"RouterEngine cannot be saved: {what} would be lost; set the LM again after loading")
        return {
            "tiers": {name: tier.lm.dump_state() for name, tier in own.items()},
            "release": release_state(self.release),
            "task": self.task,
            "demonstrations": self.demonstrations,
        }

    @classmethod
    def load_state(cls, state: Mapping[str, Any]) -> RouterEngine:
        """The engine of a state; keys of providers come from the environment, as for any saved LM."""
        tiers = {name: dspy.BaseLM.load_state(of, allow_custom_lm_class=True) for name, of in state["tiers"].items()}
        release = release_from_state(state["release"])
        return cls(tiers, release, state["task"], demonstrations=state["demonstrations"])

    def query(self, request: Request) -> Query:
        """What is asked of the core."""
        return query_of(request, self.task, demonstrations=self.demonstrations)

    @property
    def _lms(self) -> list[dspy.LM]:
        inner = [WrappingTier.innermost(tier) for tier in self._dispatcher.tiers.values()]
        return [tier.lm for tier in inner if isinstance(tier, LMTier)]

    def _all(self, name: str) -> bool:
        return bool(self._lms) and all(getattr(lm, name) for lm in self._lms)


class AsyncRouterEngine:
    """As `RouterEngine`, without blocking the event loop."""

    def __init__(self, engine: RouterEngine) -> None:
        self.engine = engine

    async def complete(self, request: Request) -> Response:
        """The accepted answer."""
        with _own_errors(), telling():
            return response_of(tell(await self.engine._answering.arun(self.engine.query(request))))

    async def stream(self, request: Request) -> AsyncIterator[Any]:
        """The accepted answer as events, of which none is of a rejected one."""
        events = _Events()
        with _own_errors(), telling():
            async with aclosing(self.engine._answering.astream(self.engine.query(request))) as pieces:
                async for piece in pieces:
                    for event in events.of(piece):
                        yield event

    async def aclose(self) -> None:
        """Nothing: the tiers are the caller's."""

    def dump_state(self) -> dict[str, Any]:
        """As `RouterEngine.dump_state`."""
        return self.engine.dump_state()

    @classmethod
    def load_state(cls, state: Mapping[str, Any]) -> AsyncRouterEngine:
        """As `RouterEngine.load_state`."""
        return cls(RouterEngine.load_state(state))


class _Events:
    """What a stream of the core is to DSPy."""

    def __init__(self) -> None:
        self._begun = False

    def of(self, piece: Delta | Answer) -> Iterator[Any]:
        if isinstance(piece, Answer):
            yield from self._rest(response_of(tell(piece)))
        elif not isinstance(piece.payload, Response) and piece.text:
            if not self._begun:
                self._begun = True
                yield StreamStartEvent(model=piece.model)
            yield StreamDeltaEvent(delta=TextDelta(text=piece.text))

    def _rest(self, response: Response) -> Iterator[Any]:
        """What has not been said yet."""
        if not self._begun:
            yield from response_to_events(response)
        else:
            yield StreamEndEvent(
                finish_reason=response.finish_reason, usage=response.usage, provider_data=response.provider_data
            )


def _own_errors() -> AbstractContextManager[None]:
    """A failing model raises what it raised without us, so that callers still know it."""
    return own_errors(lambda _, error: isinstance(error, dspy.LMError | LM15Error))
