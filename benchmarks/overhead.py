"""What routing itself costs: `RouterChatModel.invoke` beside the bare fake model it calls, and the import.

Calls of both are made in turn within one run, so that they meet the same machine. Times are noisy; the differences
and ratios are what counts.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from langchain_core.language_models.fake_chat_models import FakeListChatModel

from langchain_routenlp import RouterChatModel
from routenlp_plugins import Completion, Policy, Portfolio, Release, Task, Tier
from routenlp_plugins.policy import Confidence, Rung
from routenlp_plugins.testing import ScriptedTier

CALLS, WARM_UP, IMPORTS = 3000, 200, 11
GATED = Rung("small", 0.5, (Confidence.plain("small"),))
PORTFOLIO = Portfolio((Tier("small", 0.1, 0.1), Tier("frontier", 1, 1)), "frontier", (Task("t"),))


def main() -> None:
    results = {"calls": CALLS, "invoke": invoke(), "import": imports()}
    file = Path(__file__).parent / "results" / "overhead.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def invoke() -> dict[str, dict[str, float]]:
    """Median microseconds a call: the bare model, and the router in front of it."""
    bare = FakeListChatModel(responses=["yes"])
    unsure = ScriptedTier(default=Completion("no", confidence=0.1))
    models = {
        "bare model": bare,
        "router, first tier accepted": router({"small": bare, "frontier": bare}, Rung("small")),
        "router, one escalation": router({"small": unsure, "frontier": bare}, GATED),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(WARM_UP + CALLS):
        for name, model in models.items():
            start = perf_counter()
            model.invoke("Where is my card?")
            if i >= WARM_UP:
                times[name].append((perf_counter() - start) * 1e6)
        unsure.calls.clear()
    bare_median = median(times["bare model"])
    return {
        name: {
            "median_us": round(median(of), 1),
            "added_us": round(median(of) - bare_median, 1),
            "ratio": round(median(of) / bare_median, 2),
        }
        for name, of in times.items()
    }


def router(tiers: dict[str, object], rung: Rung) -> RouterChatModel:
    return RouterChatModel(tiers=tiers, release=Release(PORTFOLIO, Policy("frontier", {"t": (rung,)})))


def imports() -> dict[str, object]:
    """Milliseconds of a warm import in a fresh interpreter, beside one of numpy, and what it loads."""
    code = "import sys, time; s = time.perf_counter(); import {0}; print((time.perf_counter() - s) * 1e3, *sys.modules)"
    ours: list[float] = []
    numpy: list[float] = []
    heavy: set[str] = set()
    for _ in range(IMPORTS):
        for name, times in (("routenlp_plugins", ours), ("numpy", numpy)):
            done = subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, check=True)
            milliseconds, *modules = done.stdout.split()
            times.append(float(milliseconds))
            if name == "routenlp_plugins":
                heavy |= {
                    m for m in modules if m in {"torch", "langchain_core", "llama_index", "dspy", "numpy", "sklearn"}
                }
    return {
        "median_ms": round(median(ours), 2),
        "numpy_median_ms": round(median(numpy), 2),
        "ratio_to_numpy": round(median(ours) / median(numpy), 3),
        "frameworks_or_arrays_loaded": sorted(heavy),
    }


if __name__ == "__main__":
    main()
