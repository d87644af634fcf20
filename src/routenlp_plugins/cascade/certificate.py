"""What was proved about a policy: the document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any, Literal

from ..errors import DataError
from .risks import risk_of

__all__ = ["Certificate", "Proof", "Scope"]

Scope = Literal["each task", "all tasks pooled"]

TOO_MANY = 30
"""Times the rows at hand beyond which a number of labels needed is noise."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was proved for a task, or for several tasks pooled.

    Attributes:
        status: "certified", or "frontier" where the tasks stay on the frontier and nothing needs a proof.
        reason: why, in a sentence.
        n: rows of the certification split, one a query or group.
        estimate: the risk of the chosen policy among them; of the best candidate where none passed.
        bound: of its risk at level 1 - delta; what is proved is the level asked for.
        delta: the share that was spent here.
        candidates, tested: policies on the paths, and how many of them were tested.
        labels_needed: certification rows with which the best candidate would pass with 80 % power if its risk is what
            it seems to be; None where none would do, or none are missing.
        cost_ratio: against always-frontier, on rows that nothing was decided on; None where there are none.
        cost_interval: of that ratio at 95 %, asymptotic.
    """

    tasks: tuple[str, ...]
    status: Literal["certified", "frontier"]
    reason: str
    n: int
    estimate: float | None = None
    bound: float | None = None
    delta: float | None = None
    candidates: int = 0
    tested: int = 0
    labels_needed: int | None = None
    cost_ratio: float | None = None
    cost_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proved about a policy: with probability at least 1 - delta over the drawing of the certification
    split, the promise holds for every proof's tasks, all proofs simultaneously.

    Attributes:
        risk, level: what is bounded, and by how much.
        scope: whether each task keeps the promise, or the stream of all tasks together.
        data_hash: SHA-256 of the outcomes; see `routenlp_plugins.evaluate.table.data_hash`.
        seed, ordering, reporting: what the split can be made again from; see `routenlp_plugins.evaluate.units.split`.
        portfolio, policy: fingerprints of what it speaks about.
        date: day of the proof, ISO 8601.
        groups: whether rows carried groups; it speaks of a query drawn from a random group then.
    """

    risk: str
    level: float
    delta: float
    proofs: tuple[Proof, ...]
    data_hash: str
    seed: int
    ordering: float
    reporting: float
    portfolio: str
    policy: str
    date: str
    method: str
    scope: Scope = "each task"
    groups: bool = False

    def __post_init__(self) -> None:
        risk_of(self.risk, self.level)
        if not isinstance(self.delta, float) or not 0 < self.delta < 1:
            raise DataError(f"certificate: delta must be strictly between 0 and 1, got {self.delta!r}")

    @property
    def certified(self) -> tuple[str, ...]:
        """Names of the tasks that may leave the frontier."""
        return tuple(task for proof in self.proofs if proof.status == "certified" for task in proof.tasks)

    @property
    def status(self) -> Literal["certified", "frontier only"]:
        """Whether at least one task left the frontier."""
        return "certified" if self.certified else "frontier only"

    @property
    def claim(self) -> str:
        """What is promised, in a sentence."""
        where = "for every task" if self.scope == "each task" else "over all tasks pooled"
        drawn = " of a query drawn from a random group" if self.groups else ""
        return f"{risk_of(self.risk, self.level).claim}{drawn} {where}, with probability {1 - self.delta:g}"

    @property
    def obstacles(self) -> dict[str, tuple[str, ...]]:
        """Why tasks stay on the frontier and what would change that: sentence -> names of tasks."""
        names: dict[str, tuple[str, ...]] = {}
        for proof in self.proofs:
            if proof.status == "frontier":
                sentence = f"{proof.reason}{self._remedy(proof)}"
                names[sentence] = (*names.get(sentence, ()), *proof.tasks)
        return names

    def _remedy(self, proof: Proof) -> str:
        bound = "" if proof.bound is None else f" (best bound reached: {proof.bound:.4f})"
        if proof.tested and proof.labels_needed and not proof.n < proof.labels_needed <= TOO_MANY * proof.n:
            # an estimate by which the rows at hand should have done is no better than one that is far off
            return f"{bound}; more outcomes may help: the estimate is too rough to say how many would do"
        if proof.labels_needed:
            in_all = ceil(proof.labels_needed / (1 - self.ordering - self.reporting))
            least = "about" if proof.tested else "at least"
            return f"{bound}; {least} {proof.labels_needed} certification rows would do, {in_all} outcomes in all"
        return f"{bound}; more outcomes would not help" if proof.tested else bound

    def as_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` reads it back."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self) | {"status": self.status}))
        return facts

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Certificate:
        """From what `as_dict` wrote.

        Raises:
            DataError: a field is unknown, missing or of the wrong type.
        """
        from pydantic import TypeAdapter, ValidationError

        from ..evaluate.outcomes import first_problem

        facts = {name: value for name, value in data.items() if name != "status"}
        unknown = set(facts) - {field.name for field in fields(cls)}
        if unknown:
            raise DataError(f"certificate: unknown field {', '.join(sorted(unknown))}")
        try:
            return TypeAdapter(cls).validate_json(json.dumps(facts), strict=True)
        except ValidationError as error:
            raise DataError(f"certificate: {first_problem(error)}") from None
