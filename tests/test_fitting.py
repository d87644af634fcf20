from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio, row, rows

from routenlp_plugins import (
    Completion,
    DataError,
    Dispatcher,
    FitOptions,
    Policy,
    PortfolioError,
    Query,
    Release,
    RiskNotControlledError,
    Task,
    fit,
    replay,
)
from routenlp_plugins.cascade.ladders import climb
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.evaluate.table import task_tables
from routenlp_plugins.evaluate.units import Split, one_row_per_unit, split
from routenlp_plugins.flow import plan
from routenlp_plugins.policy import Rung
from routenlp_plugins.replaying import replayed
from routenlp_plugins.testing import ScriptedTier


def hopeless(n: int):
    return [row(f"q{i}", small=(0.0, 0.9), frontier=(1.0, None)) for i in range(n)]


def test_a_fitted_release_is_cheaper_and_within_alpha_on_fresh_queries():
    release = fit(rows(2000), portfolio(), alpha=0.1)
    (proof,) = release.certificate.proofs
    assert proof.status == "certified"
    assert proof.estimate < proof.bound <= 0.1
    assert proof.cost_interval[0] < proof.cost_ratio < proof.cost_interval[1]
    result = replay(rows(4000, seed=1), release)
    assert result.cost_ratio < 0.6
    assert result.violation_rate < 0.12
    assert result.violation_rate_by_task == {"t": result.violation_rate}
    assert sum(result.tier_share.values()) == pytest.approx(1)
    assert result.certificate["status"] == "certified"


def test_what_a_task_requires_is_in_its_policy_and_survives(tmp_path):
    tiers = tuple(replace(tier, supports=("tools",)) for tier in portfolio().tiers)
    used = replace(portfolio(Task("t", requires=("tools",))), tiers=tiers)
    made = fit(rows(2000), used, alpha=0.1)
    assert made.policy.requires == {"t": ("tools",)}
    again = Release.load(made.save(tmp_path / "r"))
    assert again.policy == made.policy and again.certificate.policy == made.certificate.policy
    query = Query("a question", "t", requires=frozenset({"tools"}))
    assert "does not cover" not in plan(again.policy, query)[2]
    assert "does not cover calls that need tools" in plan(fit(rows(2000), portfolio(), alpha=0.1).policy, query)[2]


def test_fitting_twice_gives_the_same_release():
    assert fit(rows(500), portfolio(), alpha=0.1) == fit(rows(500)[::-1], portfolio(), alpha=0.1)


def test_a_stricter_alpha_is_never_cheaper():
    costs = [replay(rows(1500), fit(rows(1500), portfolio(), alpha=alpha)).cost_usd for alpha in (0.05, 0.1, 0.2, 0.4)]
    assert costs == sorted(costs, reverse=True)


def test_nothing_certified_keeps_the_frontier_and_says_what_would_help():
    with pytest.raises(RiskNotControlledError, match=r"no task can leave the frontier at violation 0.1") as caught:
        fit(hopeless(300), portfolio(), alpha=0.1)
    release = caught.value.release
    assert release.certificate.status == "frontier only"
    result = replay(hopeless(300), release)
    assert (result.cost_ratio, result.quality_ratio, result.tier_share[FRONTIER]) == (1, 1, 1)


def test_a_task_too_small_to_pass_is_told_how_many_rows_would_do():
    good = [row(f"q{i}", small=(1.0, 0.9), frontier=(1.0, None)) for i in range(40)]
    with pytest.raises(RiskNotControlledError, match="even a policy without a single bad answer needs 45 to show"):
        fit(good, portfolio(), alpha=0.05)


