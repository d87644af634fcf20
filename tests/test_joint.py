"""Router and cascade as one decision: skipping, offers, relative costs, and the router in a release."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, portfolio
from hypothesis import given
from hypothesis import strategies as st

from routenlp_plugins import (
    CachedEncoder,
    Call,
    Completion,
    DataError,
    Dispatcher,
    FitOptions,
    HashedNgrams,
    Policy,
    PortfolioError,
    Query,
    Release,
    ReleaseError,
    RiskNotControlledError,
    Space,
    Task,
    TierError,
    TrainingOptions,
    TransformerEncoder,
    fit,
    replay,
)
from routenlp_plugins.cascade.calibration import calibrate
from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.ordering import Ordering, expected_cost
from routenlp_plugins.cascade.risks import Retention, Violation
from routenlp_plugins.cascade.search import pooled_paths, task_paths
from routenlp_plugins.cascade.states import _Cuts
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.evaluate.table import task_tables
from routenlp_plugins.flow import drive, route
from routenlp_plugins.policy import DIFFICULTY, Confidence, Offer, RelativeCost, Rung, Term
from routenlp_plugins.replaying import replayed
from routenlp_plugins.routing.foresight import foreseen, learned

COSTS = {SMALL: 1.0, MIDDLE: 3.0}
EASY, HARD = "what is two plus two", "prove the conjecture of goldbach"


def predicted(tier: str) -> Confidence:
    return Confidence(tier, (Term(1.0, tier, DIFFICULTY),))


def says(call: Call) -> Completion:
    return Completion(f"{call.tier} says", confidence=0.9, cost_usd=1.0)


def run(*rungs: Rung, difficulty: dict[str, float], text: str = "x", call=says, **policy):
    used = Policy(FRONTIER, {"t": rungs}, router="r", **policy)
    return drive(route(used, Query(text, "t"), None, difficulty), call)


GATED = Rung(SMALL, 0.5, (Confidence.plain(SMALL),), (), predicted(SMALL), 0.6)


def test_a_tier_that_is_not_believed_in_is_skipped_and_the_trace_says_so():
    answer = run(GATED, difficulty={SMALL: 0.5})
    assert [attempt.tier for attempt in answer.trace.attempts] == [FRONTIER]
    assert answer.trace.reason == "frontier: no cheaper tier was expected to be worth its call"
    (skipped,) = answer.trace.as_dict()["skipped"]
    assert (skipped["tier"], skipped["belief"], skipped["needed"]) == (SMALL, pytest.approx(0.5), 0.6)
    assert answer.trace.as_dict()["difficulty"] == {SMALL: 0.5}
    assert run(GATED, difficulty={SMALL: 0.7}).tier == SMALL


def test_a_belief_without_its_evidence_skips():
    answer = run(GATED, difficulty={})
    assert (answer.tier, answer.trace.skipped[0].belief) == (FRONTIER, None)


AFTER = (
    Rung(SMALL, 1.0, (), ()),
    Rung(MIDDLE, 0.0, (Confidence.plain(MIDDLE),), (SMALL,)),
    Rung(MIDDLE, 1.0, (Confidence.plain(MIDDLE),), ()),
)


def test_a_rung_is_climbed_after_exactly_the_tiers_it_names():
    assert run(*AFTER, difficulty={}).tier == MIDDLE


def test_a_tier_that_failed_counts_as_skipped():
    def failing(call: Call) -> Completion:
        if call.tier == SMALL:
            raise TierError("down", SMALL)
        return says(call)

    answer = run(*AFTER, difficulty={}, call=failing)
    assert [attempt.tier for attempt in answer.trace.attempts] == [SMALL, MIDDLE, FRONTIER]


def test_an_answer_that_failed_is_not_returned_for_what_was_predicted_of_it():
    def failing(call: Call) -> Completion:
        if call.tier == SMALL:
            raise TierError("down", SMALL)
        return says(call)

    rungs = (Rung(SMALL, 1.0, (predicted(SMALL),)), Rung(MIDDLE, 0.9, (predicted(SMALL), Confidence.plain(MIDDLE))))
    answer = run(*rungs, difficulty={SMALL: 0.99}, call=failing)
    assert [attempt.tier for attempt in answer.trace.attempts if not attempt.accepted] == [SMALL, MIDDLE]
    assert answer.tier != SMALL

    failed = [
        OutcomeRow(
            Query("x", "t", f"q{i}"),
            {
                SMALL: Outcome(None, Completion("", cost_usd=1.0), error="down"),
                MIDDLE: Outcome(1.0, Completion("m", confidence=0.3 + i / 10, cost_usd=3.0)),
                FRONTIER: Outcome(1.0, Completion("f", cost_usd=30.0)),
            },
        )
        for i in range(3)
    ]
    table = replace(task_tables(failed, portfolio(Task("t")))["t"], difficulty={SMALL: np.full(3, 0.99)})
    columns, _ = Candidate(rungs, "").climb(table)
    assert (columns == len(table.tiers) - 1).all()


OFFERS = (
    Offer(SMALL, predicted(SMALL), 0.01),
    Offer(MIDDLE, predicted(MIDDLE), 0.1),
    Offer(FRONTIER, Confidence(FRONTIER, ()), 0.0),
)


@pytest.mark.parametrize(
    ("small", "middle", "tier"), [(0.9, 0.95, SMALL), (0.6, 0.95, MIDDLE), (0.2, 0.3, FRONTIER), (0.9, 0.98, SMALL)]
)
def test_a_climb_begins_at_the_best_offer(small, middle, tier):
    rungs = (Rung(SMALL), Rung(MIDDLE))
    assert run(*rungs, difficulty={SMALL: small, MIDDLE: middle}, offers={"t": OFFERS}).tier == tier


def test_a_trace_says_that_a_router_chose():
    rungs = (Rung(SMALL), Rung(MIDDLE))
    answer = run(*rungs, difficulty={SMALL: 0.6, MIDDLE: 0.95}, offers={"t": OFFERS})
    assert answer.trace.reason == "middle: of most worth before any call, 0.8500 by belief less price"


def test_predictions_that_vary_between_folds_only_are_no_evidence():
    """The frontier is always good: what is predicted of it depends on how many rows a fold left to learn from."""
    rng = np.random.default_rng(0)
    members = []
    for i in range(300):
        shown = float(rng.random())
        members.append(
            OutcomeRow(
                Query(["add", "poem", "prove", "lemma", "hello"][i % 5], "t", f"q{i}"),
                {
                    SMALL: Outcome(float(rng.random() < shown), Completion("s", confidence=shown, cost_usd=1.0)),
                    FRONTIER: Outcome(1.0, Completion("f", cost_usd=30.0)),
                },
            )
        )
    table = task_tables(members, portfolio(Task("t")))["t"]
    folds = np.arange(300) % 5
    by_fold = 0.99 + 0.001 * folds
    words = rng.random(300)
    for known, used in ((by_fold, False), (words, True), (np.full(300, 0.5), False)):
        told = replace(table, difficulty={FRONTIER: known})
        found = calibrate(told, SMALL, (SMALL,), told.good[:, 0], folds, predicted=True)
        assert found is not None
        assert found.confidence.predicted == used


def test_the_more_the_frontier_would_cost_the_more_may_be_lost():
    rung = Rung(SMALL, 0.8, (Confidence.plain(SMALL),), lossless=1.0)
    costs = {"t": RelativeCost(0.0, 0.1)}

    def tier(length: int) -> str:
        call = lambda step: Completion("a", confidence=0.7)  # noqa: E731
        return run(rung, difficulty={}, text="x" * length, call=call, relative_cost=costs).tier

    # 1 - 0.2 * relative cost falls to 0.7 at 15 characters
    assert [tier(length) for length in (5, 14, 16, 40)] == [FRONTIER, FRONTIER, SMALL, SMALL]


def test_a_policy_that_needs_predictions_refuses_to_go_without():
    with pytest.raises(DataError, match="decides by a router"):
        next(route(Policy(FRONTIER, {"t": (GATED,)}, router="r"), Query("x", "t")))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: Policy(FRONTIER, {"t": (GATED,)}), "names no router"),
        (lambda: Policy(FRONTIER, {"t": (Rung(SMALL, after=(MIDDLE,)),)}), "cannot come after middle"),
        (lambda: Policy(FRONTIER, {"t": (Rung(SMALL),)}, router="r", offers={"t": OFFERS}), "which has no rung"),
        (lambda: Rung(SMALL, belief=predicted(MIDDLE)), "its belief is about 'middle'"),
        (lambda: Rung(SMALL, level=2.0), r"level must be a number in \[0, 1\]"),
        (lambda: RelativeCost(1.0, 0.0, least=0.0), "least must be above 0"),
        (lambda: Offer(SMALL, Confidence.plain(SMALL), 1.0), "looks at answers before any call"),
    ],
)
def test_a_decision_that_cannot_be_made_is_an_error(policy, message):
    with pytest.raises(PortfolioError, match=message):
        policy()


@given(st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.5]), min_size=1, max_size=8), st.integers(0, 99))
def test_levels_cut_between_values_that_differ(values, seed):
    values = np.array(values)
    change = np.random.default_rng(seed).normal(size=len(values))
    level = _Cuts(values).best(change)
    sums = [change[values >= cut].sum() for cut in (*values, np.inf)]
    assert change[values >= level].sum() == pytest.approx(min(sums))


def asked(n: int, seed: int = 0, task: str = "t") -> list[OutcomeRow]:
    """Easy and hard questions, told apart by their words alone: the small tier is right about the easy ones."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        easy = rng.random() < 0.6
        words = f"{EASY if easy else HARD} {rng.integers(50)}"
        right = {SMALL: rng.random() < (0.98 if easy else 0.2), MIDDLE: rng.random() < (0.98 if easy else 0.5)}
        outcomes = {
            t: Outcome(float(ok), Completion("a", cost_usd=c)) for (t, ok), c in zip(right.items(), (1, 3), strict=True)
        }
        outcomes[FRONTIER] = Outcome(1.0, Completion("a", cost_usd=30.0))
        rows.append(OutcomeRow(Query(words, task, f"{task}{i}"), outcomes, source=f"row {i}"))
    return rows


