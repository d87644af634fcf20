"""What all models of a router can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["intersection"]


def intersection(profiles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What holds of all: the smallest number, what every one can do, and nothing that one does not speak of."""
    found: dict[str, Any] = {}
    for name in set(profiles[0]).intersection(*profiles[1:]) if profiles else ():
        values = [profile[name] for profile in profiles]
        if all(isinstance(value, bool) for value in values):
            found[name] = all(values)
        elif all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            found[name] = min(values)
        elif all(value == values[0] for value in values):
            found[name] = values[0]
    return found