def test_delta_is_shared_by_the_tasks_that_can_leave_the_frontier():
    good = [row(f"{t}{i}", t, small=(1.0, 0.9), frontier=(1.0, None)) for t in "abc" for i in range(300)]
    tiny = [row(f"d{i}", "d", small=(1.0, 0.9), frontier=(1.0, None)) for i in range(30)]
    certificate = fit(good + tiny + [row("e", "e", frontier=(1.0, None))], portfolio(), alpha=0.05).certificate
    shares = {proof.tasks[0]: proof.delta for proof in certificate.proofs if proof.status == "certified"}
    assert shares == pytest.approx(dict.fromkeys("abc", 0.1 / 3))
    assert certificate.certified == ("a", "b", "c")
    assert {proof.tasks: proof.status for proof in certificate.proofs if proof.tasks[0] in "de"} == {
        ("d",): "frontier",
        ("e",): "frontier",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0}, "alpha must be strictly between 0 and 1"),
        ({"alpha": 0.1, "delta": 1}, "delta must"),
        ({"alpha": float("nan")}, "alpha"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        fit(rows(10), portfolio(), **settings)


def test_an_empty_calibration_set_is_an_error():
    with pytest.raises(DataError, match="outcomes: empty; there is nothing to calibrate on"):
        fit([], portfolio(), alpha=0.1)


@pytest.mark.parametrize(("quality", "certified"), [(1.0, ("t",)), (0.0, None)])
def test_answers_of_one_class_only_are_certified_or_refused_like_any_others(quality, certified):
    rng = np.random.default_rng(0)
    members = [row(f"q{i}", small=(quality, float(rng.random())), frontier=(1.0, None)) for i in range(200)]
    if certified is None:
        with pytest.raises(RiskNotControlledError):
            fit(members, portfolio(), alpha=0.05)
    else:
        release = fit(members, portfolio(), alpha=0.05)
        assert release.certificate.certified == certified
        assert replay(members, release).cost_ratio < 0.02


def test_rows_that_repeat_an_id_are_refused():
    with pytest.raises(DataError, match="query_id: 't-0' occurs more than once"):
        fit([*rows(2), rows(1)[0]], portfolio(), alpha=0.1)


def test_replay_needs_the_outcomes_of_the_tiers_the_release_calls():
    release = Release(portfolio(), fit(rows(500), portfolio(), alpha=0.2).policy)
    with pytest.raises(DataError, match=r"row x: no outcome of tier '\w+', which the release calls"):
        replay([row("x", frontier=(1.0, None))], release)


def test_replay_counts_unknown_quality_as_the_worst_case():
    release = Release(portfolio(), Policy(FRONTIER, {"t": (Rung(SMALL),)}))
    unknown = [row("a", small=(None, None), frontier=(1.0, None)), row("b", small=(1.0, None), frontier=(None, None))]
    result = replay(unknown, release)
    assert (result.quality, result.quality_ratio, result.violation_rate) == (0.5, 0.5, 0.5)


def test_real_outcomes_are_fitted_andreplayed(data_folder):
    outcomes = data_folder / "outcomes"
    release = fit(outcomes / "medmcqa_nine.jsonl.gz", outcomes / "medmcqa_nine.portfolio.yaml", alpha=0.2)
    result = replay(outcomes / "medmcqa_nine.jsonl.gz", release)
    assert release.certificate.certified == ("medmcqa",)
    assert result.cost_ratio < 0.6
    assert result.violation_rate < 0.2


def test_only_rows_held_out_from_the_ordering_certify():
    members = rows(600)
    parts = split(members, Split(), seed=3)
    certificate = fit(members, portfolio(), alpha=0.1, seed=3).certificate
    assert (certificate.seed, certificate.ordering, certificate.reporting) == (3, 0.4, 0.1)
    assert certificate.proofs[0].n == len(parts["certification"])
    assert sum(map(len, parts.values())) == 600


def test_each_group_certifies_with_one_row_and_the_claim_says_so():
    members = [
        row(f"{g}-{i}", group=str(g), small=(1.0, 0.9), frontier=(1.0, None)) for g in range(300) for i in range(3)
    ]
    certification = split(members, Split(), seed=0)["certification"]
    certificate = fit(members, portfolio(), alpha=0.05).certificate
    assert certificate.proofs[0].n == len({member.group for member in certification})
    assert "of a query drawn from a random group" in certificate.claim
    assert "group" not in fit(rows(500), portfolio(), alpha=0.1).certificate.claim


def test_the_row_of_a_group_is_drawn():
    members = [
        row(f"{g}-{i}", group=str(g), small=(float(i == 0), 0.9), frontier=(1.0, None))
        for g in range(400)
        for i in range(2)
    ]
    drawn = task_tables(one_row_per_unit(members, seed=0, pooled=False), portfolio())["t"]
    assert 0.4 < drawn.quality[:, 0].mean() < 0.6


def test_what_the_certification_rows_cost_does_not_change_the_ladder():
    members = rows(600)
    held_out = {member.query.id for member in split(members, Split(), seed=0)["certification"]}

    def dear(member):
        small = replace(member.outcomes[SMALL].completion, cost_usd=1.0)
        return replace(member, outcomes={**member.outcomes, SMALL: Outcome(member.outcomes[SMALL].quality, small)})

    swapped = [dear(member) if member.query.id in held_out else member for member in members]
    assert fit(swapped, portfolio(), alpha=0.1).policy == fit(members, portfolio(), alpha=0.1).policy


def test_paths_and_rows_are_not_mixed(tmp_path):
    with pytest.raises(DataError, match="give paths or rows, not both"):
        fit([tmp_path / "o.jsonl", *rows(2)], portfolio(), alpha=0.1)


@pytest.mark.parametrize("alpha", [1e-17, 5e-324])
def test_an_alpha_too_small_for_any_data_is_refused_as_any_other(alpha):
    with pytest.raises(RiskNotControlledError, match="certification rows; even a policy without a single bad answer"):
        fit(rows(100), portfolio(), alpha=alpha)


def test_replay_counts_what_a_failed_call_cost():
    failed = Outcome(None, Completion("", cost_usd=5.0), error="down")
    member = OutcomeRow(Query("x", "t", "q"), {SMALL: failed, FRONTIER: Outcome(1.0, Completion("x", cost_usd=1.0))})
    ladder = Release(portfolio(), Policy(FRONTIER, {"t": (Rung(SMALL),)}))
    _, cost = climb(task_tables([member], portfolio())["t"], ladder.policy.ladders["t"])
    assert replay([member], ladder).cost_usd == cost[0] == 6


def test_where_the_frontier_is_also_cheapest_nothing_leaves_it(data_folder):
    outcomes = data_folder / "outcomes"
    with pytest.raises(RiskNotControlledError):
        fit(outcomes / "routerarena.jsonl.gz", outcomes / "routerarena.portfolio.yaml", alpha=0.2)


def test_a_task_without_evidence_is_told_what_is_missing():
    mute = [row(f"q{i}", small=(float(i % 2), None), frontier=(1.0, None)) for i in range(300)]
    with pytest.raises(RiskNotControlledError, match="small came without a confidence or log-probability that"):
        fit(mute, portfolio(), alpha=0.05)


def test_retention_is_kept_on_fresh_queries():
    release = fit(rows(3000), portfolio(), retention=0.95)
    (proof,) = release.certificate.proofs
    assert (proof.status, release.certificate.risk) == ("certified", "retention")
    assert proof.estimate > proof.bound >= 0.95
    assert "E[quality of the routed answers] >= 0.95 E[quality of the frontier's answers]" in release.certificate.claim
    result = replay(rows(6000, seed=1), release)
    assert result.quality_ratio > 0.94
    assert result.cost_ratio < 0.5


def test_graded_quality_needs_no_floor_for_retention():
    rng = np.random.default_rng(0)
    members = [
        row(f"q{i}", small=(float(s), float(s)), frontier=(0.9, None)) for i, s in enumerate(rng.beta(5, 1.2, 2000))
    ]
    release = fit(members, portfolio(), retention=0.95)
    result = replay(members, release)
    assert result.quality_ratio > 0.95
    assert result.violation_rate is None
    with pytest.raises(DataError, match="quality is graded"):
        fit(members, portfolio(), alpha=0.05)


def test_alpha_can_bound_the_risk_of_the_accepted_answers():
    release = fit(rows(3000), portfolio(), alpha=0.1, options=FitOptions(selective=True))
    result = replay(rows(6000, seed=1), release)
    assert result.violation_rate / (1 - result.tier_share[FRONTIER]) < 0.12
    assert "given that the answer was accepted" in release.certificate.claim


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.1, "retention": 0.9}])
def test_one_promise_is_needed(settings):
    with pytest.raises(DataError, match="give alpha or retention, one of them"):
        fit(rows(10), portfolio(), **settings)


