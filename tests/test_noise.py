"""Promises about the truth that are tested on labels which are not it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import portfolio, row, rows

from routenlp_plugins import DataError, FitOptions, Noise, fit, replay
from routenlp_plugins.cascade.certification import p_values
from routenlp_plugins.cascade.noise import NoisyRetention, NoisyViolation
from routenlp_plugins.cascade.risks import Answered, Retention, Violation

NOISE = Noise(0.9, 0.15)


def answered(below, good, reference, label, of_reference) -> tuple[Answered, Answered]:
    """The same rows with the truth, and with labels."""
    ones = np.ones(len(below))
    truth = Answered.seen(below, good, reference, 1.0, ones, ones, ones)
    return truth, Answered.seen(below, label, of_reference, np.nan, ones, ones, ones)


def drawn(n: int, rng: np.random.Generator, violation: float = 0.1, share: float = 0.6):
    below = rng.random(n) < share
    good = np.where(below, rng.random(n) >= violation / share, rng.random(n) < 0.9).astype(float)
    reference = np.where(below, (rng.random(n) < 0.9).astype(float), good)
    flip = {1.0: NOISE.on_good, 0.0: NOISE.on_bad}

    def labels(of):
        return (rng.random(n) < np.vectorize(flip.get)(of)).astype(float)

    label = labels(good)
    return answered(below, good, reference, label, np.where(below, labels(reference), label))


@pytest.mark.parametrize(
    ("truth", "noisy"), [(Violation(0.1), NoisyViolation(0.1, NOISE)), (Retention(0.95), NoisyRetention(0.95, NOISE))]
)
def test_the_mean_excess_of_labels_is_that_of_the_truth_in_other_units(truth, noisy):
    exact, labelled = drawn(400_000, np.random.default_rng(0))
    error = 4 * noisy.excess(labelled).std() / np.sqrt(400_000)
    assert abs(noisy.excess(labelled).mean() - NOISE.between * truth.excess(exact).mean()) < error
    assert noisy.estimate(labelled) == pytest.approx(truth.estimate(exact), abs=0.01)
    assert noisy.excess(labelled).max() <= noisy.largest + 1e-12
    assert noisy.excess(labelled).min() >= noisy.least - 1e-12


@pytest.mark.parametrize("noise", [Noise(0.95, 0.15), Noise(0.9, 0.25), Noise(1.0, 0.3)])
@pytest.mark.parametrize("kind", [NoisyViolation, NoisyRetention])
def test_bounds_that_are_too_large_only_make_a_promise_stricter(kind, noise):
    _, labelled = drawn(20_000, np.random.default_rng(0))
    level = 0.9 if kind is NoisyRetention else 0.1
    assert kind(level, noise).excess(labelled).mean() >= kind(level, NOISE).excess(labelled).mean()


def test_without_noise_labels_are_the_truth():
    exact, _ = drawn(500, np.random.default_rng(1))
    for truth, noisy in ((Violation(0.1), NoisyViolation), (Retention(0.95), NoisyRetention)):
        same = noisy(truth.level, Noise(1.0, 0.0))
        assert np.allclose(same.excess(exact), truth.excess(exact))
        assert (same.largest, same.least, same.lossless) == (truth.largest, truth.least, truth.lossless)


@pytest.mark.parametrize("kind", ["violation", "retention"])
def test_the_p_value_is_valid_at_the_boundary(kind):
    """Policies whose true risk is just what must not be certified, 400 samples of 500."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        if kind == "violation":
            _, labelled = drawn(500, rng, violation=0.1)
            risk = NoisyViolation(0.1, NOISE)
        else:
            _, labelled = drawn(500, rng, violation=0.6 * (1 - 0.9 * 0.95))
            risk = NoisyRetention((0.4 * 0.9 + 0.6 * 0.9 * 0.95) / 0.9, NOISE)
        found.append(p_values(risk, [labelled], 0.1)[0])
    # P(Binomial(400, 0.1) > 58) < 0.002
    assert (np.array(found) <= 0.1).sum() <= 58


def noisy(members, seed: int = 0):
    """Labels with the errors of `NOISE` in the place of quality."""
    rng = np.random.default_rng(seed)
    return [
        replace(
            member,
            outcomes={
                tier: replace(o, quality=float(rng.random() < (NOISE.on_good if o.quality == 1 else NOISE.on_bad)))
                for tier, o in member.outcomes.items()
            },
        )
        for member in members
    ]


@pytest.mark.parametrize("promise", [{"alpha": 0.1}, {"retention": 0.93}])
def test_a_release_is_certified_from_labels_alone_and_keeps_its_promise(promise):
    options = FitOptions(noise=NOISE, router=None)
    release = fit(noisy(rows(2500)), portfolio(), **promise, options=options)
    assert release.certificate.certified == ("t",)
    assert (
        "labels that are at most 0.9 where answers are good and 0.15 where they are bad" in release.certificate.method
    )
    truth = replay(rows(4000, seed=77), release)
    assert truth.cost_ratio < 0.8
    assert truth.violation_rate <= 0.1 if "alpha" in promise else truth.quality_ratio >= 0.93


def test_the_noise_takes_its_share_of_delta():
    members = noisy(rows(1500))
    share = fit(members, portfolio(), alpha=0.1, options=FitOptions(noise=replace(NOISE, delta=0.05), router=None))
    assert share.certificate.delta == 0.1
    assert share.certificate.proofs[0].delta == pytest.approx(0.05)
    with pytest.raises(DataError, match=r"the noise of the labels takes 0\.1 of it"):
        fit(members, portfolio(), alpha=0.1, options=FitOptions(noise=replace(NOISE, delta=0.1)))


def test_hints_find_policies_and_the_truth_certifies_them():
    """Thumbs of 2,500 queries order; 300 gold rows certify, all of them."""
    hints, gold = (
        noisy(rows(2500, seed=5)),
        [replace(one, query=replace(one.query, id=f"g{i}")) for i, one in enumerate(rows(300))],
    )
    release = fit(gold, portfolio(), alpha=0.1, options=FitOptions(hints=hints, noise=NOISE, router=None))
    assert release.certificate.certified == ("t",)
    assert release.certificate.proofs[0].n == 270
    assert (release.certificate.ordering, release.certificate.delta) == (0.0, 0.1)
    assert release.certificate.method.startswith("exact binomial tests")
    truth = replay(rows(4000, seed=77), release)
    assert truth.violation_rate <= 0.1
    alone = replay(rows(4000, seed=77), fit(gold, portfolio(), alpha=0.1, options=FitOptions(router=None)))
    assert truth.cost_ratio < alone.cost_ratio


def test_hints_of_the_same_queries_are_left_out():
    gold = rows(300)
    with pytest.raises(DataError, match="hints: none is of another query or group than the outcomes"):
        fit(gold, portfolio(), alpha=0.1, options=FitOptions(hints=noisy(gold), noise=NOISE))


def test_noise_that_tells_nothing_and_selective_promises_are_refused():
    with pytest.raises(DataError, match="tell nothing"):
        Noise(0.4, 0.6)
    with pytest.raises(DataError, match=r"on_good must be in \[0, 1\], got 2"):
        Noise(2, 0.1)
    with pytest.raises(DataError, match="selective: not with labels that are not the truth"):
        fit(
            [row("a", small=(1.0, 0.5), frontier=(1.0, None))],
            portfolio(),
            alpha=0.1,
            options=FitOptions(noise=NOISE, selective=True),
        )
