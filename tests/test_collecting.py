from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import FRONTIER, SMALL, portfolio, write_jsonl

from routenlp_plugins import Call, Completion, DataError, PortfolioError, Query, Reference, Task, TierError, collect
from routenlp_plugins.evaluate.outcomes import read_outcomes
from routenlp_plugins.testing import ScriptedTier

PORTFOLIO = portfolio(Task("t", metric="accuracy"), Task("held", metric="accuracy", tiers=()))


def queries(n: int, task: str = "t") -> list[Reference]:
    return [Reference(Query(f"text {i}", task, f"{task}{i}"), "yes") for i in range(n)]


def tiers(**more):
    completion = Completion("yes", confidence=0.7, token_logprobs=(-0.1,), input_tokens=3, output_tokens=1)
    return {SMALL: ScriptedTier(default="no"), FRONTIER: ScriptedTier(default=completion), **more}


def test_every_tier_answers_every_query_it_may_serve(tmp_path):
    out = tmp_path / "o.jsonl"
    assert collect(queries(3) + queries(1, "held"), tiers(), out, portfolio=PORTFOLIO) == 4
    rows = read_outcomes(out)
    assert [sorted(row.outcomes) for row in rows] == [[FRONTIER, SMALL]] * 3 + [[FRONTIER]]
    assert [row.outcomes[SMALL].quality for row in rows[:3]] == [0, 0, 0]
    answered = rows[0].outcomes[FRONTIER]
    assert (answered.quality, answered.completion.confidence, answered.completion.token_logprobs) == (1, 0.7, (-0.1,))
    assert answered.completion.cost_usd == pytest.approx(4 * 10 / 1e6)


def test_collecting_goes_on_where_it_was_interrupted(tmp_path):
    out = tmp_path / "o.jsonl"

    with pytest.raises(Interrupt):
        collect(queries(9), tiers(frontier=interrupted_at("text 4")), out, portfolio=PORTFOLIO)
    written = out.read_text()
    out.write_text(written + '{"query_id": "t4", "ta')
    second = tiers()
    assert collect(queries(9), second, out, portfolio=PORTFOLIO) == 5
    assert [row.query.id for row in read_outcomes(out)] == [f"t{i}" for i in range(9)]
    assert out.read_text().startswith(written)
    assert len(second[FRONTIER].calls) == 5


class Interrupt(BaseException):
    """What a user pressing Ctrl-C looks like to a tier."""


def interrupted_at(text: str):
    def tier(call: Call) -> Completion:
        if call.query.text == text:
            raise Interrupt
        return Completion("yes", cost_usd=1.0)

    return tier


@pytest.mark.parametrize(
    "half", ['{"qu', '{"query_id": "t1", "task": "t", "outcomes": {"sm', '{"query_id": "t1", "text": "né', "{"]
)
def test_a_half_written_line_is_done_again(tmp_path, half):
    out = tmp_path / "o.jsonl"
    collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
    written = out.read_text(encoding="utf-8")
    out.write_bytes(written.encode() + half.encode()[:-1])
    assert collect(queries(2), tiers(), out, portfolio=PORTFOLIO) == 1
    assert out.read_text(encoding="utf-8").startswith(written + '{"query_id": "t1"')


@pytest.mark.parametrize("content", ["important notes", '{"other": 1}', "first\nsecond", '{"query_id": "x"}\n'])
def test_a_file_that_holds_something_else_is_left_alone(tmp_path, content):
    out = tmp_path / "o.jsonl"
    out.write_text(content)
    with pytest.raises(DataError, match=r"o\.jsonl:1: "):
        collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
    assert out.read_text() == content


def test_a_compressed_file_cannot_be_appended_to(tmp_path):
    with pytest.raises(DataError, match=r"o\.jsonl\.gz: outcomes are appended line by line"):
        collect(queries(1), tiers(), tmp_path / "o.jsonl.gz", portfolio=PORTFOLIO)


def test_a_finished_collection_calls_nothing(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(2), tiers(), out, portfolio=PORTFOLIO)
    again = tiers()
    assert collect(queries(2), again, out, portfolio=PORTFOLIO) == 0
    assert again[SMALL].calls == []


def test_several_workers_write_the_same_rows(tmp_path):
    for workers in (1, 4):
        collect(queries(20), tiers(), tmp_path / f"{workers}.jsonl", portfolio=PORTFOLIO, workers=workers)
    one, four = (read_outcomes(tmp_path / f"{workers}.jsonl") for workers in (1, 4))
    assert sorted(r.query.id for r in one) == sorted(r.query.id for r in four) == sorted(f"t{i}" for i in range(20))


