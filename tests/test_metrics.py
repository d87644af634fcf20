from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import DataError
from routenlp_plugins.comparing import entity_f1, rouge_l, same_label
from routenlp_plugins.evaluate.metrics import METRICS, metric

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=7).map(" ".join)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[0] == second[0]:
        return 1 + longest_common_subsequence(first[1:], second[1:])
    return max(longest_common_subsequence(first[1:], second), longest_common_subsequence(first, second[1:]))


@given(WORDS, WORDS)
def test_rouge_l_equals_brute_force(answer, reference):
    common = longest_common_subsequence(answer.split(), reference.split())
    precision = common / len(answer.split()) if answer else 0
    recall = common / len(reference.split()) if reference else 0
    expected = 2 * precision * recall / (precision + recall) if common else float(not answer and not reference)
    assert rouge_l(answer, reference) == pytest.approx(expected)


def test_labels_are_equal_up_to_case_space_and_full_stop():
    assert same_label(" Card_Arrival. \n", "card_arrival") == 1
    assert same_label("card arrival", "card_arrival") == 0


@pytest.mark.parametrize(
    ("answer", "quality"),
    [
        ('[["A", "ORG"], ["B", "LOC"]]', 1.0),
        ('[["A", "ORG"]]', 2 / 3),
        ('[["A", "ORG"], ["A", "ORG"], ["A", "ORG"]]', 2 / 5),
        ("[]", 0.0),
        ("A is an ORG", 0.0),
        ('{"A": "ORG"}', 0.0),
        ('[["A"]]', 0.0),
        ('[["A", 1]]', 0.0),
    ],
)
def test_entities_are_scored_as_a_multiset(answer, quality):
    assert entity_f1(answer, '[["A", "ORG"], ["B", "LOC"]]') == pytest.approx(quality)


def test_a_reference_that_is_no_entity_list_is_an_error():
    with pytest.raises(DataError, match="reference: expected JSON"):
        entity_f1("[]", "A: ORG")


def test_an_unknown_metric_lists_the_known_ones():
    with pytest.raises(DataError, match="metric 'bleu' is unknown; known: accuracy, rouge_l, entity_f1"):
        metric("bleu")


@pytest.mark.parametrize("name", METRICS)
def test_the_reference_itself_is_perfect(name):
    reference = '[["A", "ORG"]]'
    assert metric(name)(reference, reference) == 1
