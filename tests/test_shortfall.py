"""Requirements against profiles: what is lacking counts, what is more than enough does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from routenlp_plugins.errors import DataError
from routenlp_plugins.routing.shortfall import band_weights, bands_of, in_bands, matched, shortfalls

BANDS = np.array([[0.2, 0.8], [0.4, 0.5]])
ONE = st.floats(0, 1)


def test_the_weakest_of_the_pool_is_at_the_lower_end_and_the_best_at_the_upper():
    profiles = in_bands(np.array([[10.0, 3.0], [40.0, 3.0], [20.0, 3.0]]), BANDS)
    assert profiles[:, 0] == pytest.approx([0.2, 0.8, 0.4])
    # where all are equal, all are good enough
    assert profiles[:, 1] == pytest.approx([0.5, 0.5, 0.5])


def test_a_tier_that_is_added_may_move_the_others():
    """The scale is that of the pool, as the source has it: documented, and no surprise in a test."""
    before = in_bands(np.array([[10.0], [40.0]]), BANDS[:1])
    after = in_bands(np.array([[10.0], [40.0], [100.0]]), BANDS[:1])
    assert before[1, 0] == pytest.approx(0.8)
    assert after[1, 0] == pytest.approx(0.4)


def test_a_narrow_band_weighs_more_and_the_sum_stays():
    assert band_weights(np.ones(2), BANDS) == pytest.approx([2 / 7, 12 / 7])
    assert band_weights(np.ones(2), np.array([[0.3, 0.3], [0.4, 0.5]])) == pytest.approx([0, 2])
    assert band_weights(np.ones(2), np.array([[0.3, 0.3], [0.4, 0.4]])) == pytest.approx([1, 1])


def test_bands_are_where_predictions_lie():
    required = np.column_stack([np.linspace(0, 1, 101), np.full(101, 0.3)])
    assert bands_of(required) == pytest.approx(np.array([[0.05, 0.95], [0.3, 0.3]]))


def test_more_than_enough_of_one_makes_up_for_nothing():
    required, weights = np.array([[0.6, 0.6]]), np.ones(2)
    found = shortfalls(required, np.array([[1.0, 0.5], [0.6, 0.5], [0.7, 0.7]]), weights)
    assert found[0] == pytest.approx([0.1, 0.1, 0.0])


def test_the_cheapest_that_is_enough_is_taken_and_else_the_one_that_lacks_least():
    cost, allowed = np.array([[1.0, 2.0, 3.0]]), np.ones((1, 3), dtype=bool)
    shortfall = np.array([[0.3, 0.1, 0.0]])
    assert [int(matched(shortfall, cost, t, allowed)[0]) for t in (0.0, 0.1, 0.3)] == [2, 1, 0]
    assert matched(shortfall + 0.5, cost, 0.1, allowed)[0] == 2
    equal = np.full((1, 3), 0.9)
    assert matched(equal, cost, 0.1, allowed)[0] == 0


def test_a_gate_is_never_overruled():
    shortfall, cost = np.zeros((2, 2)), np.array([[1.0, 2.0]] * 2)
    allowed = np.array([[False, True], [False, False]])
    assert matched(shortfall, cost, 0.0, allowed).tolist() == [1, -1]


@given(
    arrays(np.float64, (6, 3), elements=ONE),
    arrays(np.float64, (6, 3), elements=ONE),
    arrays(np.bool_, (6, 3)),
    st.tuples(ONE, ONE).map(sorted),
)
def test_cost_never_rises_with_the_tolerance(shortfall, cost, allowed, tolerances):
    strict, lenient = (matched(shortfall, cost, tolerance, allowed) for tolerance in tolerances)
    rows = np.flatnonzero(allowed.any(axis=1))
    assert (cost[rows, lenient[rows]] <= cost[rows, strict[rows]]).all()
    assert (lenient == -1).tolist() == (~allowed.any(axis=1)).tolist()


@given(arrays(np.float64, (5, 2), elements=ONE), arrays(np.float64, (4, 2), elements=ONE))
def test_a_more_capable_tier_never_lacks_more(required, profiles):
    weights = np.array([0.7, 1.3])
    better = np.minimum(profiles + 0.1, 1)
    assert (shortfalls(required, better, weights) <= shortfalls(required, profiles, weights) + 1e-12).all()


def test_bad_input_is_told():
    with pytest.raises(DataError, match="tier 1 has no score for capability 0"):
        in_bands(np.array([[1.0, 1.0], [np.nan, 1.0]]), BANDS)
    with pytest.raises(DataError, match=r"expected \(M, D\) and \(D, 2\)"):
        in_bands(np.ones((2, 3)), BANDS)
    with pytest.raises(DataError, match="one of them positive"):
        band_weights(np.zeros(2), BANDS)
    with pytest.raises(DataError, match="at least one query"):
        bands_of(np.empty((0, 2)))
