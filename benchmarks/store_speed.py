"""What the trace store costs: traces a second, and what a request notices of it.

Throughput: 30,000 traces of one call and one signal for every tenth, put as fast as they can be and flushed, in a
process of its own; the texts are 500 and 200 characters long. Beside it how many rows of two numbers the standard
library inserts in a second in the same run.

Added to a request: requests that wait 2 ms, as for a network, 400 a second, every other one with `record` and a signal.
What is compared are whole requests, so that a thread that writes and keeps the interpreter busy is noticed too.

    python benchmarks/store_speed.py
"""

from __future__ import annotations

import json
import os
import resource
import sqlite3
import sys
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from postgres import PostgresServer  # noqa: E402

from routenlp_plugins import Attempt, Completion, Query, StoreOptions, Trace, TraceStore  # noqa: E402

TRACES, REQUESTS, PAUSE = 30_000, 8_000, 0.002


def main() -> None:
    with TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            Path(folder).chmod(0o755)
        (Path(folder) / "postgres").mkdir()
        server = PostgresServer(Path(folder) / "postgres")
        server.start()
        try:
            urls = {"sqlite": f"sqlite:///{folder}/speed.db", "postgresql": server.make("speed")}
            results: dict[str, Any] = {"traces": TRACES, "cores": os.cpu_count()}
            for name, url in urls.items():
                results[name] = apart(throughput, url)
            results["bare inserts into sqlite, a second"] = round(apart(bare, f"{folder}/bare.db"))
            for name, url in urls.items():
                results[name] |= apart(added, url)
        finally:
            server.stop()
    file = Path(__file__).parent / "results" / "store_speed.json"
    file.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def apart(work: Any, *given: Any) -> Any:
    """In a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, given)


def trace(i: int) -> Trace:
    completion = Completion(
        f"answer {i} ".ljust(200, "."), mean_logprob=-0.1, model="m", input_tokens=120, output_tokens=50, cost_usd=1e-3
    )
    query = Query(f"question {i} ".ljust(500, "."), "t", f"q{i}")
    return Trace(query, "t", (Attempt("frontier", True, completion=completion),), "frontier: task 't' stays")


def throughput(url: str) -> dict[str, float]:
    """Traces a second, until the last is committed, and the peak of memory."""
    traces = [trace(i) for i in range(TRACES)]
    with TraceStore(url, options=StoreOptions(capacity=2 * TRACES)) as store:
        start = perf_counter()
        for i, one in enumerate(traces):
            store.record(one, f"run-{i}")
            if i % 10 == 0:
                store.signal(f"run-{i}", "thumbs", 1)
        store.flush()
        seconds = perf_counter() - start
        assert store.counts().traces == TRACES
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"traces_a_second": round(TRACES / seconds), "peak_mb": round(peak)}


def bare(file: str) -> float:
    """Rows of two numbers a second, 500 in a transaction, with the standard library alone."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b REAL)")
    start = perf_counter()
    for first in range(0, TRACES, 500):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT INTO t VALUES (?, ?)", [(first + i, 0.5) for i in range(500)])
        connection.execute("COMMIT")
    return TRACES / (perf_counter() - start)


def added(url: str) -> dict[str, Any]:
    """Milliseconds of requests with and without the store, by turns, and of the two calls alone."""
    times: dict[bool, list[float]] = {False: [], True: []}
    calls = []
    with TraceStore(url) as store:
        for i in range(REQUESTS):
            start = perf_counter()
            sleep(PAUSE)
            if i % 2:
                one = trace(i)
                before = perf_counter()
                store.record(one)
                store.signal(f"q{i}", "thumbs", 1)
                calls.append((perf_counter() - before) * 1e3)
            else:
                trace(i)
            times[bool(i % 2)].append((perf_counter() - start) * 1e3)
        store.flush()
    with_it, without = (np.array(times[kind]) for kind in (True, False))
    return {
        "request_ms": {
            f"p{share}": {
                "without": round(float(np.percentile(without, share)), 3),
                "with": round(float(np.percentile(with_it, share)), 3),
                "added": round(float(np.percentile(with_it, share) - np.percentile(without, share)), 3),
            }
            for share in (50, 99)
        },
        "record_and_signal_ms": {f"p{share}": round(float(np.percentile(calls, share)), 4) for share in (50, 99)},
    }


if __name__ == "__main__":
    main()
