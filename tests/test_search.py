from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, portfolio, row, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from routenlp_plugins import DataError, Policy, Portfolio, PortfolioError, Query, Task, Tier, TierError
from routenlp_plugins.cascade.calibration import calibrate
from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.certification import Stream
from routenlp_plugins.cascade.ladders import climb
from routenlp_plugins.cascade.risks import Answered, Retention, SelectiveViolation, Violation
from routenlp_plugins.cascade.search import task_paths
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.evaluate.table import data_hash, task_tables
from routenlp_plugins.evaluate.units import Split, one_row_per_unit, split
from routenlp_plugins.flow import drive, route
from routenlp_plugins.policy import DIFFICULTY, Confidence, Offer, RelativeCost, Rung, Term
from routenlp_plugins.release import Release
from routenlp_plugins.replaying import replayed
from routenlp_plugins.types import Completion


def table(members, *tasks: Task):
    return task_tables(members, portfolio(*tasks))["t"]


def violations(columns, answered) -> list[bool]:
    return Answered.of(columns, answered, np.zeros(len(columns))).violation.tolist()


def candidates(members, risk):
    """The cascades on the path, from safe to cheap, and those of the task table."""
    table_path, path = task_paths(table(members), risk)
    return [point.candidates["t"] for point in path], [point.candidates["t"] for point in table_path]


KINDS = ("confidence", "token_probability", "mean_logprob")


@st.composite
def ladders(draw):
    """Any ladder over the two cheap tiers, with any confidences."""
    weight, number = st.floats(-3, 3), st.floats(0, 1)
    tiers = draw(st.lists(st.sampled_from([SMALL, MIDDLE]), max_size=2, unique=True))
    rungs = []
    for place, tier in enumerate(tiers):
        if draw(st.booleans()):
            rungs.append(Rung(tier))
            continue
        confidences = []
        for name in draw(st.lists(st.sampled_from(tiers[: place + 1]), min_size=1, unique=True)):
            terms = [Term(draw(weight), name, draw(st.sampled_from(KINDS)))]
            for other in set(tiers[: place + 1]) - {name}:
                terms += [Term(draw(weight), name, None, other), Term(draw(weight), other, "confidence", name)]
            knots = draw(st.sampled_from([(), ((-1.0, 0.2), (0.5, 0.4), (1.0, 0.9))]))
            confidences.append(Confidence(name, tuple(terms), draw(weight), knots))
        rungs.append(Rung(tier, draw(number), tuple(confidences)))
    return tuple(rungs)


def mixed_rows(n: int, seed: int) -> list[OutcomeRow]:
    """Rows in which answers agree or not, evidence is missing here and there, some are not valid, and tiers fail."""
    rng = np.random.default_rng(seed)

    def outcome(quality: float | None, cost: float) -> Outcome:
        if rng.random() < 0.1:
            return Outcome(None, Completion("", cost_usd=cost), error="down")
        logprobs = tuple(-rng.random(3)) if rng.random() < 0.9 else None
        confidence = float(rng.random()) if rng.random() < 0.9 else None
        text = str(rng.choice(["a", "b", ""]))
        scores = {"valid": float(rng.random() < 0.8)} if rng.random() < 0.5 else {}
        return Outcome(quality, Completion(text, confidence, None, logprobs, scores, cost_usd=cost))

    return [
        OutcomeRow(
            Query("x" * int(rng.integers(1, 5)), "t", f"q{i:03}"),
            {
                SMALL: outcome(float(rng.random() < 0.7), 1.0),
                MIDDLE: outcome(float(rng.random() < 0.8), 2.0),
                FRONTIER: Outcome(1.0, Completion("a", cost_usd=10.0)),
            },
            source=f"row {i}",
        )
        for i in range(n)
    ]