def test_a_file_of_another_collection_is_not_touched(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(2), tiers(), out, portfolio=PORTFOLIO)
    before = out.read_bytes()
    with pytest.raises(DataError, match=r"o\.jsonl:1: belongs to another collection \(tier small\)"):
        collect(queries(2), {FRONTIER: ScriptedTier(default="yes")}, out, portfolio=PORTFOLIO)
    with pytest.raises(DataError, match=r"o\.jsonl:2: belongs to another collection \(query t1\)"):
        collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
    assert out.read_bytes() == before


def test_a_tier_that_fails_now_and_then_is_recorded_with_its_error(tmp_path):
    small = ScriptedTier({"text 1": ValueError("nonsense")}, default="yes")
    collect(queries(3), tiers(small=small), tmp_path / "o.jsonl", portfolio=PORTFOLIO)
    outcome = read_outcomes(tmp_path / "o.jsonl")[1].outcomes[SMALL]
    assert (outcome.quality, outcome.error) == (None, "ValueError: nonsense")


def test_what_failed_is_tried_again_and_what_did_not_is_kept(tmp_path):
    out = tmp_path / "o.jsonl"
    down = ScriptedTier({"text 1": OSError("refused")}, default="yes")
    collect(queries(3), tiers(small=down), out, portfolio=PORTFOLIO)
    second = tiers(small=ScriptedTier(default="yes"))
    assert collect(queries(4), second, out, portfolio=PORTFOLIO) == 2
    assert [call.query.id for call in second[SMALL].calls] == ["t3", "t1"]
    assert [call.query.id for call in second[FRONTIER].calls] == ["t3"]
    rows = read_outcomes(out)
    assert [row.query.id for row in rows] == ["t0", "t1", "t2", "t3"]
    assert [row.outcomes[SMALL].quality for row in rows] == [1, 1, 1, 1]
    assert list(tmp_path.iterdir()) == [out]


def test_failures_that_stay_do_not_keep_new_queries_waiting(tmp_path):
    out = tmp_path / "o.jsonl"
    refused = {f"text {i}": ValueError("content filter") for i in range(0, 24, 2)}
    collect(queries(24), tiers(small=ScriptedTier(refused, default="yes")), out, portfolio=PORTFOLIO)
    assert collect(queries(30), tiers(small=ScriptedTier(refused, default="yes")), out, portfolio=PORTFOLIO) == 18
    rows = read_outcomes(out)
    assert len(rows) == 30
    assert sum(row.outcomes[SMALL].error is not None for row in rows) == 12


def test_an_interruption_while_trying_again_keeps_what_was_paid_for(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(4), tiers(small=ScriptedTier(default=OSError("x"))), out, portfolio=PORTFOLIO)
    with pytest.raises(Interrupt):
        collect(queries(4), tiers(small=interrupted_at("text 3")), out, portfolio=PORTFOLIO)
    assert [row.outcomes[SMALL].quality for row in read_outcomes(out)] == [1, 1, 1, None]


def test_a_tier_that_was_added_is_run_on_what_is_there(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(2), {FRONTIER: ScriptedTier(default="yes")}, out, portfolio=portfolio(Task("t", "accuracy")))
    more = {FRONTIER: ScriptedTier(), SMALL: ScriptedTier(default="yes")}
    assert collect(queries(2), more, out, portfolio=portfolio(Task("t", "accuracy"))) == 2
    assert [sorted(row.outcomes) for row in read_outcomes(out)] == [[FRONTIER, SMALL]] * 2
    assert more[FRONTIER].calls == []


def test_a_tier_that_was_added_and_is_down_stops_the_collection(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(30), {FRONTIER: ScriptedTier(default="yes")}, out, portfolio=portfolio(Task("t", "accuracy")))
    down = ScriptedTier(default=OSError("refused"))
    with pytest.raises(TierError, match="tier 'small' failed 10 times in a row"):
        collect(queries(30), {FRONTIER: ScriptedTier(), SMALL: down}, out, portfolio=portfolio(Task("t", "accuracy")))
    assert len(down.calls) < 20
    assert len(read_outcomes(out)) == 30