def test_the_split_is_exact_for_each_task():
    members = [*rows(90, 0, "a"), *rows(31, 1, "b")]
    for seed in range(5):
        parts = split(members, Split(), seed)
        sizes = {name: [sum(m.query.task == task for m in of) for task in ("a", "b")] for name, of in parts.items()}
        assert sizes == {"ordering": [36, 12], "certification": [45, 16], "reporting": [9, 3]}
        pooled = split(members, Split(), seed, pooled=True)
        assert [len(of) for of in pooled.values()] == [48, 61, 12]


def test_retention_needs_a_quality_of_the_frontier():
    members = [row(f"q{i}", small=(1.0, 0.5), frontier=(None, None)) for i in range(200)]
    with pytest.raises(DataError, match="task 't': no answer of the frontier has a quality, so that there is nothing"):
        fit(members, portfolio(), retention=0.9)


def test_a_task_that_the_portfolio_has_under_another_name_is_told():
    with pytest.raises(
        DataError, match="task 'intent' is not in the portfolio, which has 'intnet'; give both one name"
    ):
        fit(rows(100, task="intent"), portfolio(Task("intnet", tiers=(FRONTIER,))), alpha=0.1)


def test_a_cost_that_is_unknown_is_told_by_its_first_place():
    members = rows(100)
    for place in (70, 3, 40):
        outcome = members[place].outcomes[SMALL]
        mute = replace(outcome, completion=replace(outcome.completion, input_tokens=None))
        members[place] = replace(members[place], outcomes={**members[place].outcomes, SMALL: mute})
    with pytest.raises(PortfolioError, match="row t-3: tier 'small' has no known cost"):
        fit(members, portfolio(), alpha=0.1)