@st.composite
def skipping(draw):
    """Any ladder that may skip its tiers, or begins at the best offer, with or without regard to expected costs."""
    weight, number = st.floats(-3, 3), st.floats(0, 1)

    def confidence(tier: str, called: tuple[str, ...]) -> Confidence:
        terms = [Term(draw(weight), name, DIFFICULTY) for name in (tier, FRONTIER)]
        terms += [Term(draw(weight), name, "confidence") for name in called]
        terms += [Term(draw(weight), *called[:1], None, called[1])] if len(called) > 1 else []
        return Confidence(tier, tuple(terms), draw(weight))

    relative_cost = draw(st.none() | st.just(RelativeCost(0.5, 0.4)))
    lossless = None if relative_cost is None else draw(number)
    if draw(st.booleans()):
        offers = tuple(Offer(tier, confidence(tier, ()), draw(weight)) for tier in (SMALL, MIDDLE, FRONTIER))
        return Candidate((Rung(SMALL), Rung(MIDDLE)), "", offers, relative_cost)
    rungs = []
    for tier, after in ((SMALL, ()), (MIDDLE, ()), (MIDDLE, (SMALL,))):
        called = (*after, tier)
        belief = draw(st.none() | st.just(confidence(tier, after)))
        judged = tuple(confidence(name, called) for name in called)
        rungs.append(Rung(tier, draw(number), judged, after, belief, draw(number), lossless))
    return Candidate(tuple(rungs), "", (), relative_cost)


@settings(max_examples=200, deadline=None)
@given(ladders().map(lambda rungs: Candidate(rungs, "")) | skipping(), st.integers(0, 99))
def test_the_arrays_decide_as_the_flow_does(candidate, seed):
    members = mixed_rows(30, seed)
    policy = Candidate.policy(Policy(FRONTIER, {"t": ()}, router="r"), {"t": candidate})
    release = Release(portfolio(), policy)
    columns = task_tables(members, portfolio(), like=EVERYTHING)["t"]
    predicted = np.random.default_rng(seed).random((30, 3))
    columns = replace(columns, difficulty={tier: predicted[:, k] for k, tier in enumerate(columns.tiers)})
    answered, cost = climb(columns, candidate.rungs, candidate.offers, candidate.relative_cost)
    for i, member in enumerate(members):
        answer = replayed(member, release, difficulty=dict(zip(columns.tiers, predicted[i], strict=True)))
        assert columns.tiers[answered[i]] == answer.tier
        spent = sum(member.outcomes[attempt.tier].completion.cost_usd for attempt in answer.trace.attempts)
        assert cost[i] == pytest.approx(spent)


EVERYTHING = task_tables(mixed_rows(300, seed=0), portfolio())
"""Tables that know all kinds of evidence there are: a few rows may lack one."""


def test_a_failed_tier_is_passed_over_by_arrays_and_flow_alike():
    failed = Outcome(None, Completion(""), error="down")
    good = Outcome(1.0, Completion("x", cost_usd=1.0))
    member = OutcomeRow(Query("x", "t", "q"), {SMALL: failed, FRONTIER: good})
    answered, _ = climb(table([member]), (Rung(SMALL),))
    assert table([member]).tiers[answered[0]] == FRONTIER
    release = Release(portfolio(), Policy(FRONTIER, {"t": (Rung(SMALL),)}))
    assert replayed(member, release).tier == FRONTIER


def test_a_tier_never_tried_is_charged_the_worst_case():
    untried, *known = (
        row("a", frontier=(1.0, None)),
        *(row(i, small=(1.0, float(i)), frontier=(1.0, None)) for i in [".8", ".9"]),
    )
    columns = table([untried, *known])
    answered, _ = climb(columns, (gated(SMALL, 0.5),))
    assert sorted(violations(columns, answered)) == [False, False, True]


def test_an_unknown_quality_is_charged_the_worst_case_below_the_frontier_only():
    columns = table([row("a", small=(None, 0.9), frontier=(None, None))])
    assert violations(columns, np.array([0])) == [True]
    assert violations(columns, np.array([1])) == [False]


def test_graded_quality_needs_a_floor():
    members = [row("a", small=(0.4, 0.5), frontier=(1.0, None))]
    with pytest.raises(
        DataError, match=r"task 't': quality is graded \(for example 0.4\), so alpha needs a quality floor"
    ):
        _ = table(members).good
    assert table(members, Task("t", tau=0.3)).good[0, 0] == 1


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
    assert (columns.kinds(SMALL), columns.kinds(MIDDLE)) == ((), ())


