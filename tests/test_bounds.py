from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from routenlp_plugins.cascade.bounds import (
    binomial_p_value,
    binomial_upper_bound,
    fixed_sequence,
    labels_needed,
    smallest_sample,
)


@given(st.integers(1, 400), st.data(), st.floats(0.01, 0.5))
def test_the_p_value_is_that_of_the_exact_binomial_test(n, data, alpha):
    violations = data.draw(st.integers(0, n))
    expected = binomtest(violations, n, alpha, alternative="less").pvalue
    assert binomial_p_value(violations, n, alpha) == pytest.approx(expected)


@given(st.integers(1, 400), st.data(), st.floats(0.01, 0.5))
def test_the_upper_bound_is_the_risk_at_which_the_test_just_rejects(n, data, delta):
    violations = data.draw(st.integers(0, n))
    bound = binomial_upper_bound(violations, n, delta)
    if violations < n:
        assert binomial_p_value(violations, n, bound) == pytest.approx(delta)
    else:
        assert bound == 1


@pytest.mark.parametrize(
    ("p_values", "passed"),
    [([0.01, 0.02, 0.5, 0.01], 2), ([0.2, 0.0], 0), ([0.01, 0.1], 2), ([], 0), ([0.10001], 0)],
)
def test_a_fixed_sequence_stops_at_the_first_failure(p_values, passed):
    assert fixed_sequence(p_values, 0.1) == passed


def test_the_smallest_samples_of_the_design():
    assert smallest_sample(0.05, 0.1) == 45
    assert smallest_sample(0.05, 0.1 / 6) == 80


@given(st.floats(0.01, 0.3), st.floats(0.001, 0.3))
def test_the_smallest_sample_is_the_first_that_can_pass(alpha, delta):
    n = smallest_sample(alpha, delta)
    assert binomial_p_value(0, n, alpha) <= delta * (1 + 1e-9)
    assert n == 1 or binomial_p_value(0, n - 1, alpha) > delta


@pytest.mark.parametrize("risk", [0.0, 0.01, 0.03])
def test_the_labels_needed_give_eighty_percent_power(risk):
    n = labels_needed(risk, alpha=0.05, delta=0.1)
    rng = np.random.default_rng(0)
    passed = binomial_p_value(rng.binomial(n, risk, 4000), n, 0.05) <= 0.1
    assert passed.mean() > 0.78
    few = max(n // 2, 1)
    assert (binomial_p_value(rng.binomial(few, risk, 4000), few, 0.05) <= 0.1).mean() < 0.8


def test_no_labels_would_do_for_a_policy_that_fails_itself():
    assert labels_needed(0.05, alpha=0.05, delta=0.1) is None


def test_the_bound_covers_at_its_level():
    for risk in (0.02, 0.05, 0.3):
        counts = np.arange(201)
        bounds = np.array([binomial_upper_bound(int(k), 200, 0.1) for k in counts])
        assert binom.pmf(counts, 200, risk)[bounds < risk].sum() <= 0.1