@pytest.fixture(scope="module")
def routed() -> Release:
    return fit(asked(1500), portfolio(), alpha=0.05)


def test_what_words_tell_is_used_where_answers_tell_nothing(routed):
    fresh = asked(1000, 1)
    kept = replay(fresh, routed)
    assert routed.policy.router == routed.router.digest
    assert kept.cost_ratio < 0.5
    assert kept.violation_rate < 0.05
    without = fit(asked(1500), portfolio(), alpha=0.4, options=FitOptions(router=None))
    assert without.router is None


def test_a_release_brings_its_router_along(routed, tmp_path):
    again = Release.load(routed.save(tmp_path / "r"))
    fresh = asked(100, 2)
    assert [replayed(row, again).tier for row in fresh] == [replayed(row, routed).tier for row in fresh]
    dispatcher = Dispatcher(again, dict.fromkeys((SMALL, MIDDLE, FRONTIER), says))
    assert [dispatcher.run(row.query).tier for row in fresh] == [replayed(row, routed).tier for row in fresh]
    assert set(dispatcher.run(Query(HARD, "t")).trace.difficulty) == {SMALL, MIDDLE, FRONTIER}


def test_another_router_voids_the_certificate(routed):
    other = fit(asked(1500, 3), portfolio(), alpha=0.05).router
    for router in (other, None):
        served = Dispatcher(replace(routed, router=router), dict.fromkeys((SMALL, MIDDLE, FRONTIER), says))
        answer = served.run(Query(EASY, "t"))
        assert (answer.tier, "another router" in answer.trace.reason) == (FRONTIER, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " " * 100,
        "a" * 100_000,
        "\x00\x01\ufffd" * 50,
        "你好 مرحبا hello",
        f"{HARD} {'two plus two ' * 50}",
        "\ud800",
    ],
)
def test_a_decision_is_made_for_any_text(routed, text):
    answer = Dispatcher(routed, dict.fromkeys((SMALL, MIDDLE, FRONTIER), says)).run(Query(text, "t"))
    assert answer.tier in (SMALL, MIDDLE, FRONTIER)
    assert answer.trace.reason


