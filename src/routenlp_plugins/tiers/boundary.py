"""The one place where what a tier does becomes a `Completion` or a `TierError`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import iscoroutinefunction
from time import perf_counter
from typing import cast

from ..errors import PortfolioError, TierError
from ..portfolio import Tier
from ..types import Call, Completion

__all__ = [
    "AsyncTierCallable",
    "SyncTierCallable",
    "TierCallable",
    "acall_tier",
    "async_form",
    "call_tier",
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
        TierError: whatever went wrong.
    """
    start = perf_counter()
    with _boundary(tier):
        completion = function(call)
    return _complete(tier, completion, start)


async def acall_tier(tier: Tier, function: AsyncTierCallable, call: Call) -> Completion:
    """As `call_tier`, awaiting."""
    start = perf_counter()
    with _boundary(tier):
        completion = await function(call)
    return _complete(tier, completion, start)


def _is_async(tier: TierCallable) -> bool:
    return iscoroutinefunction(tier) or iscoroutinefunction(getattr(tier, "__call__", None))  # noqa: B004


@contextmanager
def _boundary(tier: Tier) -> Iterator[None]:
    try:
        yield
    except TierError:
        raise
    except Exception as error:  # the tier boundary: foreign errors of any kind end here
        raise TierError(f"{type(error).__name__}: {error}", tier.name) from error


def _complete(tier: Tier, completion: Completion, start: float) -> Completion:
    if not isinstance(completion, Completion):
        raise PortfolioError(
            f"tier {tier.name!r}: returned {type(completion).__name__}; a tier is called with a Call and returns a "
            "Completion, for example Completion(text=...)"
        )
    latency = completion.latency_ms if completion.latency_ms is not None else (perf_counter() - start) * 1e3
    cost = completion.cost_usd
    if cost is None:
        cost = tier.cost(completion.input_tokens, completion.output_tokens, latency)
    return replace(completion, latency_ms=latency, cost_usd=cost)
