"""What is said about a run, by whom."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from numbers import Real

from rapidfuzz.distance import Levenshtein

from ..errors import DataError

__all__ = ["KINDS", "Signal", "edit_similarity"]

KINDS = (
    *("thumbs", "stars", "preference", "edit", "acceptance"),
    *("validator", "parser", "tool", "retry", "judge", "audit", "escalation", "other"),
)
"""What a signal may be: of people in the first line, of programs in the second."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One opinion of one source about one run.

    Attributes:
        run_id: of the run it is about: of a trace, of one of its calls, of the chain around it, or of the query.
        kind: one of `KINDS`. ``audit`` is the truth that other kinds are compared with; ``other`` is anything else.
        value: in [0, 1], higher for a better answer. Thumbs are 0 or 1, four stars of five 0.75, an edit is the
            `edit_similarity` of the answer and what was sent, a preference is 1 where the answer was preferred to that
            of `other`, of which 0 is said at once.
        source: who says so, such as ``user``, or the name of a judge: each has errors of its own.
        at: seconds since 1970, UTC; None takes the time at which it is given.
        other: the run whose answer it was compared with, for a preference.
        tier: whose answer it is about, where that is not the one that was returned: of a shadow run, of an audit.
    """

    run_id: str
    kind: str
    value: float
    source: str = "user"
    at: float | None = None
    other: str | None = None
    tier: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("run_id", self.run_id), ("source", self.source)):
            if not isinstance(value, str) or not 0 < len(value) <= 256:
                raise DataError(f"signal: {name} must be a string of 1 to 256 characters, got {value!r}")
        if self.kind not in KINDS:
            raise DataError(f"signal: kind {self.kind!r} is unknown; known: {', '.join(KINDS)}")
        if not isinstance(self.value, Real) or not 0 <= self.value <= 1:
            raise DataError(
                f"signal: value must be in [0, 1], higher for a better answer, got {self.value!r}; four stars of five "
                "are 0.75"
            )
        if self.at is not None and (not isinstance(self.at, Real) or not isfinite(self.at)):
            raise DataError(f"signal: at must be seconds since 1970, got {self.at!r}")
        if (self.kind == "preference") != (self.other is not None):
            raise DataError("signal: a preference, and nothing else, needs the other run it was compared with")
        for name in ("other", "tier"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and 0 < len(value) <= 256):
                raise DataError(f"signal: {name} must be a string of 1 to 256 characters, got {value!r}")
        if self.other == self.run_id:
            raise DataError("signal: a preference needs two runs, got the same one twice")


def edit_similarity(answer: str, sent: str) -> float:
    """How much of an answer a user kept in what was sent: the value of a signal of kind ``edit``.

    One less the edit distance of the texts (Levenshtein 1966) over the length of the longer one, in [0, 1].
    """
    return float(Levenshtein.normalized_similarity(answer, sent))
