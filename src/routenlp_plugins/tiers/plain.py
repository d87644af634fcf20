"""Among the models of a framework: plain callables, which know nothing of its tools, and answers that say nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from inspect import iscoroutinefunction
from typing import Any

from ..errors import TierError
from ..types import Call, Completion, Delta

__all__ = ["HeldBack", "text_only", "valid_if_said"]


def valid_if_said(completion: Completion) -> Completion:
    """An answer of a model; one that says nothing and calls nothing is not valid: below the frontier it is paid for and
    passed over, and the frontier's own is returned as it is."""
    if completion.text:
        return completion
    return replace(completion, scores={**completion.scores, "valid": 0.0})


class HeldBack:
    """Pieces of a stream: below the frontier what says nothing yet, such as thoughts, waits for what does, since an
    answer that says nothing is passed over."""

    def __init__(self, call: Call) -> None:
        self._holds = call.may_be_passed_over
        self._held: list[Delta] = []

    def after(self, delta: Delta | None, *, says: bool) -> list[Delta]:
        """What may go on, now that this piece came; None is a piece without content.

        Args:
            says: whether it says something.
        """
        if delta is not None:
            self._held.append(delta)
        if self._holds and not says:
            return []
        ready, self._held, self._holds = self._held, [], False
        return ready


def text_only(tier: Any) -> Any:
    """A plain callable behind an adapter: it is asked for text, and fails where a call needs more than that."""
    return (_AsyncTextOnly if iscoroutinefunction(tier) or iscoroutinefunction(tier.__call__) else _TextOnly)(tier)


@dataclass(frozen=True, slots=True)
class _AsyncTextOnly:
    tier: Any

    async def __call__(self, call: Call) -> Completion:
        _refuse(call)
        completion: Completion = await self.tier(call)
        return completion


@dataclass(frozen=True, slots=True)
class _TextOnly:
    """With the other forms that the callable has."""

    tier: Any

    def __call__(self, call: Call) -> Completion:
        _refuse(call)
        completion: Completion = self.tier(call)
        return completion

    def __getattr__(self, name: str) -> Any:
        if name not in ("acall", "stream", "astream"):
            raise AttributeError(name)
        form = getattr(self.tier, name)

        def refusing(call: Call) -> Any:
            _refuse(call)
            return form(call)

        return refusing


def _refuse(call: Call) -> None:
    if call.query.requires:
        needed = ", ".join(sorted(call.query.requires))
        raise TierError(f"a plain callable is asked for text only, and the call needs {needed}", call.tier)
