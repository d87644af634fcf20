"""Capabilities: what queries require is learned, what tiers have is configuration, and a decision is always made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import (
    CapabilityRouter,
    DataError,
    Matching,
    Portfolio,
    PortfolioError,
    Query,
    ReleaseError,
    Task,
    Tier,
)
from routenlp_plugins.routing.capability import estimated_tokens
from routenlp_plugins.routing.encoders import HashedNgrams
from routenlp_plugins.routing.observations import Observations
from routenlp_plugins.routing.requirements import CapabilityHeads, requirements

SMALL = Tier("small", 1.0, 1.0, profile={"reasoning": 20, "coding": 20}, context_tokens=1000)
CODER = Tier("coder", 2.0, 2.0, profile={"reasoning": 20, "coding": 80})
LARGE = Tier("large", 10.0, 10.0, profile={"reasoning": 80, "coding": 80}, supports=("tools",))
POOL = Portfolio(
    (SMALL, CODER, LARGE),
    tasks=(Task("chat", capabilities=("reasoning",)), Task("code", capabilities=("coding",))),
    capabilities=("reasoning", "coding"),
)
EASY, HARD = ("what is my balance", "where is my card"), ("prove the theorem", "derive the equation")


def outcomes(n: int = 600, seed: int = 0) -> Observations:
    """Easy and hard queries of two tasks; who has the capability of the task is good at the hard ones too."""
    rng = np.random.default_rng(seed)
    hard, code = rng.random(n) < 0.5, rng.random(n) < 0.5
    texts = [f"{rng.choice(HARD if h else EASY)} {rng.integers(1000)}" for h in hard]
    able = {"small": np.zeros(n, dtype=bool), "coder": code, "large": np.ones(n, dtype=bool)}
    good = {tier: (rng.random(n) < np.where(hard & ~has, 0.1, 0.95)).astype(float) for tier, has in able.items()}
    return Observations(texts, ["code" if c else "chat" for c in code], good)


HEADS = CapabilityHeads.from_outcomes(outcomes(), POOL)
ROUTER = CapabilityRouter(HEADS, POOL, Matching(tolerance=0.5))


def test_required_is_what_the_least_capable_good_tier_has():
    raw = np.array([[10.0], [30.0], [20.0]])
    good = np.array([[1, 1, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [np.nan, 1, np.nan], [np.nan] * 3], dtype=float)
    called = np.ones((6, 1), dtype=bool)
    assert requirements(good, raw, called)[:, 0] == pytest.approx([0, 1, 0.5, 0, 1, np.nan], nan_ok=True)
    # graded: the second is needed if the first fails, the dearest if both do
    assert requirements(np.array([[0.5, 1.0, 0.5]]), raw, called[:1])[0, 0] == pytest.approx(0.5 * 0.5 * 0.5 + 0.25)
    assert requirements(good, raw, ~called)[:5, 0] == pytest.approx(np.zeros(5))


def test_what_is_required_is_learned_from_outcomes():
    (easy, hard) = HEADS(["where is my card", "prove the theorem"], ["code", "code"])
    assert hard[1] > easy[1] + 0.3
    assert easy[0] < 0.15
    assert ROUTER.choose(Query("where is my card", "code")).tier == "small"
    assert ROUTER.choose(Query("prove the theorem", "code")).tier == "coder"
    assert ROUTER.choose(Query("prove the theorem", "chat")).tier == "large"


def test_a_tier_is_added_repriced_and_removed_without_training():
    bargain = Tier("bargain", 0.5, 0.5, profile={"reasoning": 80, "coding": 80})
    added = CapabilityRouter(HEADS, replace(POOL, tiers=(*POOL.tiers, bargain)), ROUTER.matching)
    hard = Query("prove the theorem", "code")
    assert added.choose(hard).tier == "bargain"
    # as good as the tier it is as capable as, without a single outcome
    likely = added([hard.text], ["code"])[0]
    assert likely[3] == pytest.approx(likely[2])
    repriced = replace(POOL, tiers=(SMALL, replace(CODER, output_usd_per_mtok=30.0), LARGE), frontier="large")
    assert CapabilityRouter(HEADS, repriced, ROUTER.matching).choose(hard).tier == "large"
    removed = CapabilityRouter(HEADS, replace(POOL, tiers=(SMALL, LARGE)), ROUTER.matching)
    assert removed.choose(hard).tier == "large"


def test_the_reason_and_the_numbers_behind_it_are_told():
    choice = ROUTER.choose(Query("prove the theorem", "code"))
    assert choice.reason.startswith("coder: lacks ")
    assert "the cheapest that lacks no more than 0.5000" in choice.reason
    assert set(choice.required) == {"reasoning", "coding"}
    assert choice.shortfall["small"] > 0.5 >= choice.shortfall["coder"]
    strict = CapabilityRouter(HEADS, replace(POOL, tiers=(SMALL, CODER), frontier="coder"))
    assert "lacks least; none lacks no more than" in strict.choose(Query("prove the theorem", "chat")).reason


@pytest.mark.parametrize(
    ("query", "options", "ruled_out", "why"),
    [
        (Query("card " * 1000, "code"), {}, "small", "its context of 1000 tokens is too short for about"),
        (Query("card", "code", requires=frozenset({"tools"})), {}, "coder", "does not support tools"),
        (Query("card", "code"), {"unavailable": ["small"]}, "small", "unavailable"),
        (Query("card", "code"), {"allowed": ["large", "of another pool"]}, "coder", "not on the allow list"),
        (Query("card", "narrow"), {}, "small", "may not serve task 'narrow'"),
    ],
)
def test_gates_go_before_capability(query, options, ruled_out, why):
    narrow = replace(POOL, tasks=(*POOL.tasks, Task("narrow", tiers=("coder",))))
    choice = CapabilityRouter(HEADS, narrow, ROUTER.matching).choose(query, **options)
    assert why in choice.ruled_out[ruled_out]
    assert choice.tier not in choice.ruled_out


def test_where_no_tier_passes_the_frontier_is_asked_unless_the_allow_list_rules_it_out():
    images = Query("look", "chat", requires=frozenset({"images"}))
    choice = ROUTER.choose(images)
    assert choice.tier == "large"
    assert "no tier with a profile passes the gates (small: does not support images; coder:" in choice.reason
    assert ROUTER.choose(images, allowed=["small"]).tier == "small"
    with pytest.raises(PortfolioError, match="allowed: leaves no tier of the portfolio; its tiers: small"):
        ROUTER.choose(images, allowed=[])


def test_a_tier_without_profile_is_never_matched():
    unknown = replace(POOL, tiers=(*POOL.tiers, Tier("unknown", 0.1, 0.1)))
    router = CapabilityRouter(HEADS, unknown, Matching(tolerance=100))
    assert router.choose(Query("where is my card", "chat")).tier == "small"
    assert "unknown" not in router.choose(Query("card")).shortfall


@pytest.mark.parametrize(
    ("change", "matching", "message"),
    [
        ({"capabilities": ("reasoning",)}, {}, "names coding, which is no capability"),
        (
            {"tiers": (SMALL, replace(LARGE, profile={"coding": 1}))},
            {},
            "its profile has no score for reasoning",
        ),
        ({"tiers": (Tier("a"), Tier("b")), "frontier": "b"}, {}, "profile: no tier of the portfolio has one"),
        (
            {"tiers": (*POOL.tiers, Tier("local", usd_per_hour=1)), "frontier": "large"},
            {},
            "Matching.cost=.'local': USD",
        ),
        ({}, {"cost": {"smal": 1.0}}, "cost: smal is unknown; known: small, coder, large"),
        ({}, {"weights": {"humour": 1.0}}, "weights: humour is unknown; known: reasoning, coding"),
        ({}, {"tolerance": float("nan")}, "tolerance: must be a number >= 0, got nan"),
        ({}, {"weights": {"coding": -1.0}}, "coding: must be a number >= 0, got -1.0"),
    ],
)
def test_what_cannot_be_matched_is_told_before_any_query(change, matching, message):
    with pytest.raises(PortfolioError, match=message):
        CapabilityRouter(HEADS, replace(POOL, **change), Matching(**matching))


def test_heads_of_other_capabilities_than_the_portfolio_are_refused():
    plain = Portfolio((Tier("a", 1, 1, profile={"reasoning": 1}), Tier("b", 2, 2, profile={"reasoning": 2})))
    with pytest.raises(PortfolioError, match="capabilities: coding is unknown; known: reasoning, code generation"):
        CapabilityRouter(HEADS, plain)
    with pytest.raises(PortfolioError, match="tier 'a': its profile has no score for code generation, debugging"):
        CapabilityHeads.from_outcomes(Observations(["x", "y"], ["t", "t"], {"a": [0, 1], "b": [1, 1]}), plain)


def test_labels_teach_as_well_and_know_nothing_of_quality():
    seen = outcomes()
    hard = [float("the" in text) for text in seen.texts]
    heads = CapabilityHeads.from_labels(Observations(seen.texts, seen.tasks, {"reasoning": hard, "coding": hard}))
    assert heads(["prove the theorem"], ["chat"]).min() > 0.7
    router = CapabilityRouter(heads, POOL)
    assert router.choose(Query("prove the theorem", "chat")).tier == "large"
    with pytest.raises(DataError, match="taught by labels, and nothing is known of how good answers were"):
        router(["prove the theorem"], ["chat"])


def test_outcomes_that_tell_nothing_are_refused():
    with pytest.raises(DataError, match="every answer was as good as any other"):
        CapabilityHeads.from_outcomes(Observations(["x", "y"], ["chat"] * 2, {"small": [1, 1], "large": [1, 1]}), POOL)


def test_saved_heads_say_the_same(tmp_path):
    path = HEADS.save(tmp_path / "heads")
    again = CapabilityHeads.load(path)
    texts, tasks = ["prove it", "where", ""], ["chat", "code", None]
    assert np.array_equal(again(texts, tasks), HEADS(texts, tasks))
    assert (again.curve, again.digest) == (HEADS.curve, HEADS.digest)
    assert np.array_equal(CapabilityRouter(again, POOL)(texts, tasks), CapabilityRouter(HEADS, POOL)(texts, tasks))
    with pytest.raises(ReleaseError, match="exists already"):
        HEADS.save(path)
    with pytest.raises(ReleaseError, match="hashed n-grams 1, 1024"):
        CapabilityHeads.load(path, HashedNgrams(128))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ReleaseError, match="not a readable file of format 'routenlp capability heads 1'"):
        CapabilityHeads.load(path)


@given(st.text(max_size=60), st.sampled_from(["chat", "code", "never seen", None]), st.floats(0, 5), st.floats(0, 5))
def test_a_decision_is_always_made_and_costs_no_more_with_more_tolerance(text, task, one, other):
    query, price = Query(text, task), {tier.name: tier.input_usd_per_mtok or 0.0 for tier in POOL.tiers}
    chosen = [CapabilityRouter(HEADS, POOL, Matching(t)).choose(query) for t in sorted((one, other))]
    assert price[chosen[1].tier] <= price[chosen[0].tier]
    assert all(np.isfinite(list(choice.shortfall.values())).all() for choice in chosen)


def test_tokens_of_other_scripts_count_one_by_one():
    assert [estimated_tokens(text) for text in ("", "abcd", "abcde", "数学")] == [0, 1, 2, 2]
