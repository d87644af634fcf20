"""What rows have to be for a certificate to be true: how they were selected, what they count for, what failed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, QUESTION, SMALL, portfolio, row, rows

from routenlp_plugins import (
    AuditOptions,
    Auditor,
    Completion,
    DataError,
    Dispatcher,
    FitOptions,
    Query,
    Release,
    RiskNotControlledError,
    Task,
    Tier,
    Watch,
    fit,
    replay,
)
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow, read_outcomes


def fitted(members, used=None, **settings):
    """The release, also where it keeps all on the frontier."""
    try:
        return fit(members, used or portfolio(), **settings)
    except RiskNotControlledError as error:
        return error.release


def simple(name: str, quality: float | None, score: float | None = None, task: str = "t", **facts):
    return replace(row(name, task, small=(quality, score), frontier=(1.0, None)), **facts)


def failed(member, tier: str = SMALL):
    outcome = Outcome(None, Completion("", cost_usd=0.0), "rate limit")
    return replace(member, outcomes={**member.outcomes, tier: outcome})


def test_a_stratum_that_is_hardly_ever_labelled_does_not_vanish():
    """A tenth of the queries is bad and labelled one time in a thousand; the labels that are there look flawless."""
    certified = 0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        members = []
        for i in range(1000):
            bad = rng.random() < 0.1
            if rng.random() < (0.001 if bad else 1.0):
                members.append(simple(f"{i}", float(not bad), rng.random(), propensity=0.001 if bad else 1.0))
        release = fitted(members, alpha=0.05, options=FitOptions(smallest_propensity=0.001))
        certified += bool(release.certificate.certified)
    assert certified == 0


def test_rows_of_groups_have_no_propensity_of_their_own():
    members = [simple(f"{i}", 1.0, 0.5, group=f"g{i // 3}", propensity=0.05) for i in range(300)]
    with pytest.raises(DataError, match="these rows carry groups, whose chance depends on their size"):
        fit(members, portfolio(), alpha=0.1)


def test_a_group_counts_once_in_a_stream_of_several_tasks():
    """Sixty dialogues that are good or bad as a whole, with a row in each of twenty tasks."""
    tasks = [f"t{i}" for i in range(20)]
    rng = np.random.default_rng(0)
    members = []
    for dialogue in range(60):
        good = float(rng.random() > 0.06)
        members += [simple(f"{dialogue}-{task}", good, task=task, group=f"d{dialogue}") for task in tasks]
    used = portfolio(*(Task(task) for task in tasks))
    release = fitted(members, used, alpha=0.05, options=FitOptions(pooled=True))
    assert release.certificate.certified == ()
    assert release.certificate.proofs[0].n < 40


def test_a_call_that_failed_when_outcomes_were_collected_might_have_been_anything():
    rng = np.random.default_rng(0)
    members = []
    for i in range(1000):
        hard = rng.random() < 0.4
        member = simple(f"{i}", float(rng.random() > 0.005), 0.9 + 0.1 * rng.random())
        members.append(failed(member) if hard else member)
    assert fitted(members, alpha=0.05).certificate.certified == ()
    will_fail_again = FitOptions(passed_over=True)
    assert fitted(members, alpha=0.05, options=will_fail_again).certificate.certified == ("t",)


def test_a_frontier_that_fails_counts_alike_when_fitted_watched_and_replayed():
    def member(rng, name: str):
        sure = rng.random() < 0.4
        bad = sure and rng.random() < 0.06
        made = simple(name, float(sure and not bad), 0.95 if sure else 0.05)
        return failed(made, FRONTIER) if not sure and rng.random() < 0.6 else made

    rng = np.random.default_rng(0)
    members = [member(rng, f"{i}") for i in range(2000)]
    release = fit(members, portfolio(), alpha=0.05)
    watch = Watch.over(release)
    for i in range(2000):
        watch = watch.after(member(rng, f"n{i}"))
    assert not watch.expired
    (monitor,) = watch.monitors.values()
    assert monitor.n == 2000
    seen = replay(members, release)
    assert seen.violation_rate == pytest.approx(release.certificate.proofs[0].estimate, abs=0.02)


@pytest.mark.parametrize("groups", [2, 3, 5, 8])
def test_few_groups_are_too_few_and_no_crash(groups):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        members = [simple(f"{i}", float(rng.random() > 0.05), rng.random(), group=f"g{i % groups}") for i in range(180)]
        assert fitted(members, alpha=0.3, seed=seed).certificate.certified == ()


def test_a_single_row_certifies_nothing():
    release = fitted([simple("a", 1.0, 0.5)], alpha=0.3, options=FitOptions(pooled=True))
    assert release.certificate.certified == ()


@pytest.mark.parametrize("unlike", [1.0, 2, -0.1, float("nan"), "x", True])
def test_a_share_of_unlike_queries_out_of_range_is_an_error(unlike):
    with pytest.raises(DataError, match="unlike must be a share in"):
        FitOptions(unlike=unlike)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (simple("a", 5.0), "row a: outcomes.small.quality: .*less than or equal to 1, got 5.0"),
        (simple("a", 1.0, propensity=0.0), "row a: propensity: .*greater than 0, got 0.0"),
        (simple("a", 1.0, propensity="x"), "row a: propensity: .*valid number, got 'x'"),
        (simple("a", 1.0, -2.0), "row a: outcomes.small.confidence: .*greater than or equal to 0"),
        (simple("a", 1.0, task=""), "row a: task: .*at least 1 character"),
    ],
)
def test_rows_made_in_memory_are_held_to_what_files_are(member, message):
    with pytest.raises(DataError, match=message):
        fit([member, *rows(50)], portfolio(), alpha=0.1)


@pytest.mark.parametrize("outcomes", [None, 5])
def test_what_is_no_outcome_is_named(outcomes):
    with pytest.raises(DataError, match="outcomes: expected paths or rows, got"):
        fit(outcomes, portfolio(), alpha=0.1)


def test_a_release_with_another_portfolio_or_policy_is_void_where_it_serves(tmp_path):
    release = fit(rows(600), portfolio(), alpha=0.1)
    tiers = tuple(replace(tier, version="2099") if tier.name == SMALL else tier for tier in release.portfolio.tiers)
    newer = replace(release, portfolio=replace(release.portfolio, tiers=tiers))
    assert "another portfolio" in Release.load(newer.save(tmp_path / "newer")).policy.void
    calls = {name: lambda call: Completion("x", 0.99) for name in (SMALL, MIDDLE, FRONTIER)}
    assert "another portfolio" in Dispatcher(newer, calls).run(Query("x", "t")).trace.reason
    rungs = tuple(replace(rung, threshold=0.0) for rung in release.policy.ladders["t"])
    bold = replace(release, policy=replace(release.policy, ladders={"t": rungs}))
    assert "another policy" in Dispatcher(bold, calls).run(Query("x", "t")).trace.reason
    with pytest.raises(DataError, match="no valid certificate"):
        Watch.over(bold.checked())


def test_another_system_prompt_and_none_at_all_void_the_certificate():
    def asked(prompt: str | None):
        system = () if prompt is None else ({"role": "system", "content": prompt},)
        return Query(QUESTION, "t", messages=(*system, {"role": "user", "content": QUESTION}))

    tiers = {name: lambda call: Completion("a", 0.99) for name in (SMALL, FRONTIER)}
    used = portfolio()
    learned = Dispatcher(Release.frontier_only(replace(used, frontier=SMALL), ("t",)), tiers)
    for prompt in ("be brief", None):
        told = learned.run(asked(prompt)).trace.attempts[0].completion.prompt
        members = [
            replace(
                m,
                outcomes={
                    tier: replace(o, completion=replace(o.completion, prompt=told)) for tier, o in m.outcomes.items()
                },
            )
            for m in (simple(f"{i}", float(i % 50 > 0), (i * 37 % 101) / 101) for i in range(400))
        ]
        router = Dispatcher(fit(members, used, alpha=0.1), tiers)
        served = {other: router.run(asked(other)).tier for other in ("be brief", "be long", None)}
        assert served == {other: SMALL if other == prompt else FRONTIER for other in served}


def watched(tmp_path, **options):
    members = [simple(f"{i}", float(i % 50 > 0), (i * 37 % 101) / 101) for i in range(400)]
    tiers = {
        SMALL: lambda call: Completion("a", 0.99, cost_usd=0.1),
        FRONTIER: lambda call: Completion("b", cost_usd=1.0),
    }
    router = Dispatcher(fit(members, portfolio(), alpha=0.1), tiers)
    return Auditor(router, lambda query, answer: 1.0, tmp_path / "log.jsonl", AuditOptions(share=1.0, **options))


def test_calls_that_the_certificate_does_not_cover_are_not_audited(tmp_path):
    with watched(tmp_path) as router:
        router.run(Query("x", "t", "a", requires=frozenset({"tools"})))
        router.run(Query("x", "t", "b"))
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("name", ["", 7])
def test_an_id_that_the_log_could_not_hold_is_refused_before_the_answer(tmp_path, name):
    with watched(tmp_path) as router, pytest.raises(DataError, match="query id must be a non-empty string"):
        router.run(Query("x", "t", name))


def test_a_closed_auditor_says_so_before_it_asks(tmp_path):
    router = watched(tmp_path)
    router.close()
    with pytest.raises(DataError, match="is closed"):
        router.run("x")


def test_a_query_on_which_the_quality_function_fails_is_not_lost(tmp_path):
    def quality(query, answer):
        if query.text == "hard":
            raise RuntimeError("the reviewer is ill")
        return 1.0

    router = watched(tmp_path)
    router.quality = quality
    router.run(Query("hard", "t", "a"))
    with pytest.raises(RuntimeError, match="the reviewer is ill"):
        router.close()
    (kept,) = read_outcomes(tmp_path / "log.jsonl")
    assert {outcome.quality for outcome in kept.outcomes.values()} == {None}


def test_audits_draw_queries_and_not_groups():
    members = [replace(member, group=f"g{i}") for i, member in enumerate(rows(900))]
    with pytest.raises(DataError, match="audits draw queries"):
        Watch.over(fit(members, portfolio(), alpha=0.1))


def test_a_portfolio_of_one_tier_has_nothing_to_route():
    used = replace(portfolio(), tiers=(Tier(FRONTIER, 1.0, 1.0),))
    members = [row(f"{i}", frontier=(1.0, None)) for i in range(100)]
    assert fitted(members, used, alpha=0.1).certificate.certified == ()


def test_tasks_of_a_pooled_stream_count_by_their_weights():
    """A task that cannot leave the frontier and is dear, selected always; another that saves, selected seldom."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(700):
        for task, propensity, cost, good in (("a", 1.0, 10.0, 0.2), ("b", 0.02, 1.0, 0.97)):
            outcomes = {
                SMALL: Outcome(float(rng.random() < good), Completion("x", cost_usd=cost / 20)),
                FRONTIER: Outcome(1.0, Completion("y", cost_usd=cost)),
            }
            members.append(OutcomeRow(Query("q", task, f"{task}{i}"), outcomes, propensity=propensity))
    options = FitOptions(pooled=True, smallest_propensity=0.02, router=None)
    release = fit(members, portfolio(Task("a"), Task("b")), alpha=0.15, options=options)
    assert (release.policy.ladders["a"], [r.tier for r in release.policy.ladders["b"]]) == ((), [SMALL])