def test_a_query_that_changed_is_another_collection(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(2), tiers(), out, portfolio=PORTFOLIO)
    changed = [queries(1)[0], Reference(Query("other text", "t", "t1"), "yes")]
    with pytest.raises(DataError, match="query t1 has another task, text, reference or group there"):
        collect(changed, tiers(), out, portfolio=PORTFOLIO)


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
    out.write_text(out.read_text().removesuffix("\n"))
    assert collect(queries(2), tiers(), out, portfolio=PORTFOLIO) == 1
    assert [row.query.id for row in read_outcomes(out)] == ["t0", "t1"]
    foreign = '{"query_id": "other", "task": "z", "outcomes": {"gpt": {"quality": 1.0}}}'
    out.write_text(foreign)
    with pytest.raises(DataError, match=r"belongs to another collection \(tier gpt\)"):
        collect(queries(2), tiers(), out, portfolio=PORTFOLIO)
    assert out.read_text() == foreign


def test_two_collections_of_one_file_do_not_mix(tmp_path):
    out = tmp_path / "o.jsonl"

    def small(call: Call) -> Completion:
        with pytest.raises(DataError, match=r"o\.jsonl: another collection or auditor is writing to it"):
            collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
        return Completion("yes")

    assert collect(queries(1), tiers(small=small), out, portfolio=PORTFOLIO) == 1
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_to_the_file_stays_a_link(tmp_path):
    real, link = tmp_path / "real.jsonl", tmp_path / "o.jsonl"
    link.symlink_to(real)
    collect(queries(1), tiers(small=ScriptedTier()), link, portfolio=PORTFOLIO)
    collect(queries(1), tiers(), link, portfolio=PORTFOLIO)
    assert link.is_symlink()
    assert read_outcomes(real)[0].outcomes[SMALL].quality == 0


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        collect(queries(1), tiers(), tmp_path, portfolio=PORTFOLIO)


def test_a_reference_that_cannot_be_scored_is_found_before_anything_is_paid(tmp_path):
    entities = portfolio(Task("t", "entity_f1"))
    asked = tiers()
    with pytest.raises(DataError, match="query 't0': reference: expected JSON"):
        collect(queries(1), asked, tmp_path / "o.jsonl", portfolio=entities)
    assert asked[FRONTIER].calls == []


@pytest.mark.parametrize(
    "odd",
    [
        Completion("x", confidence=1.5),
        Completion("x", confidence=float("nan")),
        Completion("x", confidence=True),
        Completion("x", confidence="0.9"),
        Completion("x", mean_logprob=1000.0),
        Completion("x", input_tokens=-1),
        Completion(None),
    ],
)
def test_what_no_answer_can_have_is_a_failure_of_the_tier(tmp_path, odd):
    out = tmp_path / "o.jsonl"
    collect(queries(1), tiers(small=ScriptedTier(default=odd)), out, portfolio=PORTFOLIO)
    assert "must be a" in read_outcomes(out)[0].outcomes[SMALL].error


def test_numbers_of_any_kind_and_odd_texts_can_be_read_back(tmp_path):
    odd = Completion(
        "a \ud800 b",
        confidence=np.float32(0.5),
        mean_logprob=1e-7,
        token_logprobs=(float("-inf"), np.float64(-0.5)),
        input_tokens=np.int64(3),
    )
    collect(queries(1), tiers(small=ScriptedTier(default=odd)), tmp_path / "o.jsonl", portfolio=PORTFOLIO)
    completion = read_outcomes(tmp_path / "o.jsonl")[0].outcomes[SMALL].completion
    assert (completion.text, completion.confidence, completion.input_tokens) == ("a ? b", 0.5, 3)
    assert (completion.mean_logprob, completion.token_logprobs) == (0, (-9999.0, -0.5))


def test_a_tier_that_is_down_stops_the_collection(tmp_path):
    small = ScriptedTier(default=OSError("refused"))
    with pytest.raises(TierError, match="tier 'small' failed 10 times in a row, last with 'OSError: refused'"):
        collect(queries(50), tiers(small=small), tmp_path / "o.jsonl", portfolio=PORTFOLIO)
    assert len(read_outcomes(tmp_path / "o.jsonl")) == 10


