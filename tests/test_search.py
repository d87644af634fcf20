from __future__ import annotations

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio, row, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from routenlp_plugins import DataError, Policy, PortfolioError, Query, Task, TierError
from routenlp_plugins.cascade.search import candidate_path, climb, violations
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.evaluate.table import data_hash, split, task_tables
from routenlp_plugins.fitting import _replayed
from routenlp_plugins.flow import drive, route
from routenlp_plugins.release import Release
from routenlp_plugins.types import Completion, Rung


def table(members, *tasks: Task):
    return task_tables(members, portfolio(*tasks))["t"]


THRESHOLD = st.one_of(st.none(), st.floats(0, 1))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from([SMALL, MIDDLE]), THRESHOLD), max_size=2, unique_by=lambda r: r[0]),
    st.integers(0, 99),
)
def test_the_arrays_decide_as_the_flow_does(ladder, seed):
    members = sorted(rows(30, seed), key=lambda member: member.query.id)
    rungs = tuple(Rung(tier, threshold, "confidence") for tier, threshold in ladder)
    release = Release(portfolio(), Policy(FRONTIER, {"t": rungs}))
    columns = table(members)
    answered, cost = climb(columns, rungs)
    for i, member in enumerate(members):
        answer = _replayed(member, release)
        assert columns.tiers[answered[i]] == answer.tier
        assert cost[i] == pytest.approx(answer.trace.cost_usd)


def test_a_failed_tier_is_passed_over_by_arrays_and_flow_alike():
    failed = Outcome(None, Completion(""), error="down")
    good = Outcome(1.0, Completion("x", cost_usd=1.0))
    member = OutcomeRow(Query("x", "t", "q"), {SMALL: failed, FRONTIER: good})
    answered, _ = climb(table([member]), (Rung(SMALL),))
    assert table([member]).tiers[answered[0]] == FRONTIER
    release = Release(portfolio(), Policy(FRONTIER, {"t": (Rung(SMALL),)}))
    assert _replayed(member, release).tier == FRONTIER


def test_a_tier_never_tried_is_charged_the_worst_case():
    columns = table([row("a", frontier=(1.0, None)), row("b", small=(1.0, 0.9), frontier=(1.0, None))])
    answered, _ = climb(columns, (Rung(SMALL, 0.5, "confidence"),))
    assert violations(columns, answered).tolist() == [True, False]


def test_an_unknown_quality_is_charged_the_worst_case_below_the_frontier_only():
    columns = table([row("a", small=(None, 0.9), frontier=(None, None))])
    assert violations(columns, np.array([0])).all()
    assert not violations(columns, np.array([1])).any()


def test_graded_quality_needs_a_floor():
    members = [row("a", small=(0.4, 0.5), frontier=(1.0, None))]
    with pytest.raises(
        DataError, match=r"task 't': quality is graded \(for example 0.4\), so alpha needs a quality floor"
    ):
        table(members)
    assert table(members, Task("t", tau=0.3)).tau == 0.3


def test_an_unknown_tier_and_a_missing_frontier_are_named():
    with pytest.raises(DataError, match="row a: outcomes: unknown tier tiny; portfolio: small, middle, frontier"):
        table([row("a", tiny=(1.0, None), frontier=(1.0, None))])
    with pytest.raises(DataError, match="row a: outcomes: the frontier 'frontier' is missing"):
        table([row("a", small=(1.0, None))])


def test_a_cost_nobody_knows_is_an_error_and_not_zero():
    unpriced = OutcomeRow(Query("x", "t", "q"), {FRONTIER: Outcome(1.0, Completion("x"))}, source="o.jsonl:7")
    with pytest.raises(
        PortfolioError, match=r"o\.jsonl:7: tier 'frontier' has no known cost, so no saving can be stated"
    ):
        table([unpriced])


def test_tiers_stand_in_order_of_what_they_cost_on_this_task():
    columns = table([row("a", middle=(1.0, None), small=(1.0, None), frontier=(1.0, None))])
    assert columns.tiers == (SMALL, MIDDLE, FRONTIER)
    assert columns.kinds == (None, None)


