"""Everything that can go wrong, as one tree.

RouteNLPError
├── NotFittedError           a component is used before it was fitted
├── RiskNotControlledError   no policy passed its test; carries the release that stays on the frontier
├── ReleaseError             a release folder is missing, truncated, edited, newer or of another portfolio
├── PortfolioError           the portfolio, or the tiers supplied for it, do not fit
├── DataError                outcomes or queries are malformed
├── TierError                a tier failed; carries the attempts made so far
├── BudgetExceededError      the money for a query or a day is spent
└── DeadlineExceededError    the time for a query is spent
MissingExtraError(RouteNLPError, ImportError)   an optional package is absent; names the command that installs it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .release import Release
    from .types import Attempt, Trace

__all__ = [
    "BudgetExceededError",
    "DataError",
    "DeadlineExceededError",
    "MissingExtraError",
    "NotFittedError",
    "PortfolioError",
    "ReleaseError",
    "RiskNotControlledError",
    "RouteNLPError",
    "TierError",
]


class RouteNLPError(Exception):
    """Base of every error this package raises on purpose."""


class NotFittedError(RouteNLPError):
    """A component is used before it was fitted."""


class RiskNotControlledError(RouteNLPError):
    """No policy cheaper than always-frontier passed its test.

    Attributes:
        release: the release that keeps every task on the frontier; its certificate holds, per task, the
            bound that was reached and the number of labels that would do.
    """

    def __init__(self, message: str, release: Release) -> None:
        super().__init__(message)
        self.release = release


class ReleaseError(RouteNLPError):
    """A release folder cannot be used; the message names the file and the reason."""


class PortfolioError(RouteNLPError):
    """A portfolio, or the tiers supplied for it, do not fit; the message names the tier or field."""


class DataError(RouteNLPError):
    """Outcomes or queries are malformed; the message names the file, the line and the field."""


class TierError(RouteNLPError):
    """A tier failed.

    Attributes:
        tier: name of the tier that failed.
        attempts: all attempts of the query so far, the failed one last.
        trace: of the query that nobody answered, as listeners are told it; None where no dispatcher raised it.
        begun: whether words of the answer had been passed on, so that no other answer can take its place.
    """

    def __init__(self, message: str, tier: str, attempts: tuple[Attempt, ...] = ()) -> None:
        super().__init__(message)
        self.tier = tier
        self.attempts = attempts
        self.trace: Trace | None = None
        self.begun = False


class BudgetExceededError(RouteNLPError):
    """The money set aside is spent."""


class DeadlineExceededError(RouteNLPError):
    """The time set aside is spent."""


class MissingExtraError(RouteNLPError, ImportError):
    """An optional package is absent; the message names the command that installs it."""