def test_references_are_read_from_files(tmp_path):
    record = {"query_id": "q", "task": "t", "text": "x", "reference": "yes", "metric": "accuracy"}
    assert collect(write_jsonl(tmp_path / "q.jsonl", record), tiers(), tmp_path / "o.jsonl", portfolio=PORTFOLIO) == 1
    bad = write_jsonl(tmp_path / "bad.jsonl", record, {"query_id": "r", "task": "t", "text": "x"})
    with pytest.raises(DataError, match=r"bad\.jsonl:2: reference: Field required"):
        collect(bad, tiers(), tmp_path / "p.jsonl", portfolio=PORTFOLIO)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], {}), DataError, "queries: empty"),
        (([*queries(1), *queries(1)], {}), DataError, "query_id: 't0' occurs more than once"),
        (
            ([Reference(Query("x", "other", "a"), "yes")], {}),
            DataError,
            "query 'a': task 'other' has no metric; give it in the",
        ),
        (([Reference(Query("x"), "yes")], {}), DataError, "queries: id and task are needed"),
        ((queries(1), {"tiny": ScriptedTier()}), PortfolioError, "unknown tier 'tiny'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_called(tmp_path, arguments, error, message):
    members, more = arguments
    with pytest.raises(error, match=message):
        collect(members, tiers(**more), tmp_path / "o.jsonl", portfolio=PORTFOLIO)
    assert not (tmp_path / "o.jsonl").exists()


def test_the_frontier_must_be_among_the_tiers(tmp_path):
    with pytest.raises(PortfolioError, match="tiers: the frontier 'frontier' is missing"):
        collect(queries(1), {SMALL: ScriptedTier()}, tmp_path / "o.jsonl", portfolio=PORTFOLIO)


def test_texts_of_any_script_survive(tmp_path):
    reference = Reference(Query("我的卡在哪里 أين بطاقتي", "t", "q"), "yes")
    collect([reference], tiers(), tmp_path / "o.jsonl", portfolio=PORTFOLIO)
    assert json.loads((tmp_path / "o.jsonl").read_text(encoding="utf-8"))["text"] == reference.query.text


def test_a_metric_of_the_user_s_own_scores_the_answers(tmp_path):
    graded = portfolio(Task("t", metric="half"))
    collect(
        queries(1), tiers(), tmp_path / "o.jsonl", portfolio=graded, metrics={"half": lambda answer, reference: 0.5}
    )
    (row,) = read_outcomes(tmp_path / "o.jsonl")
    assert [outcome.quality for outcome in row.outcomes.values()] == [0.5, 0.5]
    with pytest.raises(DataError, match="query 't0': the metric returned 2 for small; expected"):
        collect(queries(1), tiers(), tmp_path / "p.jsonl", portfolio=graded, metrics={"half": lambda a, r: 2})


def test_a_metric_may_return_numbers_of_any_kind(tmp_path):
    graded = portfolio(Task("t", metric="own"))
    collect(queries(1), tiers(), tmp_path / "o.jsonl", portfolio=graded, metrics={"own": lambda a, r: np.float32(1)})
    assert read_outcomes(tmp_path / "o.jsonl")[0].outcomes[SMALL].quality == 1


@pytest.mark.parametrize("name", ["", 7])
def test_an_id_is_a_string_that_is_not_empty(tmp_path, name):
    with pytest.raises(DataError, match="queries: id and task are needed"):
        collect([Reference(Query("x", "t", name), "yes")], tiers(), tmp_path / "o.jsonl", portfolio=PORTFOLIO)


def test_odd_texts_are_gone_on_with(tmp_path):
    out, odd = tmp_path / "o.jsonl", [Reference(Query("a \ud800", "t", "q"), "yes")]
    collect(odd, tiers(), out, portfolio=PORTFOLIO)
    assert collect(odd, tiers(), out, portfolio=PORTFOLIO) == 0


def test_a_file_with_a_line_twice_is_refused(tmp_path):
    out = tmp_path / "o.jsonl"
    collect(queries(1), tiers(), out, portfolio=PORTFOLIO)
    out.write_text(out.read_text() * 2)
    with pytest.raises(DataError, match=r"o\.jsonl: query_id: 't0' occurs more than once"):
        collect(queries(2), tiers(), out, portfolio=PORTFOLIO)


def test_a_metric_may_not_know_and_may_fail_without_losing_the_answers_beside_it(tmp_path):
    def metric(answer: str, reference: str) -> float | None:
        if answer == "text 1":
            raise ZeroDivisionError("no words")
        return None if answer == "text 2" else 1.0

    used = portfolio(Task("t", metric="mine"))
    echo = {FRONTIER: lambda call: Completion(call.query.text, cost_usd=1.0)}
    out = tmp_path / "o.jsonl"
    with pytest.raises(ZeroDivisionError, match="no words") as caught:
        collect(queries(4), echo, out, portfolio=used, metrics={"mine": metric})
    assert caught.value.__notes__ == ["while scoring the answer of frontier to query 't1'"]
    assert {m.query.id: m.outcomes[FRONTIER].quality for m in read_outcomes(out)} == {"t0": 1, "t2": None, "t3": 1}
