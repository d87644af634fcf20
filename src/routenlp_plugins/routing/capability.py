"""The capability router: the cheapest tier whose profile has what a query requires (HyDRA, Garg et al. 2026)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from ..errors import PortfolioError
from ..portfolio import Portfolio
from ..types import Query
from .requirements import CapabilityHeads, profiles_of
from .shortfall import band_weights, in_bands, matched, shortfalls

__all__ = ["CapabilityRouter", "Choice", "Matching", "estimated_tokens"]


def estimated_tokens(text: str) -> int:
    """A quarter of its ASCII characters and each other one: near for most tokenizers, more than they count for some."""
    plain = sum(character < "\x80" for character in text)
    return -(-plain // 4) + len(text) - plain


@dataclass(frozen=True, slots=True)
class Matching:
    """What may be turned while serving, without any training.

    Attributes:
        tolerance: the shortfall up to which a tier will do; the higher, the cheaper.
        weights: capability -> weight; 1 where nothing is said.
        cost: tier -> USD of a call, for tiers without prices per token, or in their place.
        answer_tokens: what an answer is reckoned with, in cost and context.
        tokens: counts the tokens of a text.
    """

    tolerance: float = 0.0
    weights: Mapping[str, float] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    answer_tokens: int = 256
    tokens: Callable[[str], int] = estimated_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """Which tier a query is for, and why.

    Attributes:
        required: capability -> how much is required, in [0, 1].
        shortfall: tier -> weighted sum of what it lacks, of the tiers that have a profile.
        ruled_out: tier -> the gate that does not let it through.
    """

    tier: str
    reason: str
    required: Mapping[str, float]
    shortfall: Mapping[str, float]
    ruled_out: Mapping[str, str]


@dataclass(frozen=True)
class CapabilityRouter:
    """Heads over a portfolio: another portfolio is another router over the same heads, with no training.

    Since profiles are read relative to the pool, a tier that is added or removed may move the others.

    Raises:
        PortfolioError: the portfolio does not speak of the capabilities of the heads, a profile is incomplete, no tier
            has one, or there is a tier whose cost is not known.
    """

    heads: CapabilityHeads
    portfolio: Portfolio
    matching: Matching = field(default_factory=Matching)

    def __post_init__(self) -> None:
        portfolio, matching = self.portfolio, self.matching
        for what, names, known in (
            ("capabilities", self.heads.capabilities, portfolio.capabilities),
            ("weights", matching.weights, self.heads.capabilities),
            ("cost", matching.cost, portfolio.names),
        ):
            unknown = [name for name in names if name not in known]
            if unknown:
                raise PortfolioError(f"{what}: {', '.join(unknown)} is unknown; known: {', '.join(known)}")
        for name, value in {"tolerance": matching.tolerance, **matching.weights, **matching.cost}.items():
            if not (isfinite(value) and value >= 0):
                raise PortfolioError(f"{name}: must be a number >= 0, got {value!r}")
        if not self.tiers:
            raise PortfolioError("profile: no tier of the portfolio has one, and there is nothing to match with")
        for tier in portfolio.names:
            if tier not in matching.cost and portfolio.tier(tier).cost(1, 1, None) is None:
                raise PortfolioError(
                    f"tier {tier!r}: has no price per token; say what a call costs: Matching(cost={{{tier!r}: USD}})"
                )
        self._in_bands  # noqa: B018  an incomplete profile is told now

    @cached_property
    def tiers(self) -> tuple[str, ...]:
        """M names of tiers that have a profile; no query is matched with any other."""
        return tuple(tier.name for tier in self.portfolio.tiers if tier.profile)

    def shortfalls(self, texts: Sequence[str], tasks: Sequence[str | None]) -> NDArray[np.float64]:
        """(n, M) weighted sum of what each tier lacks."""
        return self._lacking(self.heads(texts, tasks))

    def __call__(self, texts: Sequence[str], tasks: Sequence[str | None]) -> NDArray[np.float64]:
        """(n, M) probabilities that an answer is good enough, also of tiers that no outcome is known of.

        Raises:
            DataError: the heads were taught by labels, without outcomes.
        """
        return self.heads.good_enough(self.shortfalls(texts, tasks))

    def choose(
        self, query: Query | str, *, allowed: Collection[str] | None = None, unavailable: Collection[str] = ()
    ) -> Choice:
        """The cheapest tier that lacks no more than is tolerated; without any, the one that lacks least.

        Gates go first: the allow list, health, the task's own tiers, what the tier supports, its context. Where they
        let nothing through, the frontier is left to answer or fail, unless the allow list itself rules it out.

        Args:
            allowed: names of tiers, None for all; those of no tier mean nothing.
            unavailable: names of tiers that do not answer at present.

        Raises:
            PortfolioError: the allow list leaves no tier.
        """
        query = Query.given(query)
        names = self.portfolio.names
        if allowed is not None and not any(name in allowed for name in names):
            raise PortfolioError(f"allowed: leaves no tier of the portfolio; its tiers: {', '.join(names)}")
        input_tokens = sum(self.matching.tokens(turn["content"]) for turn in query.chat)
        ruled_out = {name: why for name in names if (why := self._gate(name, query, input_tokens, unavailable))}
        if allowed is not None:
            ruled_out |= {name: "not on the allow list" for name in names if name not in allowed}
        required = self.heads([query.text], [query.task])
        lacking = self._lacking(required)
        open_ = np.array([[name not in ruled_out for name in self.tiers]])
        cost = np.array([[self._cost(name, input_tokens) for name in self.tiers]])
        place = int(matched(lacking, cost, self.matching.tolerance, open_)[0])
        shortfall = dict(zip(self.tiers, lacking[0].tolist(), strict=True))
        if place >= 0:
            tier = self.tiers[place]
            enough = shortfall[tier] <= self.matching.tolerance
            why = "the cheapest that lacks no more than" if enough else "lacks least; none lacks no more than"
            reason = f"{tier}: lacks {shortfall[tier]:.4f}, {why} {self.matching.tolerance:.4f}"
        else:
            tier = self._last_resort(ruled_out, allowed)
            reason = f"{tier}: no tier with a profile passes the gates ({_listed(ruled_out)})"
        return Choice(
            tier, reason, dict(zip(self.heads.capabilities, required[0].tolist(), strict=True)), shortfall, ruled_out
        )

    def _last_resort(self, ruled_out: Mapping[str, str], allowed: Collection[str] | None) -> str:
        frontier = self.portfolio.frontier
        if allowed is None or frontier in allowed:
            return frontier
        names = [name for name in self.portfolio.names if name in allowed]
        return next((name for name in names if name not in ruled_out), names[-1])

    def _gate(self, name: str, query: Query, input_tokens: int, unavailable: Collection[str]) -> str | None:
        tier, task = self.portfolio.tier(name), query.task
        if name in unavailable:
            return "unavailable"
        if task and name != self.portfolio.frontier and name not in self.portfolio.below_frontier(task):
            return f"may not serve task {task!r}"
        lacking = sorted(query.requires - set(tier.supports))
        if lacking:
            return f"does not support {', '.join(lacking)}"
        needed = input_tokens + self.matching.answer_tokens
        if tier.context_tokens is not None and needed > tier.context_tokens:
            return f"its context of {tier.context_tokens} tokens is too short for about {needed}"
        return None

    def _cost(self, name: str, input_tokens: int) -> float:
        own = self.portfolio.tier(name).cost(input_tokens, self.matching.answer_tokens, None)
        return self.matching.cost.get(name, own or 0.0)

    def _lacking(self, required: NDArray[np.float64]) -> NDArray[np.float64]:
        return shortfalls(required, self._in_bands, self._weights)

    @cached_property
    def _in_bands(self) -> NDArray[np.float64]:
        return in_bands(profiles_of(self.portfolio, self.tiers, self.heads.capabilities), self.heads.bands)

    @cached_property
    def _weights(self) -> NDArray[np.float64]:
        weights = np.array([self.matching.weights.get(name, 1.0) for name in self.heads.capabilities])
        return band_weights(weights, self.heads.bands)


def _listed(ruled_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in ruled_out.items())