def test_many_tasks_climb_one_ladder_that_knows_the_task():
    """The small tier is right in half of the tasks only; each has too few rows to be searched alone."""
    rows = []
    for k in range(20):
        for i, row in enumerate(asked(40, k, f"task{k:02}")):
            right = float(np.random.default_rng([k, i]).random() < (0.97 if k % 2 else 0.3))
            small = replace(row.outcomes[SMALL], quality=right)
            rows.append(replace(row, query=replace(row.query, text="x"), outcomes={**row.outcomes, SMALL: small}))
    tables = task_tables(rows, portfolio(*(Task(f"task{k:02}", tiers=(SMALL,)) for k in range(20))))
    router, known = learned(tables, TrainingOptions(), graded=False)
    _, path = pooled_paths(known, Violation(0.03))
    cheapest = path[-1]
    assert cheapest.cost < 0.7 * 30
    sent = {
        task: float((candidate.climb(foreseen(router, tables)[task])[0] < 1).mean())
        for task, candidate in cheapest.candidates.items()
    }
    odd = np.mean([share for task, share in sent.items() if int(task[-2:]) % 2])
    even = np.mean([share for task, share in sent.items() if not int(task[-2:]) % 2])
    assert odd > even + 0.5


def test_what_the_frontier_costs_is_expected_from_the_length():
    rows = []
    for i in range(200):
        text = "x" * (1 + i % 50)
        outcomes = {
            SMALL: Outcome(1.0, Completion("a", confidence=0.5, cost_usd=0.1)),
            FRONTIER: Outcome(1.0, Completion("a", cost_usd=1.0 + len(text))),
        }
        rows.append(OutcomeRow(Query(text, "t", f"q{i}"), outcomes))
    table = task_tables(rows, portfolio())["t"]
    unit = float(table.cost[:, -1].mean())
    expected = expected_cost(table, unit)
    assert expected.of("x" * 20) == pytest.approx(21 / unit)
    assert expected.of("") == pytest.approx(0.2)
    assert Ordering.of({"t": table}).sized