def test_a_pool_of_one_task_goes_as_far_as_the_task_alone():
    members = rows(1500)
    alone = fit(members, portfolio(), alpha=0.1).certificate.proofs[0]
    pooled = fit(members, portfolio(), alpha=0.1, options=FitOptions(pooled=True)).certificate.proofs[0]
    assert pooled.candidates > 20
    assert pooled.estimate > alone.estimate - 0.02


def test_tasks_can_be_pooled_into_one_promise():
    members = [*rows(300, 0, "a"), *rows(300, 1, "b"), *(row(f"c{i}", "c", frontier=(1.0, None)) for i in range(100))]
    pooled = fit(members, portfolio(), retention=0.95, options=FitOptions(pooled=True)).certificate
    (proof,) = pooled.proofs
    assert (proof.tasks, proof.status) == (("a", "b", "c"), "certified")
    assert "over all tasks pooled" in pooled.claim
    result = replay(members, fit(members, portfolio(), retention=0.95, options=FitOptions(pooled=True)))
    assert result.cost_ratio < 1


def test_rows_of_unequal_propensity_are_weighted():
    """Bad answers were labelled four times as often; without weights the risk would look far too large."""
    rng = np.random.default_rng(0)
    kept = []
    for member in rows(8000):
        propensity = 1.0 if member.outcomes[SMALL].quality == 0 else 0.25
        if rng.random() < propensity:
            kept.append(replace(member, propensity=propensity))
    with pytest.raises(
        DataError, match=r"different probabilities \(0\.25 to 1\); declare FitOptions\(smallest_propensity"
    ):
        fit(kept, portfolio(), alpha=0.1)
    with pytest.raises(DataError, match=r"propensity 0\.25 is below the smallest of the design, 0\.3"):
        fit(kept, portfolio(), alpha=0.1, options=FitOptions(smallest_propensity=0.3))
    release = fit(kept, portfolio(), alpha=0.1, options=FitOptions(smallest_propensity=0.25))
    assert release.certificate.method.startswith("betting tests")
    fresh = replay(rows(8000, seed=1), release)
    assert 0.04 < fresh.violation_rate < 0.1
    assert fresh.cost_ratio < 0.5
    plain = fit([replace(member, propensity=None) for member in kept], portfolio(), alpha=0.1)
    assert replay(rows(8000, seed=1), plain).cost_ratio > fresh.cost_ratio


