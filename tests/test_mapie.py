"""Our bounds and our monitor against those of MAPIE, on the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie import risk_control

from routenlp_plugins.cascade.bounds import fixed_sequence, hoeffding_bentkus_p_value, holm
from routenlp_plugins.cascade.monitor import Monitor
from routenlp_plugins.cascade.risks import Violation

P_VALUES = st.lists(st.floats(0.0001, 1.0), min_size=1, max_size=12)


@pytest.mark.parametrize(("n", "alpha"), [(50, 0.1), (500, 0.05), (2000, 0.2)])
def test_hoeffding_bentkus_p_values_are_the_same(n, alpha):
    from mapie.risk_control.methods import compute_hoeffding_bentkus_p_value

    means = np.arange(1, int(2 * alpha * n)) / n
    theirs = compute_hoeffding_bentkus_p_value(means, n, alpha)[:, 0]
    assert hoeffding_bentkus_p_value(means, n, alpha) == pytest.approx(np.minimum(theirs, 1), rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(P_VALUES, st.sampled_from([0.05, 0.1, 0.3]))
def test_holm_rejects_the_same(p_values, delta):
    theirs = risk_control.control_fwer(np.array(p_values), delta, "bonferroni_holm")
    assert np.flatnonzero(holm(p_values, delta)).tolist() == sorted(map(int, theirs))


@settings(max_examples=50, deadline=None)
@given(P_VALUES, st.sampled_from([0.05, 0.1, 0.3]))
def test_a_fixed_sequence_rejects_the_same(p_values, delta):
    theirs = risk_control.control_fwer(np.array(p_values), delta, "fixed_sequence")
    assert list(range(fixed_sequence(p_values, delta))) == sorted(map(int, theirs))


def alarms(risks: np.ndarray, seed: int) -> tuple[int | None, int | None]:
    """Rows, in hundreds, at which our monitor and MAPIE's find that the violation rate is above alpha."""
    from mapie.exchangeability_testing import RiskMonitoring

    alpha, batch = 0.05, 100
    bad = np.random.default_rng(seed).random(len(risks)) < risks
    violation = risk_control.BinaryRisk(
        lambda truth, predicted: predicted == 1,
        lambda truth, predicted: np.ones_like(predicted, dtype=bool),
        higher_is_better=False,
    )
    theirs = RiskMonitoring(violation, test_level=0.1, threshold=alpha, warn=False)
    ours = Monitor(Violation(alpha), 0.1)
    found: list[int | None] = [None, None]
    for number, rows in enumerate(bad.reshape(-1, batch)):
        for row in rows:
            ours = ours.update(row - alpha)
        theirs.update(np.zeros(batch, dtype=int), rows.astype(int))
        for place, expired in enumerate((ours.expired, theirs.harmful_shift_detected)):
            if expired and found[place] is None:
                found[place] = number
    return found[0], found[1]


def test_the_monitor_finds_what_mapie_finds_and_sooner_after_good_weeks():
    kept = [alarms(np.full(2000, 0.03), seed) for seed in range(3)]
    assert kept == [(None, None)] * 3
    broken = [alarms(np.r_[np.full(1000, 0.02), np.full(2000, 0.2)], seed) for seed in range(3)]
    assert all(ours is not None and theirs is not None for ours, theirs in broken)
    assert sum(ours for ours, _ in broken) < sum(theirs for _, theirs in broken)