def test_what_one_split_decided_holds_on_the_other():
    ordering = [row(i, small=(1.0, s), middle=(1.0, None), frontier=(1.0, None)) for i, s in (("a", 0.5), ("c", 0.6))]
    dear = [Outcome(1.0, Completion("x", mean_logprob=-0.1, cost_usd=cost)) for cost in (9.0, 1.0, 1.0)]
    other = OutcomeRow(Query("b", "t", "b"), dict(zip((SMALL, MIDDLE, FRONTIER), dear, strict=True)), source="row b")
    alone, alike = (
        task_tables([other], portfolio())["t"],
        task_tables([other], portfolio(), {"t": table(ordering)})["t"],
    )
    assert (alone.tiers, alike.tiers) == ((MIDDLE, SMALL, FRONTIER), (SMALL, MIDDLE, FRONTIER))
    assert list(alike.evidence) == [(SMALL, "confidence")]
    assert np.isnan(alike.evidence[SMALL, "confidence"]).all()


def test_evidence_that_is_rare_or_always_the_same_is_left_out():
    def outcome(i: int) -> Outcome:
        scores = {"margin": i / 100, "constant": 0.5} | ({"rare": i / 100} if i < 10 else {})
        return Outcome(1.0, Completion("x", scores=scores, cost_usd=1.0))

    members = [
        OutcomeRow(Query("x", "t", f"q{i}"), {SMALL: outcome(i), FRONTIER: Outcome(1.0, Completion("x", cost_usd=9.0))})
        for i in range(100)
    ]
    assert table(members).kinds(SMALL) == ("margin",)


def test_a_tier_never_tried_on_a_split_costs_what_it_did_on_the_other():
    ordering = table([row("a", small=(1.0, 0.5), frontier=(1.0, None))])
    alike = task_tables([row("b", frontier=(1.0, None))], portfolio(), {"t": ordering})["t"]
    assert alike.cost[0, 0] == pytest.approx(ordering.cost[0, 0])
    assert not alike.tried[0, 0]


def test_a_path_lowers_the_thresholds_of_one_ladder_and_gets_cheaper():
    _, path = task_paths(table(rows(600)), Violation(0.1))
    thresholds = np.array([[rung.threshold for rung in point.candidates["t"].rungs] for point in path])
    costs = [point.cost for point in path]
    assert costs == sorted(costs, reverse=True)
    assert len({tuple(rung.tier for rung in point.candidates["t"].rungs) for point in path}) == 1
    assert (thresholds[0] > thresholds[-1]).all()


def test_few_rows_do_not_make_a_coarse_path():
    """As many steps as violations can be counted would be too few, and the first must not be all or nothing."""
    _, path = task_paths(table(rows(80)), Violation(0.1))
    assert len(path) > 2 * len({round(point.excess, 6) for point in path})
    assert path[0].cost > 1.5 * path[-1].cost


@pytest.mark.parametrize("risk", [Violation(0.1), SelectiveViolation(0.15), Retention(0.95)])
def test_a_path_begins_with_what_is_proved_most_easily(risk):
    """Accepting next to nothing is the safest by count, and proves nothing about the answers that are accepted."""
    for seed in range(4):
        _, path = task_paths(table(rows(200, seed=seed)), risk)
        assert path[0].signal == pytest.approx(min(point.signal for point in path), abs=1e-6)


def test_ladders_of_several_tiers_are_searched():
    path, _ = candidates(rows(2000), Violation(0.1))
    assert any(len(candidate.rungs) == 2 for candidate in path)


def test_a_tier_that_is_good_enough_for_everything_is_in_the_task_table():
    good = [row(str(i), small=(1.0, None), frontier=(1.0, None)) for i in range(50)]
    path, table_path = candidates(good, Violation(0.1))
    assert ([c.rungs for c in table_path], path) == ([(Rung(SMALL),)], [])


@pytest.mark.parametrize(("price", "worth_it"), [(0.97, True), (0.996, False)])
def test_what_saves_next_to_nothing_is_no_candidate(price, worth_it):
    """To prove it would take a share of delta from tasks where there is something to save."""
    good = [row(str(i), small=(1.0, None), frontier=(1.0, None)) for i in range(50)]
    tiers = Portfolio((Tier(SMALL, price, price), Tier(FRONTIER, 1.0, 1.0)), FRONTIER, (Task("t"),))
    table_path, path = task_paths(task_tables(good, tiers)["t"], Violation(0.1))
    assert (len(table_path), path) == (int(worth_it), ())