def test_a_comparator_of_one_s_own_is_used_and_missed():
    def outcome(text: str, quality: float, cost: float) -> Outcome:
        return Outcome(quality, Completion(text, cost_usd=cost))

    rng = np.random.default_rng(0)
    members = []
    for i in range(800):
        right = rng.random(2) < 0.8
        texts = [f"{'right' if ok else f'wrong {k}'} {i}" for ok, k in zip(right, rng.integers(9, size=2), strict=True)]
        outcomes = {
            SMALL: outcome(f"{texts[0]} a", float(right[0]), 1.0),
            MIDDLE: outcome(f"{texts[1]} b", float(right[1]), 1.0),
            FRONTIER: outcome("right", 1.0, 20.0),
        }
        members.append(OutcomeRow(Query("x", "t", f"q{i}"), outcomes))
    own = {"but_the_last": lambda a, b: float(a[:-1] == b[:-1])}
    used = portfolio(Task("t", comparator="but_the_last"))
    with pytest.raises(DataError, match="comparator 'but_the_last' is unknown"):
        fit(members, used, alpha=0.05)
    release = fit(members, used, alpha=0.05, options=FitOptions(comparators=own))
    assert replay(members, release, own).cost_ratio < 0.8
    with pytest.raises(DataError, match="comparator 'but_the_last' is unknown"):
        Dispatcher(release, {name: ScriptedTier(default="x") for name in (SMALL, MIDDLE, FRONTIER)})


def test_models_and_prompts_of_the_outcomes_are_certified():
    def told(member, **facts):
        done = {t: replace(o, completion=replace(o.completion, **facts)) for t, o in member.outcomes.items()}
        return replace(member, outcomes=done)

    members = [told(member, model=f"m{i % 2}", prompt="p") for i, member in enumerate(rows(1000))]
    policy = fit(members, portfolio(), alpha=0.1).policy
    assert policy.prompts == {"t": ("p",)}
    assert set(policy.models.values()) == {("m0", "m1")}
    assert FRONTIER not in policy.models
    assert fit(members, portfolio(), retention=0.9).policy.models[FRONTIER] == ("m0", "m1")
    assert fit([*members[:-1], told(members[-1], model=None, prompt=None)], portfolio(), alpha=0.1).policy.models == {}
    many = [told(member, prompt=str(i)) for i, member in enumerate(members)]
    assert fit(many, portfolio(), alpha=0.1).policy.prompts == {}


def test_answers_that_tie_are_accepted_together():
    rng = np.random.default_rng(0)
    members = []
    for i in range(1000):
        sure = rng.random() < 0.6
        good = float(rng.random() < (0.99 if sure else 0.5))
        members.append(row(f"q{i}", small=(good, 0.9 if sure else 0.2), frontier=(1.0, None)))
    release = fit(members, portfolio(), alpha=0.05)
    sure = {m.query.id for m in members if m.outcomes[SMALL].completion.confidence == 0.9}
    assert {m.query.id for m in members if replayed(m, release).tier == SMALL} == sure


def test_few_labels_are_told_from_hopeless_ones():
    almost = [row(f"q{i}", small=(float(i % 28 > 0), None), frontier=(1.0, None)) for i in range(150)]
    with pytest.raises(RiskNotControlledError, match=r"about \d+ certification rows would do, \d+ outcomes in all"):
        fit(almost, portfolio(), alpha=0.05)
    bad = [row(f"q{i}", small=(float(i % 18 > 0), None), frontier=(1.0, None)) for i in range(6000)]
    with pytest.raises(RiskNotControlledError, match="more outcomes would not help"):
        fit(bad, portfolio(), alpha=0.05)


def test_a_frontier_that_is_always_wrong_has_nothing_to_retain():
    wrong = [row(f"q{i}", small=(0.0, i / 300), frontier=(0.0, None)) for i in range(300)]
    with pytest.raises(RiskNotControlledError):
        fit(wrong, portfolio(), retention=0.9)


@pytest.mark.parametrize(("ordering", "reporting"), [(0, 0.1), (0.9, 0.1), (0.5, -0.1), (0.4, 1.0)])
def test_a_split_that_leaves_nothing_to_certify_with_is_an_error(ordering, reporting):
    with pytest.raises(DataError, match="split: ordering and reporting must be shares"):
        Split(ordering, reporting)
