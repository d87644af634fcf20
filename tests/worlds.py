"""A small traffic of made-up words for the distillation loop: every intent has words of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from routenlp_plugins import (
    Budget,
    Call,
    ClassifierStudent,
    Completion,
    Dispatcher,
    DistillationLoop,
    FitOptions,
    GateOptions,
    Lesson,
    LoopOptions,
    Portfolio,
    Promise,
    Query,
    Reference,
    Release,
    Task,
    Tier,
    TraceStore,
    collect,
    fit,
)

SMALL, BIG = "small", "big"
KNOWN = tuple(f"known-{i}" for i in range(6))
HARD = tuple(f"hard-{i}" for i in range(4))
"""Intents that the student was hardly taught."""


def portfolio() -> Portfolio:
    tiers = (Tier(SMALL, usd_per_hour=0.001), Tier(BIG, 2.5, 10.0))
    return Portfolio(tiers, BIG, (Task("intent", "accuracy"),))


def word(of: str, number: int) -> str:
    """Seven letters that look like no other word's."""
    return "".join(chr(97 + byte % 26) for byte in sha256(f"{of} {number}".encode()).digest()[:7])


INTENT_OF = {word(intent, i): intent for intent in (*KNOWN, *HARD) for i in range(24)}


def question(intent: str, rng: np.random.Generator) -> str:
    """Six words, half of them the intent's own, half of them anybody's."""
    words = [*(word(intent, i) for i in rng.integers(0, 24, 3)), *(word("", i) for i in rng.integers(0, 40, 3))]
    return " ".join(words[i] for i in rng.permutation(6))


def traffic(n: int, seed: int, hard: float = 0.4) -> list[tuple[Query, str]]:
    """Queries and their true intents."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        kinds = HARD if rng.random() < hard else KNOWN
        intent = kinds[rng.integers(len(kinds))]
        found.append((Query(question(intent, rng), "intent", f"s{seed}-{i}"), intent))
    return found


def student(seed: int = 0) -> ClassifierStudent:
    """Knows the known intents well, of each hard one two questions."""
    rng = np.random.default_rng([seed, 99])
    asked = [(intent, question(intent, rng)) for intent in KNOWN for _ in range(20)]
    asked += [(intent, question(intent, rng)) for intent in HARD for _ in range(2)]
    return ClassifierStudent.train([Lesson(f"g{i}", "intent", t, a, "given") for i, (a, t) in enumerate(asked)])


@dataclass
class Frontier:
    """Says what is true of a question, by its words; counts how often it was asked.

    Attributes:
        says: query id -> another answer.
        fails: whether it is down.
    """

    says: dict[str, str] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fails: bool = False

    def __call__(self, call: Call) -> Completion:
        if self.fails:
            raise ConnectionError("the frontier is down")
        self.calls.append(call.query.id or "")
        (true,) = {INTENT_OF[word] for word in call.query.text.split() if word in INTENT_OF}
        answer = self.says.get(call.query.text, true)
        return Completion(answer, input_tokens=100, output_tokens=5, model="big-1")


def accuracy(small: ClassifierStudent, queries: list[tuple[Query, str]]) -> float:
    return float(np.mean([small(Call(SMALL, query)).text == intent for query, intent in queries]))


def options(**changes: Any) -> LoopOptions:
    plain = LoopOptions(
        budget=Budget(lessons=60),
        gate=GateOptions(margin=0.05),
        fit=FitOptions(router=None),
        progress=False,
    )
    return replace(plain, **changes)


@cache
def beginning() -> tuple[ClassifierStudent, Release]:
    """The student and the first release of every world."""
    small = student()
    asked = [Reference(query, intent) for query, intent in traffic(600, seed=1)]
    with TemporaryDirectory() as folder:
        outcomes = Path(folder) / "first.jsonl"
        collect(asked, {SMALL: small, BIG: Frontier()}, outcomes, portfolio=portfolio(), progress=False)
        return small, fit(outcomes, portfolio(), alpha=0.1, delta=0.1, options=FitOptions(router=None))


def serve(loop: DistillationLoop, queries: list[tuple[Query, str]]) -> None:
    dispatcher = Dispatcher(loop.serving.release(), loop.tiers, listeners=[loop.store.record])
    for query, _ in queries:
        dispatcher.run(query)
    loop.store.flush()


@dataclass
class World:
    """A loop with its store, a student, a frontier and the first release."""

    folder: Path
    store: TraceStore
    frontier: Frontier
    small: ClassifierStudent
    release: Release

    @classmethod
    def begun(cls, folder: Path, store: TraceStore) -> World:
        small, release = beginning()
        return cls(folder, store, Frontier(), small, release)

    def loop(self, **changes: Any) -> DistillationLoop:
        tiers = {SMALL: self.small, BIG: self.frontier}
        return DistillationLoop(self.folder / "distillation", self.store, tiers, self.release, options(**changes))


PROMISE = Promise(alpha=0.1, delta=0.1)
