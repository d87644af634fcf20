"""How long a prediction before a call takes, how long a router takes to train, and how much memory.

Texts and outcomes are those of `routellm_mmlu`: 14,042 queries, two tiers. Medians over single prompts; a batch of
10,000; the default training on all of them. Everything beside the hashing of one megabyte in the same run, since times
of a shared machine mean little alone.

    ROUTENLP_DATA=... python benchmarks/routing_speed.py
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from hashlib import sha256
from statistics import median
from time import perf_counter

from local_tiers import HERE
from routers import Recorded

from routenlp_plugins import DifficultyRouter, HashedNgrams, Observations, TransformerEncoder
from routenlp_plugins.routing.difficulty import TrainingOptions

SINGLE, BATCH = 500, 10_000


def main() -> None:
    data = Recorded.read("routellm_mmlu")
    texts, tasks = list(data.texts), [str(task) for task in data.tasks]
    good = {tier: data.quality[:, k] for k, tier in enumerate(data.tiers)}
    start = perf_counter()
    router = DifficultyRouter.train(Observations(texts, tasks, good), TrainingOptions()).router
    results: dict[str, object] = {
        "hashing a megabyte, ms": round(1e3 * timed(lambda: sha256(b"x" * 2**20).digest(), 50), 3),
        "training 14,042 x 2, s": round(perf_counter() - start, 1),
        "kind": router.kind,
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    prompts = iter(range(SINGLE))

    def one() -> None:
        place = next(prompts)
        router([texts[place]], [tasks[place]])

    results["decision, default encoder, median ms"] = round(1e3 * timed(one, SINGLE), 3)
    start = perf_counter()
    router(texts[:BATCH], tasks[:BATCH])
    results["batch of 10,000, a second"] = round(BATCH / (perf_counter() - start))
    assert isinstance(router.encoder, HashedNgrams)
    minilm = TransformerEncoder.minilm()
    few = list(range(0, len(texts), len(texts) // 300))[:300]
    small = Observations([texts[i] for i in few], [tasks[i] for i in few], {t: of[few] for t, of in good.items()})
    with_minilm = DifficultyRouter.train(small, TrainingOptions(encoder=minilm)).router
    more = iter(range(100))

    def encoded() -> None:
        place = next(more)
        with_minilm([texts[place]], [tasks[place]])

    results["decision, MiniLM, median ms"] = round(1e3 * timed(encoded, 100), 3)
    (HERE / "results" / "routing_speed.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def timed(action: Callable[[], object], times: int) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(times):
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return median(seconds)


if __name__ == "__main__":
    main()
