"""What others have recorded, read into a store: every form, and every line that cannot be read."""

from __future__ import annotations

import json

import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio, record, rows, write_jsonl
from typer.testing import CliRunner

from routenlp_plugins import (
    Attempt,
    Completion,
    DataError,
    ImportOptions,
    Portfolio,
    PortfolioError,
    Query,
    Tier,
    Trace,
    TraceStore,
    import_traces,
)
from routenlp_plugins.cli import app
from routenlp_plugins.evaluate.outcomes import outcome_line, read_outcomes


@pytest.fixture
def store(tmp_path):
    with TraceStore(tmp_path / "traces.db") as opened:
        yield opened


def request(**facts):
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "where is my card?"}]
    return {"model": "gpt-x", "messages": messages, **facts}


def response(**facts):
    message = {"role": "assistant", "content": "in your drawer"}
    usage = {"prompt_tokens": 12, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
    tokens = [{"token": "in", "logprob": -0.5, "top_logprobs": []}]
    choice = {"index": 0, "message": message, "logprobs": {"content": tokens}}
    return {"id": "chatcmpl-1", "created": 1000, "model": "gpt-x-2026", "choices": [choice], "usage": usage, **facts}


def test_requests_with_their_responses_become_traces(store, tmp_path):
    file = write_jsonl(
        tmp_path / "log.jsonl",
        {"request": request(), "response": response()},
        {"request": request(tools=[{}]), "response": response(id="chatcmpl-2")},
        {"request": request(), "response": {"error": {"message": "rate limit"}}},
    )
    options = ImportOptions(portfolio(), "support", {"gpt-x-2026": MIDDLE})
    done = import_traces(store, file, "openai", options)
    assert (done.traces, done.signals, done.skipped) == (3, 0, 0)
    first, tools, failed = store.traces()
    (attempt,) = first.trace.attempts
    assert (first.id, first.at, first.origin, first.trace.task) == ("chatcmpl-1", 1000.0, "imported", "support")
    assert first.trace.query.text == "where is my card?"
    assert (attempt.tier, attempt.accepted, attempt.completion.text) == (MIDDLE, True, "in your drawer")
    assert (attempt.completion.model, attempt.completion.cached_tokens) == ("gpt-x-2026", 8)
    assert attempt.completion.token_logprobs == (-0.5,)
    assert attempt.completion.cost_usd == pytest.approx(16e-6)
    assert tools.id == "chatcmpl-2"
    assert failed.trace.attempts[0].error == "no answer: rate limit"
    assert failed.trace.attempts[0].tier == FRONTIER


def test_an_import_may_be_repeated(store, tmp_path):
    file = write_jsonl(tmp_path / "log.jsonl", {"request": request(), "response": response()}, request_only_chat())
    for _ in range(2):
        import_traces(store, file, "openai")
    assert store.counts().traces == 2


def request_only_chat():
    return {"messages": [{"role": "user", "content": "where?"}, {"role": "assistant", "content": "there"}]}


def test_requests_and_responses_of_a_batch_are_joined(store, tmp_path):
    asked = {"custom_id": "job-1", "method": "POST", "url": "/v1/chat/completions", "body": request()}
    answered = {"id": "batch_req_1", "custom_id": "job-1", "response": {"status_code": 200, "body": response()}}
    files = [write_jsonl(tmp_path / "in.jsonl", asked), write_jsonl(tmp_path / "out.jsonl", answered)]
    import_traces(store, files, "openai")
    (found,) = store.traces()
    assert (found.id, found.trace.query.text) == ("chatcmpl-1", "where is my card?")
    assert found.runs == {"job-1": None}
    with pytest.raises(DataError, match=r"in.jsonl:1: custom_id 'job-1' has no response"):
        import_traces(store, files[0], "openai")


def test_a_chat_that_ends_with_the_answer_is_one(store, tmp_path):
    import_traces(store, write_jsonl(tmp_path / "chat.jsonl", request_only_chat()), "openai")
    (found,) = store.traces()
    assert (found.trace.query.text, found.trace.attempts[0].completion.text) == ("where?", "there")


def test_outcomes_come_back_as_they_were(store, tmp_path):
    given = tmp_path / "outcomes.jsonl"
    given.write_text("".join(outcome_line(row) + "\n" for row in rows(50)))
    done = import_traces(store, given, "outcomes", ImportOptions(portfolio()))
    assert (done.traces, done.signals) == (50, 150)
    back = {row.query.id: row for row in store.outcomes()}
    for row in read_outcomes(given):
        found = back[row.query.id]
        assert {t: (o.quality, o.completion.text, o.completion.confidence) for t, o in found.outcomes.items()} == {
            t: (o.quality, o.completion.text, o.completion.confidence) for t, o in row.outcomes.items()
        }


BAD = [
    ("openai", "not json", r"bad.jsonl:2: not a complete JSON object"),
    ("openai", "[1]", r"bad.jsonl:2: expected one JSON object per line, got list"),
    ("openai", '{"messages": "hello"}', r"bad.jsonl:2: messages: expected the messages of a chat"),
    ("openai", '{"messages": [{"role": "user", "content": "a"}]}', r"bad.jsonl:2: response: missing"),
    ("langsmith", '{"id": "a"}', r"bad.jsonl:2: neither a run"),
    (
        "langsmith",
        '{"id": "a", "run_type": "llm", "inputs": {}}',
        r"bad.jsonl:2: inputs: expected messages",
    ),
    ("langsmith", '{"key": "stars", "run_id": "r", "score": 4}', r"bad.jsonl:2: feedback 'stars': score must be in"),
    ("outcomes", '{"query_id": "q"}', r"bad.jsonl:2: task: Field required"),
]
GOOD = {"openai": request_only_chat(), "langsmith": {"id": "x", "run_type": "chain"}, "outcomes": record()}


@pytest.mark.parametrize(("form", "line", "message"), BAD)
def test_a_line_that_cannot_be_read_is_an_error_with_its_place(store, tmp_path, form, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps(GOOD[form]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message):
        import_traces(store, file, form, ImportOptions(portfolio()))
    done = import_traces(store, file, form, ImportOptions(portfolio(), skip_bad_lines=True))
    assert done.skipped == 1


def test_outcomes_that_are_imported_twice_cost_once_and_are_told(store, tmp_path):
    file = write_jsonl(tmp_path / "outcomes.jsonl", record("a"), record("b"))
    first, second = (import_traces(store, file, "outcomes", ImportOptions(portfolio())) for _ in range(2))
    assert (first.traces, first.known, second.traces, second.known) == (2, 0, 2, 2)
    assert store.counts().calls == 4
    assert {row.propensity for row in store.outcomes(labelled=True)} == {1.0}


def test_an_id_that_is_used_again_for_another_question_is_refused(store, tmp_path):
    import_traces(store, write_jsonl(tmp_path / "jan.jsonl", record("0")), "outcomes", ImportOptions(portfolio()))
    other = write_jsonl(tmp_path / "feb.jsonl", {**record("0"), "text": "another question"})
    with pytest.raises(DataError, match="0: a trace of this id is in the store and has another text"):
        import_traces(store, other, "outcomes", ImportOptions(portfolio()))


def test_what_reviewers_say_of_routed_queries_finds_each_answer(store, tmp_path):
    small = Attempt(SMALL, True, completion=Completion("so", input_tokens=1, output_tokens=1))
    for name in ("alone", "both"):
        store.record(Trace(Query("q", "t"), "t", (small,), ""), name, propensity=1.0)
    dear = Attempt(FRONTIER, False, completion=Completion("no", input_tokens=1, output_tokens=1))
    store.record_calls("both", "audit", [dear])
    store.flush()
    lines = [json.loads(outcome_line(row)) for row in store.outcomes()]
    for line in lines:
        for tier, outcome in line["outcomes"].items():
            outcome["quality"] = float(tier == FRONTIER)
    import_traces(store, write_jsonl(tmp_path / "review.jsonl", *lines), "outcomes", ImportOptions(portfolio()))
    found = {row.query.id: {tier: one.quality for tier, one in row.outcomes.items()} for row in store.outcomes()}
    assert found == {"alone": {SMALL: 0.0}, "both": {SMALL: 0.0, FRONTIER: 1.0}}
    assert store.counts().calls == 3


def test_a_model_is_the_tier_of_its_name_and_the_request_helps(store, tmp_path):
    tiers = Portfolio((Tier("gpt-4o-mini", 0.15, 0.6), Tier("gpt-4o", 2.5, 10)), "gpt-4o")
    file = write_jsonl(
        tmp_path / "log.jsonl",
        *(
            {"request": request(model=asked), "response": response(id=asked, model=answered)}
            for asked, answered in (("gpt-4o", "gpt-4o-2024-08-06"), ("gpt-4o-mini", "served"), ("other", "strange"))
        ),
    )
    import_traces(store, file, "openai", ImportOptions(tiers))
    found = {one.id: one.trace.attempts[0].tier for one in store.traces()}
    assert found == {"gpt-4o": "gpt-4o", "gpt-4o-mini": "gpt-4o-mini", "other": "gpt-4o"}
    with pytest.raises(PortfolioError, match="unknown tier"):
        ImportOptions(tiers, tiers={"x": "nobody"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "x", "run_type": "llm", "inputs": {"prompt": "hi"}, "outputs": {}, "total_cost": "n/a"}, None),
        ({"run_id": "r", "key": "thumbs", "score": 1, "created_at": 1.8e12}, "a time is seconds since 1970"),
    ],
)
def test_numbers_of_langsmith_that_are_none_are_told(store, tmp_path, line, message):
    if message is None:
        line["outputs"] = {"generations": [[{"text": "hello"}]]}
        message = "total_cost: expected a number, got 'n/a'"
    with pytest.raises(DataError, match=message):
        import_traces(store, write_jsonl(tmp_path / "runs.jsonl", line), "langsmith")


