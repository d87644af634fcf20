"""The one place where what a tier does becomes a `Completion` or a `TierError`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from inspect import iscoroutinefunction
from math import inf
from numbers import Real
from time import perf_counter
from typing import cast

from ..errors import PortfolioError, TierError
from ..portfolio import Tier
from ..types import Call, Completion, Query

__all__ = [
    "AsyncTierCallable",
    "SyncTierCallable",
    "TierCallable",
    "acall_tier",
    "async_form",
    "boundary",
    "call_tier",
    "complete",
    "own_errors",
    "received",
    "sync_form",
]

SyncTierCallable = Callable[[Call], Completion]
AsyncTierCallable = Callable[[Call], Awaitable[Completion]]
TierCallable = SyncTierCallable | AsyncTierCallable
"""What answers for a tier: ``Call -> Completion``, sync or async. An object with both forms is a sync callable
with an async method ``acall``."""


def sync_form(tier: TierCallable) -> SyncTierCallable | None:
    """The form that can be called without an event loop, if there is one."""
    return None if _is_async(tier) else cast("SyncTierCallable", tier)


def async_form(tier: TierCallable) -> AsyncTierCallable | None:
    """The form that does not block an event loop, if there is one."""
    return cast("AsyncTierCallable", tier) if _is_async(tier) else getattr(tier, "acall", None)


def call_tier(tier: Tier, function: SyncTierCallable, call: Call) -> Completion:
    """Make a call; measure and price what the tier itself did not.

    Raises:
        TierError: whatever went wrong, values that no answer can have included.
    """
    start = perf_counter()
    with boundary(tier.name):
        completion = function(call)
    return complete(tier, call, completion, (perf_counter() - start) * 1e3)


async def acall_tier(tier: Tier, function: AsyncTierCallable, call: Call) -> Completion:
    """As `call_tier`, awaiting."""
    start = perf_counter()
    with boundary(tier.name):
        completion = await function(call)
    return complete(tier, call, completion, (perf_counter() - start) * 1e3)


def received(tier: Tier, call: Call, answer: Completion | Exception) -> Completion:
    """As `call_tier`, of a call that was made elsewhere; a latency that nobody measured stays unknown."""
    if isinstance(answer, Exception):
        with boundary(tier.name):
            raise answer
    return complete(tier, call, answer, None)


@contextmanager
def own_errors(known: Callable[[str, BaseException], bool]) -> Iterator[None]:
    """Within it a failing model of a framework raises what it raised without us, with a note of the attempts.

    Args:
        known: (tier, what it raised) -> whether callers know such errors; of others the `TierError` is raised.
    """
    try:
        yield
    except TierError as error:
        own = error.__cause__.__cause__ if error.__cause__ else None
        if own is None or isinstance(own, TierError) or not known(error.tier, own):
            raise
        note = f"routenlp: {error}"
        if note not in getattr(own, "__notes__", ()):
            own.add_note(note)
        raise own from own.__cause__


def _is_async(tier: TierCallable) -> bool:
    return iscoroutinefunction(tier) or iscoroutinefunction(getattr(tier, "__call__", None))  # noqa: B004


@contextmanager
def boundary(name: str) -> Iterator[None]:
    """Within it, whatever goes wrong is a `TierError` of that name."""
    try:
        yield
    except TierError:
        raise
    except Exception as error:  # the tier boundary: foreign errors of any kind end here
        raise TierError(f"{type(error).__name__}: {error}", name) from error


def complete(tier: Tier, call: Call, completion: Completion, measured: float | None) -> Completion:
    """The completion checked, with what the tier did not tell of itself: latency, cost, prompt."""
    if not isinstance(completion, Completion):
        raise PortfolioError(
            f"tier {tier.name!r}: returned {type(completion).__name__}; a tier is called with a Call and returns a "
            "Completion, for example Completion(text=...)"
        )
    completion = _checked(tier, completion)
    latency = measured if completion.latency_ms is None else completion.latency_ms
    cost = completion.cost_usd
    if cost is None:
        counts = completion.input_tokens, completion.output_tokens
        cost = tier.cost(*counts, latency, completion.cached_tokens or 0)
    total = None if cost is None else cost + completion.extra_usd
    prompt = completion.prompt or prompt_fingerprint(call.query)
    judges = completion.judges_usd + completion.extra_usd
    return replace(completion, latency_ms=latency, cost_usd=total, extra_usd=0.0, judges_usd=judges, prompt=prompt)


NO_PROMPT = "none"


def prompt_fingerprint(query: Query) -> str:
    """Of what is asked beside the words of the user: system messages, form of the conversation, options of the call.

    The form is whether there are other turns and whether the last one is the user's. "none" where a user's message is
    all there is.
    """
    chat = query.chat
    system = [str(message.get("content")) for message in chat if message.get("role") == "system"]
    turns = [message.get("role") for message in chat if message.get("role") != "system"]
    form = "" if turns == ["user"] else f"{len(turns) > 1}, {turns[-1:] == ['user']}"
    if not (system or form or query.settings):
        return NO_PROMPT
    parts = [*system, "", form, query.settings]
    return sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()[:16]


_LARGE = 1e15
_LEAST_LOGPROB = -9999.0
"""What endpoints give for a probability of 0; JSON knows no infinity."""


def _checked(tier: Tier, completion: Completion) -> Completion:
    """The completion in plain Python numbers.

    Raises:
        TierError: a value is out of its range: what is compared with a threshold must mean what it says.
    """
    if not isinstance(completion.text, str):
        raise TierError(f"text must be a string, got {type(completion.text).__name__}", tier.name)

    def number(name: str, most: float = _LARGE) -> float | None:
        value = getattr(completion, name)
        return None if value is None else _number(tier, name, value, 0, most)

    def count(name: str) -> int | None:
        value = number(name)
        return None if value is None else int(value)

    mean, each = completion.mean_logprob, completion.token_logprobs
    return replace(
        completion,
        confidence=number("confidence", most=1),
        mean_logprob=None if mean is None else _logprob(tier, mean),
        token_logprobs=None if each is None else tuple(_logprob(tier, value) for value in each),
        scores={name: _number(tier, f"scores[{name!r}]", v, 0, 1) for name, v in completion.scores.items()},
        input_tokens=count("input_tokens"),
        output_tokens=count("output_tokens"),
        cached_tokens=count("cached_tokens"),
        cost_usd=number("cost_usd"),
        extra_usd=number("extra_usd") or 0.0,
        latency_ms=number("latency_ms"),
    )


def _logprob(tier: Tier, value: float) -> float:
    # rounding may leave it a little above 0
    return min(max(_number(tier, "log-probability", value, -inf, 1e-3), _LEAST_LOGPROB), 0.0)


def _number(tier: Tier, name: str, value: float, least: float, most: float) -> float:
    # numpy's numbers are Real too; so is bool, which is not one
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise TierError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}", tier.name)
    return float(value)
