"""Find chat models inside a chain and put others in their place, leaving everything else as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import (
    RouterRunnable as KeyedRunnables,
)
from langchain_core.runnables import (
    Runnable,
    RunnableAssign,
    RunnableBranch,
    RunnableParallel,
    RunnableSequence,
    RunnableWithFallbacks,
)
from langchain_core.runnables.base import RunnableBindingBase, RunnableEachBase

__all__ = ["chat_models", "describe", "model_name", "rewrite"]

Swap = Callable[[BaseChatModel], Runnable[Any, Any]]


def rewrite(chain: Runnable[Any, Any], swap: Swap) -> Runnable[Any, Any]:
    """A copy of `chain` with `swap(model)` in place of each chat model; of fallbacks only the primary is entered.

    Models inside functions cannot be seen, and parts that do not change are shared with the original.
    """
    if isinstance(chain, BaseChatModel):
        return swap(chain)
    changes = {name: new for name, old, new in _parts(chain, swap) if new is not old}
    return cast("Runnable[Any, Any]", chain.model_copy(update=changes)) if changes else chain  # type: ignore[attr-defined]


def chat_models(chain: Runnable[Any, Any]) -> list[BaseChatModel]:
    """The different chat models of a chain, in order; the same object used twice counts once."""
    found: dict[int, BaseChatModel] = {}

    def note(model: BaseChatModel) -> BaseChatModel:
        found.setdefault(id(model), model)
        return model

    rewrite(chain, note)
    return list(found.values())


def describe(model: BaseChatModel) -> str:
    """Class and model name, as the error messages list them."""
    name = model_name(model)
    return f"{type(model).__name__}({name!r})" if name else type(model).__name__


def model_name(model: BaseChatModel) -> str | None:
    """The provider's name of the model, where it has one."""
    return next((str(v) for field in ("model_name", "model") if (v := getattr(model, field, None))), None)


def _parts(chain: Runnable[Any, Any], swap: Swap) -> list[tuple[str, Any, Any]]:
    """Field, old value and new value of every part of a composite."""
    match chain:
        case RunnableSequence():
            middle = [rewrite(step, swap) for step in chain.middle]
            return [
                ("first", chain.first, rewrite(chain.first, swap)),
                ("middle", chain.middle, _same_or_new(chain.middle, middle)),
                ("last", chain.last, rewrite(chain.last, swap)),
            ]
        case RunnableParallel():
            steps = {key: rewrite(step, swap) for key, step in chain.steps__.items()}
            return [("steps__", chain.steps__, _same_or_new(chain.steps__, steps))]
        case KeyedRunnables():
            choices = {key: rewrite(choice, swap) for key, choice in chain.runnables.items()}
            return [("runnables", chain.runnables, _same_or_new(chain.runnables, choices))]
        case RunnableBranch():
            branches = [(condition, rewrite(branch, swap)) for condition, branch in chain.branches]
            same = all(new[1] is old[1] for new, old in zip(branches, chain.branches, strict=True))
            return [
                ("branches", chain.branches, chain.branches if same else branches),
                ("default", chain.default, rewrite(chain.default, swap)),
            ]
        case RunnableWithFallbacks():
            return [("runnable", chain.runnable, rewrite(chain.runnable, swap))]
        case RunnableAssign():
            return [("mapper", chain.mapper, rewrite(chain.mapper, swap))]
        case RunnableBindingBase() | RunnableEachBase():
            return [("bound", chain.bound, rewrite(chain.bound, swap))]
        case _:
            return []


def _same_or_new(old: Any, new: Any) -> Any:
    pairs = zip(old.values(), new.values(), strict=True) if isinstance(old, dict) else zip(old, new, strict=True)
    return old if all(first is second for first, second in pairs) else new