def test_a_path_with_predictions_tells_risks_on_rows_it_has_not_seen():
    """Noise as predictions promises nothing: the path is not cheaper than the frontier allows."""
    rows = [replace(row, query=replace(row.query, text=f"w{i}")) for i, row in enumerate(asked(600, 5))]
    tables = task_tables(rows, portfolio())
    noise = np.random.default_rng(0).random((600, 3)) * 0.98 + 0.01
    table = replace(tables["t"], difficulty={tier: noise[:, k] for k, tier in enumerate(tables["t"].tiers)})
    for path in task_paths(table, Retention(0.97)):
        assert all(point.cost > 0.8 * 30 for point in path if point.excess < 0)


class Broken:
    """An encoder that fails where it serves."""

    name, size = HashedNgrams().name, HashedNgrams().size

    def __call__(self, texts):
        raise RuntimeError("no memory")


class NoNumbers(Broken):
    def __call__(self, texts):
        return np.full((len(texts), self.size), np.nan, dtype=np.float32)


@pytest.mark.parametrize(("encoder", "says_why"), [(Broken(), "no memory"), (NoNumbers(), "no numbers")])
def test_a_router_that_fails_leaves_the_query_to_the_frontier(routed, encoder, says_why):
    broken = replace(routed, router=replace(routed.router, encoder=encoder))
    answer = Dispatcher(broken, dict.fromkeys((SMALL, MIDDLE, FRONTIER), says)).run(Query(EASY, "t"))
    assert (answer.tier, says_why in answer.trace.reason) == (FRONTIER, True)
    other = Query(EASY, "t", requires=frozenset({"tools"}))
    assert "need tools" in Dispatcher(broken, dict.fromkeys((SMALL, MIDDLE, FRONTIER), says)).run(other).trace.reason


