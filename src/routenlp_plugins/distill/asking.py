"""Asking tiers, resumably: an answer that was paid for is never asked for again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..collecting import collect
from ..errors import PortfolioError
from ..evaluate.outcomes import Outcome, OutcomeRow, read_outcomes
from ..evaluate.references import Reference
from ..portfolio import Portfolio
from ..tiers.boundary import SyncTierCallable, TierCallable, sync_form
from ..types import Query
from .files import file_name
from .harvest import Served
from .student import Student

__all__ = ["Asked", "Asking", "Quality", "rows_of"]

Quality = Callable[[Query, str, str], float | None]
"""(query, answer, the frontier's answer) -> quality in [0, 1]; None where it cannot tell."""
UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Asked:
    """Answers of one tier.

    Attributes:
        outcomes: id of a query -> what it answered; without quality.
        bought: of them, those that were asked for now, and not known from the traffic.
        no_answer: id of a query -> why what came back is no answer; those are not among the outcomes.
    """

    outcomes: Mapping[str, Outcome]
    bought: frozenset[str]
    no_answer: Mapping[str, str] = field(default_factory=dict)

    def words(self, name: str) -> str:
        """The answer to a query that is known to have one."""
        return self.outcomes[name].completion.text

    def without(self, objection: Callable[[str], str | None]) -> Asked:
        """Without what is no answer, by a failure or by this objection to its words."""
        why = {
            name: "failed" if o.error is not None else objection(o.completion.text) for name, o in self.outcomes.items()
        }
        left = {name: outcome for name, outcome in self.outcomes.items() if why[name] is None}
        return replace(self, outcomes=left, no_answer={name: reason for name, reason in why.items() if reason})

    def text(self, name: str) -> str | None:
        """The answer to a query; None if there is none."""
        outcome = self.outcomes.get(name)
        return None if outcome is None or outcome.error is not None else outcome.completion.text


@dataclass(frozen=True, slots=True)
class Asking:
    """Asks tiers, and keeps what they say in files of a folder.

    Attributes:
        workers: queries that are asked at the same time.
    """

    folder: Path
    portfolio: Portfolio
    workers: int = 1
    progress: bool = False

    def __call__(
        self, name: str, tier: TierCallable, served: Sequence[Served], about: str, *, again: bool = False
    ) -> Asked:
        """What a tier answers to queries of the traffic.

        What it has answered there already is taken; of a student only what this very one has answered, so that a new
        one is never taken for an old one.

        Args:
            again: whether it is asked all the same.

        Raises:
            TierError: it failed ten times in a row; what it answered before that is kept.
        """
        function = sync_form(tier)
        if function is None:
            raise PortfolioError(f"tier {name!r} is async only; distillation needs a sync form")
        known = {} if again else {one.trace_id: one.row.outcomes[name] for one in served if _is_of(one, name, tier)}
        missing = [one.row.query for one in served if one.trace_id not in known]
        answered = self._collected(name, function, missing, about) if missing else {}
        return Asked({**known, **answered}, frozenset(answered))

    def _collected(
        self, name: str, function: SyncTierCallable, queries: Sequence[Query], about: str
    ) -> dict[str, Outcome]:
        out = self.folder / f"{about}-{file_name(name)}.jsonl"
        references = [Reference(query, "", metric=UNSCORED) for query in queries]
        # of this tier alone, whatever it is to the others
        alone = Portfolio((self.portfolio.tier(name),), name)
        collect(
            references,
            {name: function},
            out,
            portfolio=alone,
            metrics={UNSCORED: lambda answer, reference: None},
            workers=self.workers,
            progress=self.progress,
        )
        return {str(row.query.id): row.outcomes[name] for row in read_outcomes(out)}


def rows_of(
    served: Sequence[Served], asked: Mapping[str, Asked], frontier: str, quality: Quality, portfolio: Portfolio
) -> list[OutcomeRow]:
    """Outcomes of the queries that the frontier answered, scored against its answers."""
    alone = Counter(one.unit for one in served)
    rows = []
    for one in served:
        query, reference = one.row.query, asked[frontier].text(one.trace_id)
        if reference is None:
            continue
        may = {*portfolio.below_frontier(query.task or ""), frontier}
        outcomes = {
            name: _scored(of.outcomes[one.trace_id], query, reference, quality)
            for name, of in asked.items()
            if name in may and one.trace_id in of.outcomes
        }
        rows.append(
            OutcomeRow(
                query,
                outcomes,
                reference=reference,
                group=one.unit if alone[one.unit] > 1 else None,
                source=one.row.source,
            )
        )
    return rows


def _scored(outcome: Outcome, query: Query, reference: str, quality: Quality) -> Outcome:
    if outcome.error is not None:
        return outcome
    return replace(outcome, quality=quality(query, outcome.completion.text, reference))


def _is_of(one: Served, name: str, tier: TierCallable) -> bool:
    answer = one.answer_of(name)
    if answer is None or not isinstance(tier, Student):
        return answer is not None
    return tier.model is not None and answer.model == tier.model