def test_annotators_are_sources_of_their_own(store, tmp_path):
    lines = [
        {"run_id": "r", "key": "audit", "score": score, "feedback_source": {"metadata": {"user_id": who}}}
        for who, score in (("ann", 1), ("bob", 0))
    ]
    assert import_traces(store, write_jsonl(tmp_path / "f.jsonl", *lines), "langsmith").signals == 2
    assert store.counts().signals == 2


def test_a_form_that_is_none_and_outcomes_without_a_frontier_are_refused(store, tmp_path):
    file = write_jsonl(tmp_path / "outcomes.jsonl", record())
    with pytest.raises(DataError, match="format must be one of openai, langsmith, outcomes, got 'csv'"):
        import_traces(store, file, "csv")
    with pytest.raises(DataError, match="a portfolio is needed"):
        import_traces(store, file, "outcomes")


def test_the_command_line_imports_and_exports(tmp_path):
    (tmp_path / "portfolio.yaml").write_text(
        "frontier: frontier\ntiers:\n  - {name: small, input_usd_per_mtok: 1, output_usd_per_mtok: 1}\n"
        "  - {name: frontier, input_usd_per_mtok: 10, output_usd_per_mtok: 10}\n"
    )
    given = write_jsonl(tmp_path / "given.jsonl", record("a"), record("b"))
    store = ["--store", str(tmp_path / "traces.db")]
    options = [*store, "--format", "outcomes", "--portfolio", str(tmp_path / "portfolio.yaml")]
    read = CliRunner().invoke(app, ["import", str(given), *options])
    assert (read.exit_code, read.output.strip()) == (0, "2 traces and 4 signals read")
    written = CliRunner().invoke(app, ["export", str(tmp_path / "out.jsonl"), *store, "--beside", "shadow"])
    assert written.exit_code == 0, written.output
    assert "2 rows, 2 of them with a quality" in " ".join(written.output.split())
    assert {tuple(row.outcomes) for row in read_outcomes(tmp_path / "out.jsonl")} == {(FRONTIER, SMALL)}
    again = CliRunner().invoke(app, ["export", str(tmp_path / "out.jsonl"), *store])
    assert again.exit_code == 2
    assert "exists already" in again.output
    wrong = CliRunner().invoke(app, ["import", str(given), *store, "--format", "openai", "--tier", "gpt"])
    assert (wrong.exit_code, "expected MODEL=TIER" in wrong.output) == (2, True)
