"""What routing has kept of the quality, as far as audits tell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..portfolio import Portfolio
from .opinions import audited, opinions
from .reading import read_traces
from .sampling import was_audited
from .store import TraceStore

__all__ = ["Kept", "kept"]


@dataclass(frozen=True, slots=True)
class Kept:
    """Of routed queries with an audit of the answer that was returned and of the frontier's.

    Attributes:
        audited: how many there are.
        quality, of_frontier: mean qualities, weighted by inverse propensities; None where they are not known.
        unknown: why not; empty if they are.
    """

    audited: int
    quality: float | None
    of_frontier: float | None
    unknown: str

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def kept(store: TraceStore, portfolio: Portfolio, since: float | None = None, until: float | None = None) -> Kept:
    """Compare what was returned with the frontier, on what a policy served in [since, until) and audits drew."""
    pairs: list[tuple[float, float]] = []
    weights: list[float] = []
    strange = 0
    for recorded, signals in read_traces(store.engine, since, until, was_audited()):
        if recorded.origin != "served" or recorded.drawn is False:
            continue
        said = {
            attempt.tier: (quality, opinion.is_returned)
            for attempt, opinion in opinions(recorded, signals, lambda *_: 0.0)
            if (quality := audited(opinion)) is not None
        }
        returned = next((quality for quality, mine in said.values() if mine), None)
        reference = said.get(portfolio.frontier)
        if returned is None or reference is None:
            continue
        if recorded.propensity is None:
            strange += 1
            continue
        pairs.append((returned, reference[0]))
        weights.append(1 / recorded.propensity)
    if strange:
        told = f"{strange} audited queries were drawn nobody told how: they are no sample (store.draw, store.design)"
        return Kept(len(pairs) + strange, None, None, told)
    if not pairs:
        return Kept(0, None, None, "no routed query has an audit of what was returned and of the frontier's answer")
    quality, reference_quality = np.average(np.array(pairs), axis=0, weights=weights)
    return Kept(len(pairs), float(quality), float(reference_quality), "")
