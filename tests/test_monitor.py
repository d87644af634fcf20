"""False alarms by Monte Carlo, and how soon a broken promise is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from routenlp_plugins import DataError
from routenlp_plugins.cascade.monitor import Monitor, _start_share
from routenlp_plugins.cascade.risks import Retention, Violation

ALPHA, DELTA = 0.05, 0.1


def alarm(risks: np.ndarray, rng: np.random.Generator) -> int | None:
    """Row at which the monitor expires if a row is a violation with these probabilities."""
    monitor = Monitor(Violation(ALPHA), DELTA)
    for row, violated in enumerate(rng.random(len(risks)) < risks):
        monitor = monitor.update(violated - ALPHA)
        if monitor.expired:
            return row
    return None


def test_a_promise_that_is_just_kept_is_hardly_ever_declared_broken():
    rng = np.random.default_rng(0)
    alarms = sum(alarm(np.full(1500, ALPHA), rng) is not None for _ in range(200))
    assert binomtest(alarms, 200, DELTA, alternative="greater").pvalue > 0.01


@pytest.mark.parametrize(("before", "largest_delay"), [(0, 60), (1000, 150)])
def test_good_weeks_do_not_blind_it(before, largest_delay):
    rng = np.random.default_rng(0)
    risks = np.r_[np.full(before, 0.01), np.full(600, 0.3)]
    delays = [row - before for _ in range(20) if (row := alarm(risks, rng)) is not None]
    assert len(delays) == 20
    assert max(delays) < largest_delay
    assert min(delays) >= 0


def test_an_alarm_stays():
    monitor = Monitor(Violation(ALPHA), DELTA)
    for _ in range(30):
        monitor = monitor.update(1 - ALPHA)
    assert monitor.expired
    for _ in range(2000):
        monitor = monitor.update(-ALPHA)
    assert monitor.e_value < 1 / DELTA
    assert monitor.expired


def test_retention_is_watched_too():
    rng = np.random.default_rng(0)
    risk = Retention(0.9)
    for kept, expired in ((0.95, False), (0.6, True)):
        monitor = Monitor(risk, DELTA)
        for quality in rng.random(800) < kept:
            monitor = monitor.update(0.9 - quality)
        assert monitor.expired == expired


@given(st.lists(st.floats(-ALPHA, 1 - ALPHA), max_size=60))
def test_wealth_is_never_negative(excesses):
    monitor = Monitor(Violation(ALPHA), DELTA)
    for excess in excesses:
        monitor = monitor.update(excess)
        assert min(monitor.betting) >= 0
        assert monitor.waiting >= 0
    assert monitor.n == len(excesses)


def test_the_shares_of_later_starts_add_up_to_less_than_all():
    n = 200_000
    rest = 0.5 / 1.06 / np.log(n)  # the integral from n on
    assert sum(map(_start_share, range(1, n))) + rest < 1


def test_weights_out_of_range_are_an_error():
    with pytest.raises(DataError, match=r"weight must be in \(0, 1\], got 2"):
        Monitor(Violation(ALPHA), DELTA).update(0.0, weight=2)
