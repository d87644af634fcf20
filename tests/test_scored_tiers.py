from __future__ import annotations

import asyncio
import json
from itertools import cycle
from math import exp, log

import pytest
from helpers import SMALL, portfolio

from routenlp_plugins import (
    Call,
    Completion,
    DataError,
    Judgement,
    LlamaCppTier,
    PTrueTier,
    Query,
    ScoredTier,
    SelfConsistentTier,
    TierError,
    parses,
)
from routenlp_plugins.evidence import certainty, top_two_margin
from routenlp_plugins.tiers.boundary import acall_tier, call_tier
from routenlp_plugins.tiers.openai_format import text_completion

CALL = Call(SMALL, Query("What is 2 + 2?", "t"))
PRICED = portfolio().tier(SMALL)


def saying(*texts: str, **facts):
    """A tier that says these texts in turn, ten tokens in and ten out."""
    turns = cycle(texts)
    return lambda call: Completion(next(turns), input_tokens=10, output_tokens=10, **facts)


def in_both_forms(tier, call: Call = CALL) -> Completion:
    """What the tier answers, sync; async must be the same."""
    sync, later = call_tier(PRICED, tier, call), asyncio.run(acall_tier(PRICED, tier.acall, call))
    assert (sync.text, sync.scores, sync.cost_usd) == (later.text, later.scores, later.cost_usd)
    return sync


def test_verifiers_add_their_scores_and_their_costs():
    verifiers = {
        "short": lambda query, answer: len(answer) < 3,
        "judge": lambda query, answer: Judgement(0.25, cost_usd=0.5),
        "mute": lambda query, answer: None,
        "valid": parses(json.loads),
    }
    done = in_both_forms(ScoredTier(saying("4"), verifiers))
    assert done.scores == {"short": 1.0, "judge": 0.25, "valid": 1.0}
    assert done.cost_usd == pytest.approx(20 * 0.1 / 1e6 + 0.5)
    assert in_both_forms(ScoredTier(saying("four"), verifiers)).scores["valid"] == 0.0


def test_a_verifier_out_of_range_is_a_tier_error():
    with pytest.raises(TierError, match=r"scores\['odd'\] must be a number in \[0, 1\], got 3.0"):
        call_tier(PRICED, ScoredTier(saying("4"), {"odd": lambda query, answer: 3}), CALL)


def test_the_most_agreed_with_answer_is_returned_and_all_are_paid_for():
    done = in_both_forms(SelfConsistentTier(saying("5", "4.", "four", "4"), samples=4))
    assert done.text in ("4", "4.")
    assert done.scores == {"self_consistency": pytest.approx(1 / 3)}
    assert done.input_tokens == 40
    with pytest.raises(DataError, match="samples must be at least 2, got 1"):
        SelfConsistentTier(saying("4"), samples=1)


@pytest.mark.parametrize(
    ("verdict", "logprob", "score"),
    [("Yes", log(0.8), 0.8), ("No.", log(0.9), 0.1), ("Maybe", -0.1, None), ("Yes", None, None)],
)
def test_a_tier_is_asked_whether_its_answer_is_right(verdict, logprob, score):
    seen = []

    def tier(call: Call) -> Completion:
        seen.append(call.query.text)
        asked = "Proposed answer" in call.query.text
        logprobs = None if logprob is None else (logprob, -3.0)
        return Completion(verdict if asked else "4", token_logprobs=logprobs, input_tokens=1, output_tokens=1)

    done = in_both_forms(PTrueTier(tier))
    assert done.scores == ({} if score is None else {"p_true": pytest.approx(score)})
    assert (done.text, done.input_tokens) == ("4", 2)
    assert "What is 2 + 2?" in seen[1] and "Proposed answer:\n4" in seen[1]


def test_alternatives_of_tokens_become_margin_and_certainty():
    sure, torn = [log(0.9), log(0.05)], [log(0.5), log(0.5)]
    assert top_two_margin([sure, torn]) == pytest.approx(0.425)
    assert certainty([[0.0, -9999.0]]) == pytest.approx(1)
    assert certainty([torn]) == pytest.approx(1 - log(2) / log(3))
    tokens = [{"logprob": some[0], "top_logprobs": [{"logprob": logprob} for logprob in some]} for some in (sure, torn)]
    response = {"model": "m-1", "choices": [{"message": {"content": "x y"}, "logprobs": {"content": tokens}}]}
    done = text_completion(response)
    assert done.scores == {"margin": pytest.approx(0.425), "certainty": pytest.approx(certainty([sure, torn]))}
    assert done.model == "m-1"
    tokens[0]["top_logprobs"] = []
    assert text_completion(response).scores == {}


def test_a_real_model_gives_alternatives_and_judges_itself():
    model = LlamaCppTier(request={"max_tokens": 8, "top_logprobs": 5})
    done = call_tier(PRICED, PTrueTier(model), Call(SMALL, Query("The capital of France is", "t")))
    assert 0 <= done.scores["margin"] <= 1
    assert 0 <= done.scores["certainty"] <= 1
    assert exp(done.mean_logprob) > 0
    assert done.output_tokens > 2
