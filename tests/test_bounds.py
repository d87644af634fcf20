from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest, norm

from routenlp_plugins import DataError
from routenlp_plugins.cascade.bounds import (
    betting_p_value,
    binomial_p_value,
    binomial_upper_bound,
    conformal_risk_control,
    empirical_bernstein_p_value,
    fallback,
    fixed_sequence,
    hoeffding_bentkus_p_value,
    hoeffding_p_value,
    labels_needed,
    labels_needed_for_mean,
    monotonized,
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


def retention_excess(rng, n: int, draws: int, ratio: float, rho: float = 0.97) -> np.ndarray:
    """(n, draws) rho q_frontier - q of a frontier that is right on 0.8, with 6 % discordant rows."""
    lost = (0.06 + (1 - ratio) * 0.8) / 2
    u = rng.random((n, draws))
    frontier = u < 0.8
    routed = (frontier & (u >= lost)) | ((u >= 0.8) & (u < 0.86 - lost))
    return rho * frontier - routed


def test_bets_are_hardly_ever_won_where_the_promise_is_broken():
    rng = np.random.default_rng(0)
    for delta in (0.05, 0.1):
        excess = retention_excess(rng, 500, 1000, ratio=0.97)
        won = int((betting_p_value(excess, 0.97, delta) <= delta).sum())
        assert binomtest(won, 1000, delta, alternative="greater").pvalue > 0.01
        assert won > 0


def test_bets_with_a_deadline_are_nearly_as_powerful_as_the_asymptotic_test():
    excess = retention_excess(np.random.default_rng(1), 1000, 600, ratio=0.99)
    betting = (betting_p_value(excess, 0.97, 0.1, (excess**2).mean(axis=0)) <= 0.1).mean()
    gaussian = (norm.cdf(excess.mean(axis=0) / excess.std(axis=0) * np.sqrt(1000)) <= 0.1).mean()
    scaled = (excess + 1) / 1.97  # in [0, 1], to be shown below 1 / 1.97
    bernstein = (empirical_bernstein_p_value(scaled, 1 / 1.97) <= 0.1).mean()
    bentkus = (hoeffding_bentkus_p_value(scaled.mean(axis=0), 1000, 1 / 1.97) <= 0.1).mean()
    assert gaussian - 0.15 < betting < gaussian + 0.02
    assert betting > 0.6 > 0.1 > bernstein >= bentkus == 0


def test_an_excess_beyond_its_bound_is_an_error():
    with pytest.raises(DataError, match=r"excess: at most 0\.5 was promised, got 0\.9"):
        betting_p_value(np.array([0.1, 0.9]), 0.5, 0.1)


@pytest.mark.parametrize("alpha", [0.05, 0.3])
def test_p_values_for_losses_are_valid(alpha):
    rng = np.random.default_rng(0)
    losses = rng.random((300, 4000)) < alpha
    mean = losses.mean(axis=0)
    for p in (
        hoeffding_p_value(mean, 300, alpha),
        hoeffding_bentkus_p_value(mean, 300, alpha),
        empirical_bernstein_p_value(losses, alpha),
    ):
        assert (p <= 0.1).mean() <= 0.1
        assert 0 <= p.min() <= p.max() <= 1
    assert (hoeffding_bentkus_p_value(mean, 300, alpha) <= hoeffding_p_value(mean, 300, alpha)).all()


def test_a_path_that_passes_whole_hands_its_level_on():
    seen = []

    def path(needs: float, length: int = 2):
        return lambda level: seen.append(level) or ((length, length) if level >= needs else (1, length))

    assert fallback([path(0.01), path(0.1)], [0.1, 0.9], 0.1) == [2, 2]
    assert fallback([path(0.05), path(0.1)], [0.1, 0.9], 0.1) == [1, 1]
    assert seen == pytest.approx([0.01, 0.1, 0.01, 0.09])
    with pytest.raises(DataError, match="shares: one a path, adding up to at most 1"):
        fallback([path(0.1)], [0.5, 0.6], 0.1)


def test_conformal_risk_control_refuses_losses_that_fall():
    losses = np.array([[0, 1, 0], [0, 0, 1]])
    with pytest.raises(DataError, match="loss falls from 1 to 0 between policies 1 and 2 in row 0"):
        conformal_risk_control(losses, 0.1)
    assert monotonized(losses).tolist() == [[0, 1, 1], [0, 0, 1]]
    assert conformal_risk_control(np.zeros((18, 3)), 0.05) is None
    assert conformal_risk_control(np.zeros((19, 3)), 0.05) == 2


def test_conformal_risk_control_holds_in_expectation():
    """Thresholds on a score whose loss rises: the mean risk over calibration samples is at most alpha."""
    rng = np.random.default_rng(0)
    risks = []
    for _ in range(1500):
        losses = rng.random((100, 1)) < np.linspace(0, 0.2, 41)
        found = conformal_risk_control(np.maximum.accumulate(losses, axis=1), 0.1)
        risks.append(0.0 if found is None else np.linspace(0, 0.2, 41)[found])
    assert np.mean(risks) <= 0.1
    assert np.mean(risks) > 0.08
    assert np.mean(np.array(risks) > 0.1) > 0.2  # in expectation only


def test_the_labels_needed_for_a_mean_give_about_eighty_percent_power():
    rng = np.random.default_rng(2)
    pilot = retention_excess(rng, 200_000, 1, ratio=0.99)
    n = labels_needed_for_mean(float(pilot.mean()), float((pilot**2).mean()), 0.1)
    excess = retention_excess(rng, n, 400, ratio=0.99)
    assert 0.7 < (betting_p_value(excess, 0.97, 0.1, (pilot**2).mean()) <= 0.1).mean() < 0.92
    assert labels_needed_for_mean(0.01, 0.1, 0.1) is None
