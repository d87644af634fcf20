"""What the steps of a round share: its traffic, its parts, its clusters, and who is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import numpy as np

from ..comparing import comparator
from ..evaluate.units import unit_interval
from ..portfolio import Portfolio
from ..release import Release
from ..routing.encoders import Encoder
from ..signals.store import TraceStore
from ..tiers.boundary import TierCallable
from ..types import Attempt
from .asking import Asked, Asking, Quality
from .clusters import FailureClusters
from .files import file_name
from .harvest import Harvest, Served, harvest, read_harvest, write_harvest
from .options import LoopOptions
from .parts import asked_by_many, parts_of
from .registry import Version
from .student import Student

__all__ = ["Work", "words"]


@dataclass(frozen=True)
class Work:
    """A round under way.

    Attributes:
        id: its own, unlike that of any other round of any loop.
        folder: of its files.
        base: the version that serves.
        tiers: name -> what answers; students are those of `base`.
        window: since and until when traffic is looked at, seconds since 1970.
    """

    number: int
    id: str
    folder: Path
    store: TraceStore
    base: Version
    tiers: Mapping[str, TierCallable]
    window: tuple[float | None, float]
    options: LoopOptions

    @cached_property
    def release(self) -> Release:
        """That serves."""
        return self.base.release(*self.options.encoders, portfolio=self.options.portfolio)

    @property
    def portfolio(self) -> Portfolio:
        """Of that release."""
        return self.release.portfolio

    @property
    def frontier(self) -> str:
        """The teacher."""
        return self.portfolio.frontier

    @property
    def students(self) -> dict[str, Student]:
        """Tiers below the frontier that can be taught."""
        return {n: t for n, t in self.tiers.items() if isinstance(t, Student) and n != self.frontier}

    @property
    def seed(self) -> int:
        """Another one each round."""
        return self.options.seed + 1000 * self.number

    @cached_property
    def encoder(self) -> Encoder:
        """Whose vectors clusters and selection look at."""
        return self.options.encoder_of(self.release)

    @cached_property
    def quality(self) -> Quality:
        """How an answer is scored against the frontier's."""
        return self.options.quality_of(self.portfolio)

    def agreement(self, task: str, one: str, other: str) -> float:
        """How far two answers say the same, by the comparator of the task: no judge is asked about lessons."""
        name = self.portfolio.task(task).agreement
        return comparator(name, self.options.fit.comparators)(one, other)

    @cached_property
    def harvested(self) -> Harvest:
        """The traffic, as it was when the round began."""
        file = self.folder / "traffic.jsonl"
        if not file.exists():
            write_harvest(file, harvest(self.store, self.portfolio, *self.window))
        return read_harvest(file)

    @cached_property
    def parts(self) -> dict[str, list[Served]]:
        """Of the traffic: to teach; and of what judges and what certifies as much as is labelled, drawn by chance."""
        parts = parts_of(self.harvested.served, self.options.shares, self.seed)
        most = {"gate": self.options.judged, "certification": self.options.certified}
        return {
            part: served if part == "teaching" else self._drawn(served, most[part]) for part, served in parts.items()
        }

    @cached_property
    def common(self) -> frozenset[str]:
        """Questions that so many ask that they are traffic."""
        return asked_by_many(self.harvested.served)

    @cached_property
    def clusters(self) -> FailureClusters | None:
        """Of what went to the frontier and may be taught; None if nothing did."""
        file = self.folder / "clusters.safetensors"
        if file.exists():
            return FailureClusters.load(file, self.encoder)
        texts, tasks = words([one for one in self.parts["teaching"] if one.returned == self.frontier])
        if not texts:
            return None
        found = FailureClusters.fit(texts, tasks, self.encoder, self.options.clustering, self.seed)
        found.save(file)
        return found

    @cached_property
    def frontier_usd(self) -> float:
        """Mean cost of an answer of the frontier in this traffic; 0 where it never answered."""
        found = [one.answer_of(self.frontier) for one in self.harvested.served]
        known = [c.cost_usd for c in found if c is not None and c.cost_usd is not None]
        return float(np.mean(known)) if known else 0.0

    def those_for(self, tier: str, part: str) -> list[Served]:
        """Queries of a part that a tier may serve."""
        may: dict[str, bool] = {}
        for one in self.parts[part]:
            task = one.row.query.task or ""
            may.setdefault(task, tier in self.portfolio.below_frontier(task))
        return [one for one in self.parts[part] if may[one.row.query.task or ""]]

    def judging(self, tier: str, reference: Asked) -> list[Served]:
        """Queries of the gate part that a tier may serve and the frontier has answered."""
        return [one for one in self.those_for(tier, "gate") if one.trace_id in reference.outcomes]

    def asked(
        self, name: str, tier: TierCallable, served: Sequence[Served], about: str, *, again: bool = False
    ) -> Asked:
        """What a tier answers; see `Asking`."""
        asking = Asking(self.folder, self.portfolio, self.options.workers, self.options.progress)
        return asking(name, tier, served, about, again=again) if served else Asked({}, frozenset())

    def of_frontier(self, served: Sequence[Served], about: str, *, again: bool = False) -> Asked:
        """What the frontier answers; what is bought now is charged to the store's ledger, once."""
        answers = self.asked(self.frontier, self.tiers[self.frontier], served, about, again=again)
        for name in sorted(answers.bought):
            outcome = answers.outcomes[name]
            if outcome.error is None:
                attempt = Attempt(self.frontier, False, completion=outcome.completion)
                batch = sha256(f"{self.id} {about} {name}".encode()).hexdigest()[:32]
                self.store.record_calls(name, "distillation", (attempt,), batch)
        return answers

    def labels(self, part: str) -> Asked:
        """The frontier's answers to a part, without what is no answer."""
        answers = self.of_frontier(self.parts[part], part, again=self.options.ask_again)
        return answers.without(self.options.filters.no_answer)

    def silence(self, part: str, labels: Asked) -> str | None:
        """Why labels are no sample of the traffic: too many of its queries have none."""
        silent, asked = len(labels.no_answer), len(self.parts[part])
        if silent <= self.options.unanswered * asked:
            return None
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(Counter(labels.no_answer.values()).items()))
        return (
            f"the frontier gave no answer to {silent} of {asked} fresh queries ({reasons}), more than "
            f"{self.options.unanswered:.0%}: what is left is no sample of the traffic"
        )

    def file(self, what: str, tier: str, ending: str = "json") -> Path:
        """Of a step that is about one tier."""
        return self.folder / f"{what}-{file_name(tier)}.{ending}"

    def _drawn(self, served: Sequence[Served], most: int) -> list[Served]:
        if len(served) <= most:
            return list(served)
        # whole units, so that none is drawn for being long
        draws = unit_interval([one.unit for one in served], self.seed, "labelled")
        return [served[i] for i in np.argsort(draws, kind="stable")[:most]]


def words(served: Sequence[Served]) -> tuple[list[str], list[str]]:
    """Texts and tasks of queries."""
    return [one.row.query.text for one in served], [one.row.query.task or "" for one in served]