def test_what_one_split_decided_holds_on_the_other():
    ordering = [row("a", small=(1.0, 0.5), middle=(1.0, None), frontier=(1.0, None))]
    dear = [Outcome(1.0, Completion("x", mean_logprob=-0.1, cost_usd=cost)) for cost in (9.0, 1.0, 1.0)]
    other = OutcomeRow(Query("b", "t", "b"), dict(zip((SMALL, MIDDLE, FRONTIER), dear, strict=True)), source="row b")
    alone, alike = (
        task_tables([other], portfolio())["t"],
        task_tables([other], portfolio(), {"t": table(ordering)})["t"],
    )
    assert (alone.tiers, alone.kinds) == ((MIDDLE, SMALL, FRONTIER), ("mean_logprob", "mean_logprob"))
    assert (alike.tiers, alike.kinds) == ((SMALL, MIDDLE, FRONTIER), ("confidence", None))
    assert np.isnan(alike.score).all()


def test_a_tier_never_tried_on_a_split_costs_what_it_did_on_the_other():
    ordering = table([row("a", small=(1.0, 0.5), frontier=(1.0, None))])
    alike = task_tables([row("b", frontier=(1.0, None))], portfolio(), {"t": ordering})["t"]
    assert alike.cost[0, 0] == pytest.approx(ordering.cost[0, 0])
    assert alike.score[0, 0] == np.inf


def test_a_rung_of_another_kind_of_score_than_the_table_s_is_an_error():
    columns = table([row("a", small=(1.0, 0.5), frontier=(1.0, None))])
    with pytest.raises(DataError, match="small is gated by mean_logprob, the table has confidence"):
        climb(columns, (Rung(SMALL, 0.5, "mean_logprob"),))


def test_the_path_rises_in_risk_and_falls_in_cost():
    path = candidate_path(table(rows(600)), alpha=0.1)
    assert len(path) > 5
    risks, costs = [c.risk for c in path], [c.cost for c in path]
    assert risks == sorted(risks)
    assert costs == sorted(costs, reverse=True)
    assert max(risks) <= 0.125


def test_ladders_of_several_tiers_are_searched():
    path = candidate_path(table(rows(2000)), alpha=0.1)
    assert any(len(candidate.rungs) == 2 for candidate in path)


def test_tiers_without_evidence_can_only_be_used_for_all_or_nothing():
    good = [row(str(i), small=(1.0, None), frontier=(1.0, None)) for i in range(50)]
    (candidate,) = candidate_path(table(good), alpha=0.1)
    assert candidate.rungs == (Rung(SMALL),)


def test_the_order_of_rows_does_not_matter():
    members = rows(300)
    forward, backward = (candidate_path(table(m), alpha=0.1) for m in (members, members[::-1]))
    assert forward == backward
    assert data_hash(members) == data_hash(members[::-1])


def test_the_data_hash_changes_with_a_quality():
    members = rows(3)
    changed = [*members[:2], row("t-2", small=(0.5, 0.1), middle=(1.0, 0.1), frontier=(1.0, None))]
    assert data_hash(members) != data_hash(changed)


def test_groups_are_split_together_and_counted_once():
    members = [
        row(f"{g}-{i}", group=str(g), small=(1.0, 0.5), frontier=(1.0, None)) for g in range(200) for i in range(3)
    ]
    first, second = (table(part) for part in split(members, 0.4, seed=0))
    assert not set(first.units) & set(second.units)
    assert 0.25 < len(first) / len(members) < 0.55
    once = second.one_per_unit(seed=0)
    assert sorted(once.units) == sorted(set(second.units))


def test_a_flow_over_an_empty_ladder_is_the_frontier():
    release = Release(portfolio(), Policy(FRONTIER, {"t": ()}))
    answer = drive(route(release.policy, Query("x", "t")), lambda call: Completion("x"))
    assert answer.tier == FRONTIER


def test_a_failing_frontier_in_the_data_stays_a_failure():
    member = OutcomeRow(Query("x", "t", "q"), {FRONTIER: Outcome(None, Completion(""), error="down")})
    with pytest.raises(TierError, match="frontier: down"):
        _replayed(member, Release.frontier_only(portfolio()))
