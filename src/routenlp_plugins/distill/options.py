"""How rounds are run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from hashlib import sha256
from types import FunctionType
from typing import Any

from ..cascade.certificate import Certificate
from ..comparing import comparator
from ..errors import DataError
from ..fitting import FitOptions
from ..portfolio import Portfolio
from ..release import Release
from ..routing.encoders import Encoder, HashedNgrams
from ..types import Query
from .asking import Quality
from .clusters import Clustering
from .dataset import Filters
from .gate import GateOptions
from .parts import Shares
from .selection import SELECTIONS, Budget

__all__ = ["LoopOptions", "Promise"]


@dataclass(frozen=True, slots=True)
class Promise:
    """What each round's release has to keep; see `routenlp_plugins.fit`."""

    alpha: float | None = None
    retention: float | None = None
    delta: float = 0.1

    def __post_init__(self) -> None:
        if (self.alpha is None) == (self.retention is None):
            raise DataError("promise: give alpha or retention, one of them: what releases have to keep")
        for name in ("alpha", "retention", "delta"):
            value = getattr(self, name)
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1
            ):
                raise DataError(f"promise: {name} must be strictly between 0 and 1, got {value!r}")

    @classmethod
    def of(cls, release: Release, fit: FitOptions) -> Promise:
        """That of a certified release, if these options fit such ones.

        Raises:
            DataError: it has no certificate, or one of another kind.
        """
        certificate = release.certificate
        if certificate is None:
            raise DataError("promise: the release has no certificate; say what is to be kept: LoopOptions(promise=...)")
        if (certificate.risk == "selective violation") != fit.selective or _pooled(certificate) != fit.pooled:
            raise DataError(
                f"promise: the release promises a {certificate.risk} for {certificate.scope}; later ones would promise "
                "something else: give LoopOptions(fit=FitOptions(selective=..., pooled=...)) as it was fitted"
            )
        if certificate.risk == "retention":
            return cls(retention=certificate.level, delta=certificate.delta)
        return cls(alpha=certificate.level, delta=certificate.delta)


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """How rounds are run. What changes it between the begin and the end of a round is an error.

    Attributes:
        promise: of every round's release; None takes that of the release that serves.
        together: rounds that share delta, so that all their certificates hold at once; None gives each round all of it,
            since each certifies on labels of its own.
        shares: of the traffic, to teach, to judge and to certify.
        judged, certified: fresh queries that are labelled to judge a student, and to certify a release: drawn by
            chance, at most.
        ask_again: whether the frontier is asked for these labels even where it answered when serving: costs more, and
            does not trust what was recorded.
        unanswered: share of these queries to which the frontier may give no answer, by failing, with nothing, or with a
            refusal: they are left out, and with more of them the round is refused.
        budget: of lessons.
        selection: one of `routenlp_plugins.distill.selection.SELECTIONS`.
        rehearsal: lessons that a student without memory hears again, for each new one.
        clustering, filters, gate: see there.
        encoder: of clusters and of selection; None takes that of the release's router, else the default one.
        quality: (query, answer, the frontier's answer) -> quality in [0, 1]; None compares them as the task does.
        fit: how releases are fitted.
        portfolio: with today's prices, where they are no longer those of the release that serves.
        since: of the first round's traffic, seconds since 1970; None is ever.
        usd_per_hour: of the machine that trains.
        least_change: of the cost ratio, below which no further round is run.
        workers: queries that are asked at the same time.
        seed: of whatever is random.
        progress: whether to draw bars on standard error if that is a terminal.
    """

    promise: Promise | None = None
    together: int | None = None
    shares: Shares = field(default_factory=Shares)
    judged: int = 1000
    certified: int = 3000
    ask_again: bool = False
    unanswered: float = 0.05
    budget: Budget = field(default_factory=Budget)
    selection: str = "coverage"
    rehearsal: float = 1.0
    clustering: Clustering = field(default_factory=Clustering)
    filters: Filters = field(default_factory=Filters)
    gate: GateOptions = field(default_factory=GateOptions)
    encoder: Encoder | None = None
    quality: Quality | None = None
    fit: FitOptions = field(default_factory=FitOptions)
    portfolio: Portfolio | None = None
    since: float | None = None
    usd_per_hour: float = 0.0
    least_change: float = 0.005
    workers: int = 1
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        kinds = {"shares": Shares, "budget": Budget, "clustering": Clustering, "filters": Filters, "gate": GateOptions}
        kinds |= {"fit": FitOptions, "promise": Promise, "portfolio": Portfolio}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name not in ("promise", "portfolio")):
                raise DataError(f"{name} must be a {kind.__name__}, got {value!r}")
        if self.selection not in SELECTIONS:
            raise DataError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}")
        for name in ("judged", "certified", "workers"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{name} must be 1, 2, ..., got {value!r}")
        for name in ("rehearsal", "usd_per_hour", "least_change", "unanswered", "since"):
            value = getattr(self, name)
            if name == "since" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
                raise DataError(f"{name} must be at least 0, got {value!r}")
        if self.together is not None and (not isinstance(self.together, int) or self.together < 1):
            raise DataError(f"together must be a number of rounds, or None, got {self.together!r}")

    def promise_of(self, release: Release) -> Promise:
        """What later releases have to keep: what was said, or what this one keeps."""
        return self.promise or Promise.of(release, self.fit)

    def promised(self, release: Release, number: int) -> Promise:
        """What the release of a round has to keep, with that round's share of delta.

        Raises:
            DataError: all shares are spent.
        """
        promise = self.promise_of(release)
        if self.together is None:
            return promise
        if number > self.together:
            raise DataError(f"round {number}: {self.together} rounds share delta, and all have had theirs")
        return replace(promise, delta=promise.delta / self.together)

    def encoder_of(self, release: Release) -> Encoder:
        """Whose vectors clusters and selection look at."""
        if self.encoder is not None:
            return self.encoder
        return HashedNgrams() if release.router is None else release.router.encoder

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        """All that are given, of which a saved router may need one."""
        router = self.fit.router
        return tuple(one for one in (self.encoder, None if router is None else router.encoder) if one is not None)

    def quality_of(self, portfolio: Portfolio) -> Quality:
        """How an answer is scored against the frontier's."""
        if self.quality is not None:
            return self.quality
        own = self.fit.comparators

        def agreement(query: Query, answer: str, reference: str) -> float:
            return comparator(portfolio.task(query.task or "").agreement, own)(answer, reference)

        return agreement

    @property
    def digests(self) -> dict[str, str]:
        """Of each option that decides: functions by their code, other things by their types."""
        left_out = ("workers", "progress")
        facts = {one.name: _plain(getattr(self, one.name)) for one in fields(self) if one.name not in left_out}
        return {name: sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16] for name, of in facts.items()}


def _pooled(certificate: Certificate) -> bool:
    return certificate.scope != "each task"


def _plain(thing: Any) -> Any:
    """In JSON types, and the same in every process."""
    if isinstance(thing, Mapping):
        return {str(name): _plain(value) for name, value in sorted(thing.items(), key=lambda item: str(item[0]))}
    if isinstance(thing, list | tuple | set | frozenset):
        return [_plain(value) for value in thing]
    if isinstance(thing, FunctionType):
        code = thing.__code__
        return [
            thing.__module__,
            thing.__qualname__,
            code.co_code.hex(),
            repr([c for c in code.co_consts if _is_plain(c)]),
        ]
    if is_dataclass(thing) and not isinstance(thing, type):
        return [
            type(thing).__qualname__,
            {one.name: _plain(getattr(thing, one.name)) for one in fields(thing) if one.compare},
        ]
    return thing if _is_plain(thing) else getattr(thing, "name", None) or type(thing).__qualname__


def _is_plain(thing: Any) -> bool:
    return thing is None or isinstance(thing, str | int | float | bool)