def test_agreement_alone_is_evidence():
    """Two tiers without any score, right more often where they agree."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(600):
        right = rng.random(2) < 0.8
        answers = ["right" if ok else f"wrong {k}" for ok, k in zip(right, rng.integers(9, size=2), strict=True)]
        outcomes = {
            tier: Outcome(float(ok), Completion(text, cost_usd=1.0))
            for tier, ok, text in zip((SMALL, MIDDLE), right, answers, strict=True)
        }
        members.append(
            OutcomeRow(
                Query("x", "t", f"q{i}"), {**outcomes, FRONTIER: Outcome(1.0, Completion("right", cost_usd=20.0))}
            )
        )
    path, _ = candidates(members, Violation(0.05))
    first, second = path[0].rungs
    assert (first.threshold, first.confidences) == (1.0, ())
    answered, _ = climb(table(members), (first, second))
    assert violations(table(members), answered).count(True) < 0.05 * 600
    assert 0.5 < (answered < 2).mean() < 0.8


def test_a_confidence_is_calibrated():
    members = rows(4000)
    columns = table(members)
    folds = (np.arange(4000) % 5).astype(np.intp)
    found = calibrate(columns, SMALL, (SMALL,), columns.good[:, 0], folds)
    for low in (0.2, 0.5, 0.7, 0.9):
        inside = (found.held_out >= low) & (found.held_out < low + 0.1)
        assert columns.good[inside, 0].mean() == pytest.approx(found.held_out[inside].mean(), abs=0.05)


def test_a_curve_that_no_logistic_has_is_found():
    """The probability of a good answer jumps at one half, so that a table beats the logistic curve."""
    rng = np.random.default_rng(0)
    score = rng.random(3000)
    members = [
        row(f"q{i}", small=(float(rng.random() < (0.95 if s > 0.5 else 0.2)), float(s)), frontier=(1.0, None))
        for i, s in enumerate(score)
    ]
    columns = table(members)
    found = calibrate(columns, SMALL, (SMALL,), columns.good[:, 0], (np.arange(3000) % 5).astype(np.intp))
    assert found.method in ("isotonic", "venn-abers")
    assert np.isfinite(found.held_out).all()


def test_a_rung_that_looks_at_evidence_the_table_has_not_is_an_error():
    columns = table([row(str(i), small=(1.0, i / 9), frontier=(1.0, None)) for i in range(9)])
    with pytest.raises(DataError, match="task 't': small is judged by its mean_logprob, which the table has not"):
        climb(columns, (gated(SMALL, 0.5, "mean_logprob"),))


def test_constant_confidences_are_no_evidence():
    members = [row(str(i), small=(float(i % 2), 0.5), frontier=(1.0, None)) for i in range(200)]
    assert table(members).kinds(SMALL) == ()
    assert candidates(members, Violation(0.1)) == ([], [])


def test_the_order_of_rows_does_not_matter():
    members = rows(300)
    forward, backward = (candidates(m, Violation(0.1)) for m in (members, members[::-1]))
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
    parts = split(members, Split(0.4, 0.1), seed=0)
    first, second = table(parts["ordering"]), table(parts["certification"])
    assert not set(first.units) & set(second.units)
    assert 0.25 < len(first) / len(members) < 0.55
    once = table(one_row_per_unit(parts["certification"], seed=0, pooled=False))
    assert sorted(once.units) == sorted(set(second.units))
    order = Stream({"t": once}).order
    assert sorted(order) == list(range(len(once)))
    assert list(once.units[order]) != sorted(once.units)


def test_a_group_counts_once_a_task_or_once_in_all():
    members = [row(f"{g}-{t}", t, group=str(g), frontier=(1.0, None)) for g in range(20) for t in ("s", "t")]
    assert len(one_row_per_unit(members, seed=0, pooled=False)) == 40
    assert len(one_row_per_unit(members, seed=0, pooled=True)) == 20


def test_a_flow_over_an_empty_ladder_is_the_frontier():
    release = Release(portfolio(), Policy(FRONTIER, {"t": ()}))
    answer = drive(route(release.policy, Query("x", "t")), lambda call: Completion("x"))
    assert answer.tier == FRONTIER


def test_a_failing_frontier_in_the_data_stays_a_failure():
    member = OutcomeRow(Query("x", "t", "q"), {FRONTIER: Outcome(None, Completion(""), error="down")})
    with pytest.raises(TierError, match="frontier: down"):
        replayed(member, Release.frontier_only(portfolio()))
