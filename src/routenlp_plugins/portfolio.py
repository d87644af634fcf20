"""The portfolio: which tiers there are, what they cost, which tasks they may serve."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from hashlib import sha256
from math import inf, isfinite
from pathlib import Path
from typing import Any

from .asked import REQUIREMENTS
from .errors import PortfolioError

__all__ = ["CAPABILITIES", "Portfolio", "Task", "Tier"]

CAPABILITIES = ("reasoning", "code generation", "debugging", "tool use")
"""What profiles speak of where a portfolio does not say otherwise (HyDRA, Garg et al. 2026)."""

_DATED = re.compile(r"[-@:](\d{4}-\d{2}-\d{2}|\d{4}|\d{6}|\d{8}|latest)")
"""How providers name the versions of a model."""


@dataclass(frozen=True, slots=True)
class Tier:
    """One model of the portfolio.

    Attributes:
        input_usd_per_mtok, output_usd_per_mtok: USD per million tokens; both or none.
        cached_input_usd_per_mtok: USD per million tokens that are in the prompt cache; None if there is none.
        usd_per_hour: USD per hour of the machine it runs on, for tiers that are paid by time.
        version: of the model or the prompt behind it; another one voids certificates.
        context_tokens: what prompt and answer may have together; None where that is no limit.
        supports: what it can be asked for beyond text, by the names in `Query.requires`, such as ``tools``.
        profile: capability -> raw score in any unit that is the same for all tiers, higher for a more capable one.
    """

    name: str
    input_usd_per_mtok: float | None = None
    output_usd_per_mtok: float | None = None
    usd_per_hour: float | None = None
    version: str | None = None
    context_tokens: int | None = None
    supports: tuple[str, ...] = ()
    profile: Mapping[str, float] = field(default_factory=dict)
    cached_input_usd_per_mtok: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PortfolioError(f"tier name: expected a non-empty string, got {self.name!r}")
        for name in ("input_usd_per_mtok", "output_usd_per_mtok", "usd_per_hour", "cached_input_usd_per_mtok"):
            price = getattr(self, name)
            if price is not None and not (_is_number(price) and 0 <= price < inf):
                raise PortfolioError(f"tier {self.name!r}: {name} must be a number >= 0, got {price!r}")
        if self.version is not None and not isinstance(self.version, str):
            raise PortfolioError(f"tier {self.name!r}: version must be a string, got {self.version!r}")
        size = self.context_tokens
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise PortfolioError(f"tier {self.name!r}: context_tokens must be a whole number >= 1, got {size!r}")
        if not isinstance(self.profile, Mapping):
            raise PortfolioError(f"tier {self.name!r}: profile must be capability: score, got {self.profile!r}")
        for capability, score in self.profile.items():
            if not (_is_number(score) and isfinite(score)):
                raise PortfolioError(f"tier {self.name!r}: profile: {capability} must be a number, got {score!r}")
        if (self.input_usd_per_mtok is None) != (self.output_usd_per_mtok is None):
            raise PortfolioError(f"tier {self.name!r}: give input_usd_per_mtok and output_usd_per_mtok together")
        if (self.cached_input_usd_per_mtok or 0) > (self.input_usd_per_mtok or 0):
            raise PortfolioError(f"tier {self.name!r}: cached_input_usd_per_mtok is above input_usd_per_mtok")
        _check_requirements(f"tier {self.name!r}: supports", self.supports)
        if self.usd_per_hour is not None and self.input_usd_per_mtok is not None:
            raise PortfolioError(f"tier {self.name!r}: give prices per token or usd_per_hour, not both")

    def cost(
        self, input_tokens: int | None, output_tokens: int | None, latency_ms: float | None, cached_tokens: int = 0
    ) -> float | None:
        """USD of one call, or None where the price or the quantity it applies to is unknown.

        Args:
            cached_tokens: of the input tokens, those that were in the prompt cache; they cost as much as others where
                the tier has no price for them.

        >>> Tier("a", input_usd_per_mtok=2.5, output_usd_per_mtok=10).cost(400, 50, latency_ms=None)
        0.0015
        """
        if self.usd_per_hour is not None:
            return None if latency_ms is None else self.usd_per_hour * latency_ms / 3.6e6
        if self.input_usd_per_mtok is None or self.output_usd_per_mtok is None:
            return None
        if input_tokens is None or output_tokens is None:
            return None
        known = self.cached_input_usd_per_mtok
        cheaper = 0.0 if known is None else min(cached_tokens, input_tokens) * (self.input_usd_per_mtok - known)
        return (input_tokens * self.input_usd_per_mtok + output_tokens * self.output_usd_per_mtok - cheaper) / 1e6


def _check_requirements(where: str, names: Collection[str]) -> None:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise PortfolioError(f"{where} must be a list of names, got {names!r}")
    for name in names:
        like = get_close_matches(str(name), REQUIREMENTS, n=1, cutoff=0.75)
        if like and name not in REQUIREMENTS:
            raise PortfolioError(f"{where}: {name!r} is unknown; {like[0]!r} is meant?")


@dataclass(frozen=True, slots=True)
class Task:
    """A named workload.

    Attributes:
        metric: how answers are scored against references; see `routenlp_plugins.evaluate.metrics`.
        comparator: what tells whether two answers agree; see `routenlp_plugins.comparing`. None takes what goes with
            the metric, and the normalised text for a metric of your own.
        tau: quality floor in (0, 1]; None means that quality is 0 or 1 and 1 is required.
        tiers: names of the tiers that may serve it; None allows all. The frontier always may.
        capabilities: what its queries may require; None stands for all. No certificate depends on it.
        requires: what its calls may ask for beyond text, such as ``tools``: its outcomes are of such calls, and only
            tiers that support it serve the task. Calls that ask for more are answered by the frontier.
    """

    name: str
    metric: str | None = None
    tau: float | None = None
    tiers: tuple[str, ...] | None = None
    comparator: str | None = None
    capabilities: tuple[str, ...] | None = None
    requires: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PortfolioError(f"task name: expected a non-empty string, got {self.name!r}")
        if self.tau is not None and not (_is_number(self.tau) and 0 < self.tau <= 1):
            raise PortfolioError(f"task {self.name!r}: tau must be in (0, 1], got {self.tau!r}")
        _check_requirements(f"task {self.name!r}: requires", self.requires)
        for name in ("metric", "comparator"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise PortfolioError(f"task {self.name!r}: {name} must be a string, got {value!r}")

    @property
    def agreement(self) -> str:
        """Name of the comparator that holds for this task."""
        of_metric = {"accuracy": "label", "rouge_l": "rouge_l", "entity_f1": "entities"}
        return self.comparator or of_metric.get(self.metric or "", "text")


@dataclass(frozen=True, slots=True)
class Portfolio:
    """All tiers, the one that is the reference for quality and cost, and the tasks.

    Attributes:
        frontier: name of the reference tier; "" takes the dearest tier if it is dearest without a tie.
        capabilities: D names of what profiles speak of.
    """

    tiers: tuple[Tier, ...]
    frontier: str = ""
    tasks: tuple[Task, ...] = ()
    capabilities: tuple[str, ...] = CAPABILITIES

    def __post_init__(self) -> None:
        if not self.tiers:
            raise PortfolioError("tiers: a portfolio needs at least one tier")
        names = _unique("tier", [tier.name for tier in self.tiers])
        _unique("task", [task.name for task in self.tasks])
        _unique("capability", list(self.capabilities))
        named = [(f"tier {tier.name!r}: profile", tuple(tier.profile)) for tier in self.tiers]
        named += [(f"task {task.name!r}: capabilities", task.capabilities or ()) for task in self.tasks]
        for where, capabilities in named:
            unknown = [name for name in capabilities if name not in self.capabilities]
            if unknown:
                raise PortfolioError(
                    f"{where} names {', '.join(unknown)}, which is no capability; capabilities: "
                    f"{', '.join(self.capabilities) or 'none'}"
                )
        if not self.frontier:
            object.__setattr__(self, "frontier", _dearest(self.tiers))
        if self.frontier not in names:
            raise PortfolioError(f"frontier: {self.frontier!r} is not a tier; tiers: {', '.join(names)}")
        for task in self.tasks:
            unknown = [name for name in task.tiers or () if name not in names]
            if unknown:
                raise PortfolioError(
                    f"task {task.name!r}: {', '.join(unknown)} is not a tier; tiers: {', '.join(names)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tiers as declared."""
        return tuple(tier.name for tier in self.tiers)

    def tier(self, name: str) -> Tier:
        """The tier of that name."""
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise PortfolioError(f"unknown tier {name!r}; tiers of the portfolio: {', '.join(self.names)}")

    def task(self, name: str) -> Task:
        """The declared task of that name, or one without metric and tau that every tier may serve."""
        return next((task for task in self.tasks if task.name == name), Task(name))

    def tier_of_model(self, *models: str | None) -> Tier | None:
        """The tier that a model is by its name, or a dated version of: the first of these names that tells.

        >>> portfolio = Portfolio((Tier("gpt-4o-mini"), Tier("gpt-4o")), frontier="gpt-4o")
        >>> portfolio.tier_of_model("gpt-4o-mini-2024-07-18").name
        'gpt-4o-mini'
        """
        for model in models:
            for tier in self.tiers:
                rest = (model or "").removeprefix(tier.name)
                if model is not None and model.startswith(tier.name) and (not rest or _DATED.fullmatch(rest)):
                    return tier
        return None

    @property
    def requires(self) -> dict[str, tuple[str, ...]]:
        """Task -> what its calls may ask for beyond text, of those that may ask for something."""
        return {task.name: task.requires for task in self.tasks if task.requires}

    def below_frontier(self, task: str) -> tuple[str, ...]:
        """Names of the tiers other than the frontier that may serve a task: as declared, and by what they support."""
        allowed, required = self.task(task).tiers, set(self.task(task).requires)
        able = [tier.name for tier in self.tiers if tier.name != self.frontier and required <= set(tier.supports)]
        return tuple(name for name in able if allowed is None or name in allowed)

    def called_for(self, task: str) -> tuple[str, ...]:
        """Names of the capabilities that queries of a task may require."""
        own = self.task(task).capabilities
        return self.capabilities if own is None else own

    @property
    def identity(self) -> dict[str, Any]:
        """What a policy depends on: everything but prices."""
        facts = self.as_dict()
        return {
            "frontier": facts["frontier"],
            "tiers": sorted(f"{tier.name} {tier.version}" if tier.version else tier.name for tier in self.tiers),
            "tasks": sorted((_certified(task) for task in facts["tasks"]), key=lambda task: str(task["name"])),
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity."""
        return sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """In JSON types, without what is unknown; `from_dict` reads it back."""
        facts: dict[str, Any] = {
            "frontier": self.frontier,
            "tiers": [_known(asdict(tier)) for tier in self.tiers],
            "tasks": [_known(asdict(task)) for task in self.tasks],
        }
        return facts if self.capabilities == CAPABILITIES else {**facts, "capabilities": list(self.capabilities)}

    @classmethod
    def from_dict(cls, data: object, source: str = "portfolio") -> Portfolio:
        """From plain data; `source` names the file in errors.

        Raises:
            PortfolioError: a field is unknown, missing or out of range.
        """
        try:
            fields_ = _fields_of(data, cls, "")
            tiers = tuple(_tier(tier, f"tiers[{i}]") for i, tier in enumerate(_list(fields_, "tiers")))
            tasks = tuple(_task(task, f"tasks[{i}]") for i, task in enumerate(_list(fields_, "tasks")))
            frontier = fields_.get("frontier", "")
            if not isinstance(frontier, str):
                raise PortfolioError(f"frontier: expected the name of a tier, got {frontier!r}")
            given = {} if "capabilities" not in fields_ else {"capabilities": _names(fields_, "capabilities", "")}
            return cls(tiers=tiers, frontier=frontier, tasks=tasks, **given)
        except PortfolioError as error:
            raise PortfolioError(f"{source}: {error}") from None

    @classmethod
    def from_yaml(cls, path: str | Path) -> Portfolio:
        """From a YAML file ``frontier: NAME``, ``tiers: [{name, input_usd_per_mtok, output_usd_per_mtok |
        usd_per_hour}]``, ``tasks: [{name, metric, tau, tiers}]``; further fields as of `Tier`, `Task` and `Portfolio`.

        Raises:
            PortfolioError: the file cannot be read, is no YAML, or does not describe a portfolio.
        """
        import yaml

        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PortfolioError(f"{path}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, ValueError) as error:
            raise PortfolioError(f"{path}: not valid YAML ({error})") from None
        return cls.from_dict(data, source=str(path))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _dearest(tiers: tuple[Tier, ...]) -> str:
    if len(tiers) == 1:
        return tiers[0].name
    prices = [
        (tier.input_usd_per_mtok + tier.output_usd_per_mtok, tier.name)
        for tier in tiers
        if tier.input_usd_per_mtok is not None and tier.output_usd_per_mtok is not None
    ]
    prices.sort(reverse=True)
    if len(prices) != len(tiers) or prices[0][0] == prices[1][0]:
        raise PortfolioError("frontier: name it; no tier is dearest by token prices without a tie")
    return prices[0][1]


def _unique(what: str, names: list[str]) -> list[str]:
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise PortfolioError(f"{what} {', '.join(repeated)}: defined more than once")
    return names


def _certified(task: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in task.items() if name != "capabilities"}


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    known = {name: list(v) if isinstance(v, tuple) else v for name, v in facts.items() if v is not None}
    return {name: v for name, v in known.items() if v or name not in ("supports", "profile", "requires")}


def _fields_of(data: object, cls: type, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise PortfolioError(f"{where or 'top level'}: expected a mapping, got {type(data).__name__}")
    known = [f.name for f in fields(cls)]
    unknown = [str(name) for name in data if name not in known]
    if unknown:
        raise PortfolioError(
            f"{where + ': ' if where else ''}unknown field {', '.join(unknown)}; known: {', '.join(known)}"
        )
    if "name" in known and "name" not in data:
        raise PortfolioError(f"{where}: name is missing")
    return dict(data)


def _list(data: dict[str, Any], name: str) -> list[object]:
    value = data.get(name) or []
    if not isinstance(value, list):
        raise PortfolioError(f"{name}: expected a list, got {type(value).__name__}")
    return value


def _tier(data: object, where: str) -> Tier:
    values = _fields_of(data, Tier, where)
    return Tier(**{**values, "supports": _names(values, "supports", where)})


def _task(data: object, where: str) -> Task:
    values = _fields_of(data, Task, where)
    lists = {n: _names(values, n, where) for n in ("tiers", "capabilities", "requires") if values.get(n) is not None}
    return Task(**{**values, **lists})


def _names(values: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    found = values.get(name) or []
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise PortfolioError(f"{where + ': ' if where else ''}{name} must be a list of names, got {found!r}")
    return tuple(found)
