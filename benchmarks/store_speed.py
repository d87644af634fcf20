"""What the trace store costs: traces a second, and what a request notices of it.

Throughput: 30,000 traces of one call and one signal for every tenth, put as fast as they can be and flushed, in a
process of its own; the texts are 500 and 200 characters long. Beside it how many rows of two numbers the standard
library inserts in a second in the same run.

Added to a request: requests that wait 2 ms, as for a network, 400 a second, every other one with `record` and a signal.
What is compared are whole requests, so that a thread that writes and keeps the interpreter busy is noticed too.

Report: what `routenlp report` computes, over 1,000,000 traces with 1.2 calls, texts of 700 characters and 0.1 signals
each; the rows are made by the database itself.

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

from routenlp_plugins import (  # noqa: E402
    Attempt,
    Completion,
    Portfolio,
    Query,
    StoreOptions,
    Task,
    Tier,
    Trace,
    TraceStore,
    ledger,
)

TRACES, REQUESTS, PAUSE = 30_000, 24_000, 0.002
LARGE = 1_000_000


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
            for name, url in {"sqlite": f"sqlite:///{folder}/large.db", "postgresql": server.make("large")}.items():
                results[name]["report over 1,000,000 traces"] = apart(report, url)
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


def report(url: str) -> dict[str, float]:
    """Seconds and the peak of memory of the bill and the counts of a large store."""
    portfolio = Portfolio((Tier("small", 0.1, 0.1), Tier("frontier", 10, 10)), "frontier", (Task("t"),))
    with TraceStore(url) as store:
        fill(store)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = perf_counter()
        bill = ledger(store, portfolio)
        counts = store.counts()
        seconds = perf_counter() - start
        assert bill.traces == counts.traces == LARGE
        assert bill.saved_usd is not None
        assert bill.saved_usd > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": round(seconds, 2), "peak_mb": round(peak / 1024), "added_mb": round((peak - before) / 1024)}


def fill(store: TraceStore) -> None:
    """A fifth of the queries goes on to the frontier, a fiftieth of all is audited, a tenth has thumbs."""
    sqlite = store.engine.dialect.name == "sqlite"
    if sqlite:
        numbers = f"WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {LARGE - 1})"
    else:
        numbers = f"WITH n(i) AS (SELECT * FROM generate_series(0, {LARGE - 1}))"
    name = "printf('run-%08d', i)" if sqlite else "'run-' || lpad(i::text, 8, '0')"
    words = "printf('%.700c', 'x')" if sqlite else "repeat('x', 700)"
    escalated = "i / 5 * 5 = i"
    columns = "trace_id, position, purpose, tier, accepted, input_tokens, output_tokens, cost_usd, latency_ms"
    small = f"{name}, 0, 'answer', 'small', NOT ({escalated}), 120, 50, 0.00002, 30.0"
    frontier = "'frontier', {accepted}, 120, 50, 0.0017, 900.0"
    answered = f"{name}, 1, 'answer', {frontier.format(accepted='TRUE')}"
    audit = f"{name}, 2, 'audit', {frontier.format(accepted='FALSE')}"
    statements = [
        "INSERT INTO traces (id, at, origin, query_id, task, unit, tier, reason, propensity) "
        f"{numbers} SELECT {name}, 1.7e9 + i, 'served', 'q' || i, 't', NULL, "
        f"CASE WHEN {escalated} THEN 'frontier' ELSE 'small' END, 'because', 0.02 FROM n",
        f"INSERT INTO calls ({columns}) {numbers} SELECT {small} FROM n",
        f"INSERT INTO calls ({columns}) {numbers} SELECT {answered} FROM n WHERE {escalated}",
        f"INSERT INTO calls ({columns}) {numbers} SELECT {audit} FROM n WHERE (i - 1) / 50 * 50 = i - 1",
        f"INSERT INTO contents (trace_id, text, answers) {numbers} SELECT {name}, {words}, '{{}}' FROM n",
        f"INSERT INTO runs (run_id, trace_id) {numbers} SELECT 'q' || i, {name} FROM n",
        "INSERT INTO signals (run_id, kind, source, tier, other, value, given, at) "
        f"{numbers} SELECT 'q' || i, 'thumbs', 'user', '', '', i - i / 2 * 2, 1, 1.7e9 + i FROM n "
        "WHERE i / 10 * 10 = i",
    ]
    with store.engine.execution_options(writes=True).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)
    with store.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


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
