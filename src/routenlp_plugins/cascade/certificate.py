"""What was proved about a policy, and how: the test on the certification split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from ..evaluate.table import TaskTable
from .bounds import binomial_p_value, binomial_upper_bound, fixed_sequence, labels_needed, smallest_sample
from .search import Candidate, climb, violations

__all__ = ["METHOD", "RISK", "RISK_OF_GROUPS", "Certificate", "TaskCertificate", "certify"]

RISK = "P(answer accepted below the frontier and its quality < tau)"
RISK_OF_GROUPS = f"{RISK}, for a query drawn from a random group,"
METHOD = "fixed sequence of exact binomial tests on a path ordered on a separate split"


@dataclass(frozen=True, slots=True)
class TaskCertificate:
    """What was proved for one task.

    Attributes:
        status: "certified", or "frontier" where the task stays on the frontier and nothing needs a proof.
        reason: why, in a sentence.
        tau: quality floor.
        n: rows of the certification split, one a query or group.
        violations: of the chosen policy among them; of the safest candidate where none passed.
        upper_bound: exact binomial upper bound of the risk at level 1 - delta; what is proved is risk <= alpha.
        delta: this task's share.
        candidates, tested: policies on the path, and how many of them were tested.
        labels_needed: certification rows with which the safest candidate would pass with 80 % power if its
            risk is what it seems to be; None where none would do, or none are missing.
        cost_ratio: mean cost against always-frontier on the certification split; an estimate, not proved.
    """

    task: str
    status: Literal["certified", "frontier"]
    reason: str
    tau: float
    n: int
    violations: int | None = None
    upper_bound: float | None = None
    delta: float | None = None
    candidates: int = 0
    tested: int = 0
    labels_needed: int | None = None
    cost_ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class Certificate:
    """What was proved about a policy: with probability at least 1 - delta over the drawing of the certification
    split, the risk of every task is at most alpha, all tasks simultaneously.

    Attributes:
        data_hash: SHA-256 of the outcomes; see `routenlp_plugins.evaluate.table.data_hash`.
        seed, ordering_share: what the split can be made again from; see `routenlp_plugins.evaluate.table.split`.
        date: day of the proof, ISO 8601.
    """

    alpha: float
    delta: float
    tasks: tuple[TaskCertificate, ...]
    data_hash: str
    seed: int
    ordering_share: float
    date: str
    risk: str = RISK
    method: str = METHOD

    def __post_init__(self) -> None:
        for name in ("alpha", "delta"):
            value = getattr(self, name)
            if not isinstance(value, float) or not 0 < value < 1:
                raise DataError(f"certificate: {name} must be strictly between 0 and 1, got {value!r}")

    @property
    def certified(self) -> tuple[str, ...]:
        """Names of the tasks that left the frontier."""
        return tuple(task.task for task in self.tasks if task.status == "certified")

    @property
    def status(self) -> Literal["certified", "frontier only"]:
        """Whether at least one task left the frontier."""
        return "certified" if self.certified else "frontier only"

    @property
    def claim(self) -> str:
        """What is promised, in a sentence."""
        return f"{self.risk} <= {self.alpha:g} for every task, with probability {1 - self.delta:g}"

    @property
    def obstacles(self) -> dict[str, tuple[str, ...]]:
        """Why tasks stay on the frontier and what would change that: sentence -> names of tasks."""
        names: dict[str, tuple[str, ...]] = {}
        for task in self.tasks:
            if task.status == "frontier":
                sentence = f"{task.reason}{self._remedy(task)}"
                names[sentence] = (*names.get(sentence, ()), task.task)
        return names

    def _remedy(self, task: TaskCertificate) -> str:
        bound = "" if task.upper_bound is None else f" (best bound reached: {task.upper_bound:.4f})"
        if task.labels_needed:
            in_all = ceil(task.labels_needed / (1 - self.ordering_share))
            return f"{bound}; about {task.labels_needed} certification rows would do, {in_all} outcomes in all"
        return f"{bound}; more outcomes would not help" if task.tested else bound

    def as_dict(self) -> dict[str, Any]:
        """In JSON types; `from_dict` reads it back."""
        return asdict(self) | {"tasks": [asdict(task) for task in self.tasks], "status": self.status}

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


def certify(
    paths: Mapping[str, Sequence[Candidate]], tables: Mapping[str, TaskTable], alpha: float, delta: float
) -> tuple[dict[str, Candidate], tuple[TaskCertificate, ...]]:
    """Test each task's path, safest first, and keep the cheapest policy that passed.

    delta is shared equally by the tasks that have a path and rows enough to pass at all; both are known before
    any quality of the certification split is looked at.

    Args:
        paths: task -> candidates by rising estimated risk, found on other rows than `tables`.
        tables: task -> certification split, one row a unit.

    Returns:
        The policies that passed, by task, and one certificate a task.
    """
    contenders = _contenders({task: len(table) for task, table in tables.items() if paths.get(task)}, alpha, delta)
    chosen: dict[str, Candidate] = {}
    certificates = []
    for task, table in tables.items():
        path = paths.get(task, ())
        share = delta / max(len(contenders), 1)
        if task not in contenders:
            certificates.append(_hopeless(table, len(path), alpha, delta / (len(contenders) + 1)))
        else:
            candidate, certificate = _tested(table, path, alpha, share)
            certificates.append(certificate)
            if candidate is not None:
                chosen[task] = candidate
    return chosen, tuple(certificates)


def _contenders(sizes: Mapping[str, int], alpha: float, delta: float) -> set[str]:
    """The largest set of tasks that each have rows enough for their equal share of delta."""
    ranked = sorted(sizes, key=lambda task: -sizes[task])
    fits = [m for m, task in enumerate(ranked, start=1) if sizes[task] >= smallest_sample(alpha, delta / m)]
    return set(ranked[: max(fits, default=0)])


def _hopeless(table: TaskTable, candidates: int, alpha: float, share: float) -> TaskCertificate:
    """Why a task is not tested at all."""
    needed = smallest_sample(alpha, share)
    below = table.tiers[:-1]
    mute = [tier for tier, kind in zip(below, table.kinds, strict=True) if kind is None]
    labels: int | None = None
    if not below:
        reason = "no tier below the frontier has outcomes for it"
    elif len(table) < needed:
        labels = needed
        reason = (
            f"{len(table)} certification rows; even without a violation {needed} are needed "
            f"to exclude a risk of {alpha:g} at level {share:.4g}"
        )
    else:
        reason = "no policy below the frontier looked cheap and safe enough on the ordering split"
        if mute:
            reason += (
                f"; {', '.join(mute)} came without confidence or log-probabilities, so that its answers cannot be told "
                "apart: have them recorded (logprobs=True)"
            )
    return TaskCertificate(
        table.task,
        "frontier",
        reason,
        table.tau,
        len(table),
        delta=share if candidates else None,
        candidates=candidates,
        labels_needed=labels,
    )


def _tested(
    table: TaskTable, path: Sequence[Candidate], alpha: float, share: float
) -> tuple[Candidate | None, TaskCertificate]:
    n = len(table)
    climbs = [climb(table, candidate.rungs) for candidate in path]
    counts = [int(violations(table, answered).sum()) for answered, _ in climbs]
    passed = fixed_sequence(binomial_p_value(counts, n, alpha), share)
    best = max(passed - 1, 0)
    facts: dict[str, Any] = {
        "violations": counts[best],
        "upper_bound": binomial_upper_bound(counts[best], n, share),
        "delta": share,
        "candidates": len(path),
        "tested": min(passed + 1, len(path)),
    }
    if not passed:
        needed = labels_needed(counts[0] / n, alpha, share)
        reason = (
            f"the safest candidate had {_violations(counts[0])} in {n} rows; its risk is not shown to be <= {alpha:g}"
        )
        return None, TaskCertificate(table.task, "frontier", reason, table.tau, n, labels_needed=needed, **facts)
    ratio = float(climbs[best][1].mean() / np.mean(table.cost[:, -1]))
    reason = f"{_violations(counts[best])} in {n} rows exclude a risk above {alpha:g} at level {share:.4g}"
    return path[best], TaskCertificate(table.task, "certified", reason, table.tau, n, cost_ratio=ratio, **facts)


def _violations(count: int) -> str:
    return f"{count} violation{'' if count == 1 else 's'}"
