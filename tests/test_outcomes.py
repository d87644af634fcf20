from __future__ import annotations

import gzip
import json

import pytest
from helpers import record, write_jsonl

from routenlp_plugins import DataError
from routenlp_plugins.evaluate.outcomes import outcome_line, read_outcomes

FILES = [
    "anlp_cnli_coqa",
    "llmrouter",
    "medmcqa_nine",
    "routellm_gsm8k",
    "routellm_mmlu",
    "routerarena",
    "routerbench_arc_challenge",
]


def changed(path: str, value: object) -> dict[str, object]:
    data = json.loads(json.dumps(record()))
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[name]
    place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("outcomes.small.quality", 1.3, r":1: outcomes\.small\.quality: .*less than or equal to 1, got 1\.3"),
        ("outcomes.small.quality", "1", r"outcomes\.small\.quality: .*valid number, got '1'"),
        ("outcomes.small.quality", True, r"outcomes\.small\.quality: .*valid number, got True"),
        ("outcomes.small.confidence", -0.1, r"outcomes\.small\.confidence: .*greater than or equal to 0"),
        ("outcomes.small.mean_logprob", 0.8, r"outcomes\.small\.mean_logprob: .*less than or equal to 0"),
        ("outcomes.small.input_tokens", 1.5, r"outcomes\.small\.input_tokens"),
        ("outcomes.small.cost_usd", -1, r"outcomes\.small\.cost_usd"),
        ("outcomes", {}, r"outcomes: .*at least 1"),
        ("query_id", "", r"query_id"),
        ("task", None, r"task: .*valid string, got None"),
        ("propensity", 0, r"propensity: .*greater than 0"),
    ],
)
def test_a_field_out_of_range_is_named_with_file_and_line(tmp_path, path, value, message):
    file = write_jsonl(tmp_path / "o.jsonl", changed(path, value))
    with pytest.raises(DataError, match=message) as caught:
        read_outcomes(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ("\n\n", r"o\.jsonl:2: empty line"),
        ('\n{"query_id": "q2", "ta', r"o\.jsonl:2: not a complete JSON object"),
        ("\n[1, 2]\n", r"o\.jsonl:2: line: "),
        ("\nNaN\n", r"o\.jsonl:2"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, tail, message):
    file = tmp_path / "o.jsonl"
    file.write_text(json.dumps(record()) + tail)
    with pytest.raises(DataError, match=message):
        read_outcomes(file)


def test_bad_lines_can_be_left_out_and_are_counted(tmp_path):
    file = tmp_path / "o.jsonl"
    file.write_text(
        json.dumps(record("q1")) + "\n\n{}\n" + json.dumps(record("q2")) + "\n" + json.dumps(record("q2")) + "\n"
    )
    skipped: list[DataError] = []
    assert [r.query.id for r in read_outcomes(file, skip_bad_lines=True, skipped=skipped)] == ["q1", "q2"]
    assert [str(e).split(": ")[0].rsplit(":", 1)[1] for e in skipped] == ["2", "3", "5"]


def test_a_query_id_that_occurs_twice_names_both_places(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", record("q1"))
    second = write_jsonl(tmp_path / "b.jsonl", record("q0"), record("q1"))
    with pytest.raises(DataError, match=r"b\.jsonl:2: query_id: 'q1' occurs already at .*a\.jsonl:1"):
        read_outcomes([first, second])


@pytest.mark.parametrize("content", ["", None])
def test_no_outcomes_at_all_is_an_error(tmp_path, content):
    file = tmp_path / "o.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=r"o\.jsonl: (no outcomes found|cannot be read)"):
        read_outcomes(file)


def test_a_truncated_gzip_file_is_named(tmp_path):
    whole = gzip.compress(b"".join(json.dumps(record(f"q{i}")).encode() + b"\n" for i in range(500)))
    file = tmp_path / "o.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"o\.jsonl\.gz:\d+: truncated or damaged gzip file"):
        read_outcomes(file)


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = bytearray(gzip.compress(b"".join(json.dumps(record(f"q{i}")).encode() + b"\n" for i in range(500))))
    whole[40:60] = bytes(20)
    file = tmp_path / "o.jsonl.gz"
    file.write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"o\.jsonl\.gz:\d+: "):
        read_outcomes(file)


def test_a_file_that_is_not_text_is_named(tmp_path):
    file = tmp_path / "o.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"o\.jsonl:1: not UTF-8 text"):
        read_outcomes(file)


def test_missing_evidence_stays_missing(tmp_path):
    outcomes = {"small": {"quality": None}, "frontier": {"quality": 1.0}}
    (row,) = read_outcomes(write_jsonl(tmp_path / "o.jsonl", record(outcomes=outcomes)))
    completion = row.outcomes["small"].completion
    assert row.outcomes["small"].quality is None
    assert (completion.confidence, completion.input_tokens, completion.cost_usd) == (None, None, None)


def test_a_row_survives_writing_and_reading(tmp_path):
    full = record(group="g", timestamp="2026-01-01", propensity=0.5)
    full["outcomes"]["small"] |= {"token_logprobs": [-0.1, -0.2], "mean_logprob": -0.15, "error": "late"}
    (row,) = read_outcomes(write_jsonl(tmp_path / "a.jsonl", full))
    again = tmp_path / "b.jsonl"
    again.write_text(outcome_line(row) + "\n")
    (copy,) = read_outcomes(again)
    assert (copy.group, copy.timestamp, copy.propensity) == ("g", "2026-01-01", 0.5)
    assert copy.outcomes["small"].error == "late"
    assert copy.outcomes["frontier"] == row.outcomes["frontier"]
    assert copy.outcomes["small"].completion.token_logprobs == (-0.1, -0.2)


@pytest.mark.parametrize("name", FILES)
def test_real_outcome_files_are_read(data_folder, name):
    rows = read_outcomes(data_folder / "outcomes" / f"{name}.jsonl.gz")
    assert len(rows) >= 800
    assert all(len(row.outcomes) >= 2 for row in rows)


def test_a_misspelt_field_of_an_outcome_is_named(tmp_path):
    outcomes = {"small": {"quality": 1.0, "logprob": -0.1}, "frontier": {"quality": 1.0}}
    with pytest.raises(DataError, match=r"o\.jsonl:1: outcomes\.small\.logprob: Extra inputs are not permitted"):
        read_outcomes(write_jsonl(tmp_path / "o.jsonl", record(outcomes=outcomes)))


def test_the_same_file_given_twice_is_an_error(tmp_path):
    file = write_jsonl(tmp_path / "o.jsonl", record("q1"))
    with pytest.raises(DataError, match=r"o\.jsonl:1: query_id: 'q1' occurs already at .*o\.jsonl:1"):
        read_outcomes([file, file])


@pytest.mark.parametrize(("name", "like"), [("gruop", "group"), ("propensty", "propensity"), ("Group", "group")])
def test_a_field_that_is_misspelt_is_not_missing_without_a_word(tmp_path, name, like):
    file = write_jsonl(tmp_path / "o.jsonl", record(**{name: "x"}))
    with pytest.raises(DataError, match=f"o.jsonl:1: {name}: unknown field; did you mean {like}"):
        read_outcomes(file)


def test_fields_of_one_s_own_are_left_alone(tmp_path):
    assert len(read_outcomes(write_jsonl(tmp_path / "o.jsonl", record(customer="x", metadata={})))) == 1
