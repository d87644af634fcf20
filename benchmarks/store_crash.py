"""What of the trace store survives: writers killed at random moments, and a PostgreSQL server killed under load.

Kill: 200 times a process that writes traces and signals as fast as it can, and says which were acknowledged, is ended
by SIGKILL at a random moment. The store is then opened and every acknowledged row is looked for, whole. SQLite and
PostgreSQL by turns, each round into the same database as those before it.

Restart: three processes answer requests, each of which records a trace and a signal; the server is killed (SIGQUIT) in
the middle and started again after five seconds. What was acknowledged is looked for, and how long `record` took is
compared with the same requests before.

    python benchmarks/store_crash.py [kill] [restart]
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter, sleep
from typing import Any

import numpy as np
from sqlalchemy import text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from postgres import PostgresServer  # noqa: E402

from routenlp_plugins import Attempt, Completion, Query, StoreOptions, Trace, TraceStore  # noqa: E402

ROUNDS = 200
PROCESSES, SECONDS, KILLED_AFTER, DOWN = 3, 20.0, 7.0, 5.0
FILE = Path(__file__).parent / "results" / "store_crash.json"


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2])
    elif sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], sys.argv[3])
    else:
        wanted = sys.argv[1:] or ["kill", "restart"]
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        with TemporaryDirectory() as folder:
            for parent in (Path(folder), *Path(folder).parents[:-2]):
                if os.geteuid() == 0:
                    parent.chmod(parent.stat().st_mode | 0o055)
            server = PostgresServer(_made(Path(folder) / "postgres"))
            server.start()
            try:
                if "kill" in wanted:
                    results["kill"] = kill({"sqlite": f"sqlite:///{folder}/kill.db", "postgresql": server.make("kill")})
                if "restart" in wanted:
                    results["restart"] = restart(server)
            finally:
                server.stop()
        FILE.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=2))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def trace(name: str) -> Trace:
    """Of two calls; every text of it tells whose it is."""
    attempts = (
        Attempt("small", False, 0.4, 0.9, Completion(f"a guess about {name}", confidence=0.4, cost_usd=1e-5)),
        Attempt("frontier", True, completion=Completion(f"the answer to {name}", mean_logprob=-0.1, cost_usd=1e-3)),
    )
    return Trace(Query(f"what about {name}? " * 20, "t", f"query-{name}"), "t", attempts, "frontier: not accepted")


# writers that are killed


def write(url: str) -> None:
    """Write until the end, and print what was acknowledged."""
    rng = random.Random(os.getpid())
    store = TraceStore(url, options=StoreOptions(batch=rng.choice((1, 20, 500)), interval=0.001))
    lock = threading.Lock()

    def told(line: str) -> Any:
        def tell(future: Any) -> None:
            if future.exception() is None:
                with lock:
                    os.write(1, line.encode())

        return tell

    waiting = threading.Semaphore(2000)
    for i in range(10**9):
        name = f"{os.getpid()}-{i}"
        waiting.acquire()
        future = store.record(trace(name), name)
        future.add_done_callback(lambda _: waiting.release())
        future.add_done_callback(told(f"t {name}\n"))
        if i % 3 == 0:
            store.signal(name, "thumbs", i % 2).add_done_callback(told(f"s {name}\n"))


def kill(urls: dict[str, str]) -> dict[str, Any]:
    """What was acknowledged before a kill and is not there, or not whole, after it."""
    rng = random.Random(0)
    found: dict[str, Any] = {
        name: {"rounds": 0, "acknowledged": 0, "lost": 0, "halves": 0, "in_flight": 0} for name in urls
    }
    for number in range(ROUNDS):
        backend = list(urls)[number % len(urls)]
        told = found[backend]
        process = subprocess.Popen([sys.executable, __file__, "write", urls[backend]], stdout=subprocess.PIPE)
        assert process.stdout is not None
        first = process.stdout.readline()
        # beyond the pipe's capacity a writer would wait for its reader
        rest: list[bytes] = []
        reader = threading.Thread(target=lambda out=process.stdout, into=rest: into.extend(out))
        reader.start()
        sleep(rng.uniform(0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
        process.stdout.close()
        lines = [line.decode().split() for line in (first, *rest) if line.endswith(b"\n")]
        traces = {name for kind, name in lines if kind == "t"}
        signals = {name for kind, name in lines if kind == "s"}
        kept, halves, given = checked(urls[backend], str(process.pid))
        told["rounds"] += 1
        told["acknowledged"] += len(traces) + len(signals)
        told["lost"] += len(traces - kept) + len(signals - given)
        told["halves"] += halves
        told["in_flight"] += len(kept - traces)
        if number % 20 == 19:
            print(number + 1, found, file=sys.stderr, flush=True)
    return found


def checked(url: str, writer: str) -> tuple[set[str], int, set[str]]:
    """Traces of a writer that are whole, how many rows are not, and the runs its signals are about."""
    with TraceStore(url) as store, store.engine.connect() as connection:
        mine = {"mine": f"{writer}-%"}
        rows = connection.execute(text("SELECT id FROM traces WHERE id LIKE :mine"), mine).scalars().all()
        calls: dict[str, int] = dict(
            connection.execute(
                text("SELECT trace_id, count(*) FROM calls WHERE trace_id LIKE :mine GROUP BY trace_id"), mine
            )
            .tuples()
            .all()
        )
        texts: dict[str, str] = dict(
            connection.execute(text("SELECT trace_id, text FROM contents WHERE trace_id LIKE :mine"), mine).all()
        )
        runs = set(connection.execute(text("SELECT trace_id FROM runs WHERE trace_id LIKE :mine"), mine).scalars())
        whole = {
            name for name in rows if calls.get(name) == 2 and texts.get(name) == trace(name).query.text and name in runs
        }
        orphans = (set(calls) | set(texts) | runs) - set(rows)
        given = set(connection.execute(text("SELECT run_id FROM signals WHERE run_id LIKE :mine"), mine).scalars())
        if connection.dialect.name == "sqlite":
            assert connection.scalar(text("PRAGMA quick_check")) == "ok"
    return whole, len(set(rows) - whole) + len(orphans), given


# a server that is killed


def serve(url: str, name: str) -> None:
    """Answer requests for a while; print what was acknowledged, and how long the store kept each of them."""
    store = TraceStore(url, options=StoreOptions(interval=0.01))
    futures, times = {}, []
    begin = perf_counter()
    print("ready", flush=True)
    i = 0
    while perf_counter() - begin < SECONDS:
        sleep(0.002)
        start = perf_counter()
        futures[f"{name}-{i}"] = store.record(trace(f"{name}-{i}"), f"{name}-{i}")
        store.signal(f"{name}-{i}", "thumbs", 1)
        times.append((start - begin, (perf_counter() - start) * 1e3))
        i += 1
    store.flush(120)
    acknowledged = [run for run, future in futures.items() if future.exception() is None]
    store.close()
    print(json.dumps({"acknowledged": acknowledged, "recorded": len(futures), "times": times}), flush=True)


def restart(server: PostgresServer) -> dict[str, Any]:
    """What was acknowledged and is not there, and what the requests noticed."""
    url = server.make("restart")
    TraceStore(url).close()
    command = [sys.executable, __file__, "serve", url]
    processes = [subprocess.Popen([*command, f"p{k}"], stdout=subprocess.PIPE, text=True) for k in range(PROCESSES)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    sleep(KILLED_AFTER)
    server.stop()
    sleep(DOWN)
    server.start()
    told = [json.loads(process.communicate()[0]) for process in processes]
    with TraceStore(url) as store, store.engine.connect() as connection:
        kept = set(connection.execute(text("SELECT id FROM traces")).scalars())
        signals = connection.scalar(text("SELECT count(*) FROM signals"))
        dropped = store.counts().dropped
    acknowledged = {run for one in told for run in one["acknowledged"]}
    before = [ms for one in told for at, ms in one["times"] if at < KILLED_AFTER - 1]
    during = [ms for one in told for at, ms in one["times"] if KILLED_AFTER <= at < KILLED_AFTER + DOWN]
    return {
        "processes": PROCESSES,
        "seconds_down": DOWN,
        "recorded": sum(one["recorded"] for one in told),
        "acknowledged": len(acknowledged),
        "lost": len(acknowledged - kept),
        "dropped": dropped,
        "signals": signals,
        "record_and_signal_ms": {
            when: {
                "requests": len(of),
                "p50": round(float(np.median(of)), 4),
                "p99": round(float(np.quantile(of, 0.99)), 4),
            }
            for when, of in (("server up", before), ("server down", during))
        },
    }


if __name__ == "__main__":
    main()