class Lengths:
    """An encoder of the user's own."""

    name, size = "lengths", 1

    def __call__(self, texts):
        return np.array([[len(text)] for text in texts], dtype=np.float32)


def test_a_release_says_which_encoder_it_needs(tmp_path):
    options = FitOptions(router=TrainingOptions(("logistic",), Lengths()))
    path = fit(asked(1500), portfolio(), alpha=0.05, options=options).save(tmp_path / "r")
    tiers = dict.fromkeys((SMALL, MIDDLE, FRONTIER), says)
    with pytest.raises(ReleaseError, match=r"vectors are those of 'lengths': give that encoder to Release\.load"):
        Dispatcher(path, tiers)
    assert Dispatcher(Release.load(path, encoder=Lengths()), tiers).run(Query(EASY, "t")).tier == SMALL
    with pytest.raises(DataError, match="must be finite"):
        fit(asked(200), portfolio(), alpha=0.05, options=FitOptions(router=TrainingOptions(encoder=NoNumbers())))


def test_nothing_is_read_from_texts_where_some_are_unknown():
    rows = [
        replace(row, query=replace(row.query, text="" if i == 700 else row.query.text))
        for i, row in enumerate(asked(1500))
    ]
    with pytest.raises(RiskNotControlledError):
        fit(rows, portfolio(), alpha=0.05, options=FitOptions(space=Space(together=False)))
    two = [*asked(600, task="a"), *(replace(r, query=replace(r.query, text="")) for r in asked(600, 1, "b"))]
    release = fit(two, portfolio(Task("a"), Task("b")), alpha=0.05)
    assert release.router.tasks == ("a",)
    assert not Candidate.of(release.policy, "b").predicted


def scored(row: OutcomeRow, confidence: float) -> OutcomeRow:
    outcomes = row.outcomes.items()
    return replace(
        row, outcomes={t: replace(o, completion=replace(o.completion, confidence=confidence)) for t, o in outcomes}
    )


def test_a_kind_of_evidence_that_some_tasks_lack_does_not_end_a_pooled_fit():
    rows = asked(500, 0, "a") + asked(500, 1, "b")
    with_scores = [scored(row, i % 7 / 7) if row.query.task == "a" else row for i, row in enumerate(rows)]
    release = fit(with_scores, portfolio(Task("a"), Task("b")), alpha=0.05, options=FitOptions(pooled=True))
    assert replay(asked(300, 7, "a") + asked(300, 8, "b"), release).violation_rate < 0.06


def test_a_text_longer_than_all_that_were_seen_is_expected_to_cost_no_more():
    cost = RelativeCost(0.0, 0.1, most=3.0)
    assert [cost.of("x" * n) for n in (10, 30, 10_000)] == [1.0, 3.0, 3.0]
    with pytest.raises(PortfolioError, match="below the least"):
        RelativeCost(0.0, 0.1, most=0.1)


def test_a_cache_of_vectors_is_shared_by_threads():
    cache = CachedEncoder(HashedNgrams(64))
    texts = [f"text {i}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: cache([text])[0], texts * 3))
    assert np.array_equal(found[:200], HashedNgrams(64)(texts))


def test_another_tokenizer_is_another_encoder(tmp_path):
    for name, words in (("a", "one"), ("b", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "tokenizer.json").write_text(words)
    assert TransformerEncoder(tmp_path / "a").name != TransformerEncoder(tmp_path / "b").name


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: Policy(FRONTIER, {"t": (Rung(SMALL),)}, router="r", offers={"t": OFFERS[:1] * 2}), "offered twice"),
        (lambda: Policy(FRONTIER, {"t": ()}, relative_cost={"u": RelativeCost(1, 0)}), "task 'u': has offers"),
        (lambda: Offer(MIDDLE, predicted(SMALL), 1.0), "its belief is about 'small'"),
    ],
)
def test_offers_that_make_no_sense_are_errors(policy, message):
    with pytest.raises(PortfolioError, match=message):
        policy()
