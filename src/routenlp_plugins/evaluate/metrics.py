"""Quality of an answer against a reference, in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..comparing import entity_f1, rouge_l, same_label
from ..errors import DataError

__all__ = ["METRICS", "Metric", "metric"]

Metric = Callable[[str, str], float | None]
"""(answer, reference) -> quality in [0, 1]; None where it cannot tell."""

METRICS: Mapping[str, Callable[[str, str], float]] = {
    "accuracy": same_label,
    "rouge_l": rouge_l,
    "entity_f1": entity_f1,
}


def metric(name: str, own: Mapping[str, Metric] | None = None) -> Metric:
    """The metric of that name, of the user's own or of `METRICS`.

    Raises:
        DataError: there is none.
    """
    known = {**METRICS, **(own or {})}
    if name not in known:
        raise DataError(f"metric {name!r} is unknown; known: {', '.join(known)}; give your own in metrics=")
    return known[name]
