"""Two days of customer-service, finance and legal queries with exact references.

With ``ROUTENLP_DATA`` they are real; without, they are synthetic: made from templates by a seeded generator. A
fifth of the templates of each label is kept out of the labelled history, so that classifiers meet wordings they
were not trained on. Numbers of synthetic queries say nothing about any other workload.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..evaluate.references import Reference
from ..portfolio import Portfolio, Task, Tier
from ..types import Query
from .templates import CLAUSES, COMPANIES, FACTS, INTENTS, PLACES, RISKS, fill

__all__ = ["FRONTIER", "Workload", "load_workload"]

FRONTIER = "reference-frontier"
USD_PER_MACHINE_HOUR = 0.10
"""Assumed price of the machine the local tiers run on: two cores of a small cloud server."""

# queries of the first and second day; the local language model answers those of cs_response only
SYNTHETIC_DAYS = {
    "cs_intent": (400, 300),
    "cs_response": (120, 30),
    "legal_clause": (200, 120),
    "legal_risk": (200, 120),
    "finance_ner": (40, 30),
    "finance_summary": (40, 30),
}
REAL_DAYS = {
    "cs_intent": (1500, 800),
    "cs_response": (120, 30),
    "legal_clause": (350, 260),
    "legal_risk": (600, 430),
    "finance_ner": (60, 60),
    "finance_summary": (40, 40),
}
HISTORY = 500


@dataclass(frozen=True, slots=True)
class Workload:
    """What the demo runs.

    Attributes:
        synthetic: whether the queries were made up.
        instructions: task -> system prompt.
        history: labelled queries that classifiers are trained on.
        first_day, second_day: the traffic.
    """

    synthetic: bool
    portfolio: Portfolio
    instructions: Mapping[str, str]
    history: tuple[Reference, ...]
    first_day: tuple[Reference, ...]
    second_day: tuple[Reference, ...]


def load_workload(seed: int, frontier_usd_per_mtok: tuple[float, float]) -> Workload:
    """Real queries from the folder ``ROUTENLP_DATA`` if it is set and not empty, else synthetic ones.

    Raises:
        DataError: the folder does not hold the tasks.
    """
    folder = os.environ.get("ROUTENLP_DATA")
    history, first, second = _real(Path(folder), seed) if folder else _synthetic(seed)
    return Workload(
        synthetic=not folder,
        portfolio=_portfolio(frontier_usd_per_mtok),
        instructions=_instructions(history),
        history=tuple(history),
        first_day=tuple(first),
        second_day=tuple(second),
    )


def _portfolio(frontier_usd_per_mtok: tuple[float, float]) -> Portfolio:
    local = ("intent-classifier", "clause-classifier", "risk-classifier", "smollm2-135m")
    tiers = (*(Tier(name, usd_per_hour=USD_PER_MACHINE_HOUR) for name in local), Tier(FRONTIER, *frontier_usd_per_mtok))
    tasks = (
        Task("cs_intent", "accuracy", tiers=("intent-classifier",)),
        Task("cs_response", "rouge_l", tau=0.6, tiers=("smollm2-135m",)),
        Task("legal_clause", "accuracy", tiers=("clause-classifier",)),
        Task("legal_risk", "accuracy", tiers=("risk-classifier",)),
        Task("finance_ner", "entity_f1", tau=0.8, tiers=()),
        Task("finance_summary", "rouge_l", tau=0.4, tiers=()),
    )
    return Portfolio(tiers, FRONTIER, tasks)


def _instructions(history: Sequence[Reference]) -> dict[str, str]:
    def labels(task: str) -> str:
        return ", ".join(sorted({r.reference for r in history if r.query.task == task}))

    return {
        "cs_intent": f"Name the intent of the customer's message. Answer with one of: {labels('cs_intent')}.",
        "cs_response": "You are a bank's support agent. Answer the customer in one short sentence from the facts.",
        "legal_clause": f"Name the kind of this contract clause. Answer with one of: {labels('legal_clause')}.",
        "legal_risk": f"Does the clause entail the statement? Answer with one of: {labels('legal_risk')}.",
        "finance_ner": "List the entities of the text as JSON [[text, type], ...]; types: PER, ORG, LOC, MISC.",
        "finance_summary": "Summarise the report in a few short sentences with its key figures.",
    }


Days = tuple[list[Reference], list[Reference], list[Reference]]


def _real(folder: Path, seed: int) -> Days:
    history, first, second = [], [], []
    for task, (today, tomorrow) in REAL_DAYS.items():
        file = folder / "tasks" / f"{task}.jsonl.gz"
        try:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise DataError(f"{file}: cannot be read ({error}); unset ROUTENLP_DATA for a synthetic workload") from None
        history += [_as_reference(row, task) for row in rows if row["split"] == "train"]
        test = [_as_reference(row, task) for row in rows if row["split"] == "test"]
        random.Random(f"{seed}-{task}").shuffle(test)
        first += test[:today]
        second += test[today : today + tomorrow]
    return history, first, second


def _as_reference(row: Mapping[str, str], task: str) -> Reference:
    return Reference(Query(row["text"], task, row["query_id"]), row["reference"])


def _synthetic(seed: int) -> Days:
    history, first, second = [], [], []
    for task, (today, tomorrow) in SYNTHETIC_DAYS.items():
        rng = random.Random(f"{seed}-{task}")
        make = _GENERATORS[task]
        history += [_numbered(task, "history", i, make(rng, True)) for i in range(HISTORY)]
        first += [_numbered(task, "day1", i, make(rng, False)) for i in range(today)]
        second += [_numbered(task, "day2", i, make(rng, False)) for i in range(tomorrow)]
    return history, first, second


def _numbered(task: str, part: str, number: int, pair: tuple[str, str]) -> Reference:
    return Reference(Query(pair[0], task, f"{task}-{part}-{number}"), pair[1])


def _labelled(templates: Mapping[str, Sequence[str]]) -> Callable[[random.Random, bool], tuple[str, str]]:
    """Texts of a label; the last fifth of its templates does not occur in the history."""

    def make(rng: random.Random, history: bool) -> tuple[str, str]:
        label = rng.choice(sorted(templates))
        wordings = templates[label]
        known = len(wordings) - max(1, len(wordings) // 5)
        # common wordings come more often than rare ones
        position = min(int(rng.expovariate(2.5 / len(wordings))), len(wordings) - 1)
        return fill(wordings[position % known if history else position], rng), label

    return make


def _response(rng: random.Random, _: bool) -> tuple[str, str]:
    products = rng.sample(sorted(FACTS), rng.choice((1, 1, 2)))
    amounts = [f"${rng.randint(1, 60)}.{rng.choice(('00', '50', '95'))}" for _ in products]
    facts = " ".join(f"The {name} is {amount}." for name, amount in zip(products, amounts, strict=True))
    asked = rng.randrange(len(products))
    question = rng.choice(FACTS[products[asked]])
    return f"Facts: {facts}\nCustomer: {question}", f"The {products[asked]} is {amounts[asked]}."


def _entities(rng: random.Random, _: bool) -> tuple[str, str]:
    company, bank = rng.sample(COMPANIES, 2)
    place = rng.choice(PLACES)
    text = f"{company} , with its principal office in {place} , entered into a loan agreement with {bank} ."
    return text, json.dumps([[company, "ORG"], [place, "LOC"], [bank, "ORG"]])


def _summary(rng: random.Random, _: bool) -> tuple[str, str]:
    company, sales, growth = rng.choice(COMPANIES), rng.randint(20, 900), rng.randint(1, 19)
    margin, quarter = rng.randint(8, 40), rng.choice(("first", "second", "third", "fourth"))
    text = (
        f"Good morning and welcome to the call of {company} for the {quarter} quarter. We are pleased. "
        f"Sales came in at ${sales} million, which is an increase of {growth}% over the same quarter of last year. Our "
        f"people worked hard, and the operating margin was {margin}%. We will now take your questions."
    )
    return text, f"{company} {quarter} quarter sales ${sales} million, up {growth}%. Operating margin {margin}%."


_GENERATORS: Mapping[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "cs_intent": _labelled(INTENTS),
    "cs_response": _response,
    "legal_clause": _labelled(CLAUSES),
    "legal_risk": _labelled(RISKS),
    "finance_ner": _entities,
    "finance_summary": _summary,
}
