from __future__ import annotations

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import Completion, DataError, PortfolioError
from routenlp_plugins.comparing import COMPARATORS, comparator, same_number, same_text, semantic_similarity
from routenlp_plugins.evidence import TOKEN_KINDS, Answers, confidence_in, evidence, kinds, log_odds
from routenlp_plugins.policy import Confidence, Term

LOGPROBS = (log(0.5), log(0.9), log(0.8))


def test_evidence_of_a_completion():
    completion = Completion("x", confidence=0.3, token_logprobs=LOGPROBS, scores={"margin": 0.2})
    expected = {
        "confidence": 0.3,
        "token_probability": 2.2 / 3,
        "mean_logprob": (0.5 * 0.9 * 0.8) ** (1 / 3),
        "least_token_probability": 0.5,
        "low_token_probability": 0.5,
        "margin": 0.2,
    }
    assert {kind: evidence(completion, kind) for kind in expected} == pytest.approx(expected)
    assert kinds([completion]) == tuple(expected)
    assert evidence(Completion("x", mean_logprob=log(0.4)), "mean_logprob") == pytest.approx(0.4)


def test_the_low_quantile_is_that_of_the_least_probable_tenth():
    logprobs = tuple(log(p / 100) for p in range(1, 31))
    assert evidence(Completion("x", token_logprobs=logprobs), "low_token_probability") == pytest.approx(0.03)


@pytest.mark.parametrize("kind", ["confidence", *TOKEN_KINDS, "verifier"])
def test_missing_evidence_is_none(kind):
    assert evidence(Completion("x", token_logprobs=()), kind) is None


@pytest.mark.parametrize(
    ("name", "first", "second", "agreement"),
    [
        ("label", "Yes.", " yes", 1),
        ("label", "yes", "no", 0),
        ("text", "The bank\ncloses at 5!", "the bank closes at 5", 1),
        ("text", "\uff21\uff22", "ab", 1),
        ("number", "the answer is 1,200.50", "$1200.5 a month", 1),
        ("number", "none", "none", 0),
        ("entities", '[["A", "ORG"]]', '[["A", "ORG"], ["B", "LOC"]]', 2 / 3),
        ("entities", "A", '[["A", "ORG"]]', 0),
        ("rouge_l", "a b c", "a c", 0.8),
    ],
)
def test_comparators(name, first, second, agreement):
    compare = COMPARATORS[name]
    assert compare(first, second) == pytest.approx(agreement)
    assert compare(second, first) == pytest.approx(agreement)


@given(st.text(), st.text())
def test_comparators_are_symmetric_and_in_range(first, second):
    for compare in COMPARATORS.values():
        assert compare(first, second) == pytest.approx(compare(second, first))
        assert 0 <= compare(first, second) <= 1
    assert same_text(first, first) == 1
    assert same_number("1e999", "2") == 0


def test_semantic_similarity_is_a_cosine():
    vectors = {"a": [1.0, 0.0], "b": [1.0, 1.0], "c": [-1.0, 0.0], "": [0.0, 0.0]}
    compare = semantic_similarity(lambda texts: [vectors[text] for text in texts])
    assert compare("a", "b") == pytest.approx(0.5**0.5)
    assert (compare("a", "c"), compare("a", ""), compare("", "")) == (0, 0, 1)


def test_an_unknown_comparator_is_named():
    with pytest.raises(DataError, match="comparator 'same' is unknown; known: label, text, number, rouge_l, entities"):
        comparator("same")


def answers(agreement: float = 0.8, **confidences: float) -> Answers:
    found = Answers(lambda first, second: agreement)
    for tier, confidence in confidences.items():
        found.add(tier, Completion("x", confidence=confidence))
    return found


def test_a_plain_confidence_is_the_evidence_itself():
    assert confidence_in(Confidence.plain("a"), answers(a=0.3)) == pytest.approx(0.3)


def test_a_confidence_adds_terms_and_reads_its_table():
    terms = (Term(2.0, "a", "confidence"), Term(0.5, "b", "confidence", "a"), Term(1.5, "a", None, "b"))
    total = 0.1 + 2 * log_odds(0.7) + 0.5 * log_odds(0.9) * (2 * 0.8 - 1) + 1.5 * (2 * 0.8 - 1)
    value = confidence_in(Confidence("a", terms, 0.1), answers(a=0.7, b=0.9))
    assert value == pytest.approx(1 / (1 + exp(-total)))
    table = Confidence("a", terms, 0.1, ((total - 1, 0.2), (total + 1, 0.4)))
    assert confidence_in(table, answers(a=0.7, b=0.9)) == pytest.approx(0.3)
    assert confidence_in(table, answers(a=0.7)) is None


def test_answers_are_compared_once_and_empty_ones_never():
    seen = []
    found = Answers(lambda *texts: seen.append(texts) or 1.0)
    for tier, text in (("a", "x"), ("b", "y"), ("c", "")):
        found.add(tier, Completion(text))
    assert [found.agreement(*pair) for pair in (("a", "b"), ("b", "a"), ("a", "c"), ("a", "d"))] == [1, 1, None, None]
    assert seen == [("x", "y")]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Term(1.0, "a"), "needs a kind of evidence, another tier, or both"),
        (lambda: Term(float("inf"), "a", "confidence"), "weight must be a number"),
        (lambda: Confidence("a", (), 0.0, ((0.0, 0.5), (0.0, 0.6))), "knots must rise strictly"),
        (lambda: Confidence("a", (), 0.0, ((0.0, 1.5),)), "with probabilities in"),
    ],
)
def test_confidences_without_meaning_are_errors(wrong, message):
    with pytest.raises(PortfolioError, match=message):
        wrong()
