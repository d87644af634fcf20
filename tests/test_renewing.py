"""A certificate that expired is renewed by thresholds that the audits propose, on audits they were not proposed by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import FRONTIER, MIDDLE, SMALL, gated, portfolio, row, rows
from scipy.stats import binomtest

from routenlp_plugins import (
    Completion,
    DataError,
    RiskNotControlledError,
    Watch,
    audits_after_alarm,
    fit,
    renew,
    replay,
)
from routenlp_plugins.cascade.adaptive import AdaptiveLevel, shifted
from routenlp_plugins.cascade.candidate import Candidate
from routenlp_plugins.cascade.risks import Violation
from routenlp_plugins.evaluate.outcomes import Outcome
from routenlp_plugins.policy import DIFFICULTY, Confidence, Offer, Rung, Term
from routenlp_plugins.release import fingerprint


def degraded(n: int, seed: int, loss: float = 0.25, first: int = 0):
    """Rows in which the small tier is right less often than its confidence says."""
    rng = np.random.default_rng(seed)
    members = []
    for i in range(n):
        small, middle = rng.beta(3, 1.2), rng.beta(6, 1.2)
        good = rng.random(2) < (small - loss * small, middle)
        members.append(
            row(
                f"d{seed}-{first + i}",
                small=(float(good[0]), float(small)),
                middle=(float(good[1]), float(middle)),
                frontier=(1.0, None),
            )
        )
    return members


@pytest.fixture(scope="module")
def release():
    return fit(rows(3000), portfolio(), alpha=0.1)


def test_an_expired_certificate_is_renewed_with_stricter_thresholds(release):
    audits = [*rows(200, seed=5), *degraded(2500, 1)]
    renewed = renew(release, audits)
    (proof,) = renewed.certificate.proofs
    assert (renewed.certificate.certified, proof.status) == (("t",), "certified")
    assert proof.n < 2500
    fresh = degraded(4000, 2)
    assert replay(fresh, release).violation_rate > 0.1 >= replay(fresh, renewed).violation_rate
    assert replay(fresh, renewed).cost_ratio < 1
    assert Watch.over(renewed).expired == {}


def test_a_renewal_that_cannot_be_shown_keeps_the_task_on_the_frontier(release):
    wrong = [row(f"w{i}", small=(0.0, 0.99), middle=(0.0, 0.99), frontier=(1.0, None)) for i in range(400)]
    audits = [*rows(200, seed=5), *wrong]
    with pytest.raises(RiskNotControlledError, match="no expired task can be certified again: ") as caught:
        renew(release, audits)
    assert replay(audits, caught.value.release).tier_share[FRONTIER] == 1


def test_looking_often_spends_no_more_than_looking_once(release):
    """What a renewal says depends on the audits only, and all looks together spend the delta of the task."""
    audits = [*rows(200, seed=5), *degraded(2500, 1)]
    proof = renew(release, audits).certificate.proofs[0]
    assert renew(release, audits).certificate.proofs[0] == proof
    fresh = len(audits_after_alarm(release, audits))
    first = Violation(0.1).fewest_rows(0.05)
    sizes = [int(np.ceil(first * 1.5**k)) for k in range(20)]
    assert proof.n in sizes
    assert proof.n <= fresh
    k = sizes.index(proof.n) + 1
    assert f"at level {0.1 / (k * (k + 1)):.4g}" in proof.reason
    # the next renewal has the delta of the task again
    assert proof.delta == pytest.approx(0.1)
    # audits that a look does not reach change nothing about it
    assert renew(release, audits[: -(fresh - proof.n)]).certificate.proofs[0].n <= proof.n


def simple_release():
    """A small and a middle tier, each judged by its own score."""
    ladder = tuple(gated(tier, 0.8) for tier in (SMALL, MIDDLE))
    certified = fit(rows(3000), portfolio(), alpha=0.1)
    policy = replace(certified.policy, ladders={"t": ladder}, support={})
    certificate = replace(certified.certificate, policy=fingerprint(policy))
    return replace(certified, policy=policy, certificate=certificate)


def test_evidence_that_is_all_the_same_is_tested_as_it_serves():
    """The small tier is always wrong and always sure of itself: whatever passes may not return its answers."""
    used = simple_release()
    rng = np.random.default_rng(0)
    wrong = [
        row(f"w{i}", small=(0.0, 0.99), middle=(1.0, float(rng.beta(6, 1.2))), frontier=(1.0, None)) for i in range(900)
    ]
    audits = [*degraded(300, 1, loss=0.5), *wrong]
    try:
        renewed = renew(used, audits)
    except RiskNotControlledError as error:
        renewed = error.release
    assert replay(wrong, renewed).violation_rate <= 0.1


def test_calls_that_failed_during_the_audits_are_charged():
    used = simple_release()
    rng = np.random.default_rng(0)
    members = []
    for i, member in enumerate(degraded(1500, 4)):
        bad = Outcome(0.0, replace(member.outcomes[SMALL].completion, confidence=0.99))
        lost = Outcome(None, Completion("", cost_usd=0.0), "down")
        middle = Outcome(1.0, replace(member.outcomes[MIDDLE].completion, confidence=float(rng.beta(6, 1.2))))
        small = bad if i % 33 == 0 else lost
        members.append(replace(member, outcomes={**member.outcomes, SMALL: small, MIDDLE: middle}))
    with pytest.raises(RiskNotControlledError):
        renew(used, [*degraded(300, 1, loss=0.5), *members])


def test_audits_of_another_prompt_count_as_the_frontier_s():
    """Where the policy sends a row to the frontier, its cheap answers say nothing in favour of it."""
    used = simple_release()
    used = replace(used, policy=replace(used.policy, prompts={"t": ("old",)}))
    used = replace(used, certificate=replace(used.certificate, policy=fingerprint(used.policy)))

    def asked(member, prompt: str, quality: float):
        done = {
            tier: Outcome(quality if tier != FRONTIER else 1.0, replace(o.completion, prompt=prompt))
            for tier, o in member.outcomes.items()
        }
        return replace(member, outcomes=done)

    half = [asked(m, "old", 0.0) if i % 2 else asked(m, "new", 1.0) for i, m in enumerate(degraded(1200, 5))]
    old = [asked(m, "old", m.outcomes[SMALL].quality) for m in degraded(300, 1, loss=0.6)]
    try:
        renewed = renew(used, [*old, *half])
    except RiskNotControlledError as error:
        renewed = error.release
    assert replay(half, renewed).violation_rate <= 0.1


def test_a_first_look_waits_for_audits_enough(release):
    audits = [*rows(200, seed=5), *degraded(2500, 1)]
    alarm = len(audits) - len(audits_after_alarm(release, audits))
    with pytest.raises(RiskNotControlledError, match="20 certification rows; even a policy without a single bad"):
        renew(release, audits[: alarm + 20])


def test_only_audits_after_the_alarm_are_fit_to_be_fitted_on(release):
    audits = [*rows(1500, seed=5), *degraded(1500, 1)]
    fresh = audits_after_alarm(release, audits)
    assert fresh == audits[-len(fresh) :]
    assert len(fresh) < 1500
    population = degraded(4000, 2)
    assert replay(population, fit(fresh, portfolio(), alpha=0.1)).violation_rate <= 0.1
    with pytest.raises(DataError, match="no certificate has expired on these audits"):
        audits_after_alarm(release, rows(300, seed=5))


def test_an_alarm_that_was_raised_early_is_renewed_early(release):
    audits = [*rows(200, seed=5), *degraded(2500, 1)]
    early, late = (len(audits_after_alarm(release, audits, delta=delta)) for delta in (0.5, 0.001))
    assert early > late


def test_audits_of_another_release_are_refused(release):
    audits = [replace(member, policy="another") for member in degraded(300, 1)]
    with pytest.raises(DataError, match="was audited under another release; give each its own log"):
        renew(release, audits)


def test_a_folder_will_do(release, tmp_path):
    audits = [*rows(200, seed=5), *degraded(2500, 1)]
    assert renew(release.save(tmp_path / "r"), audits).certificate == renew(release, audits).certificate


def test_a_certificate_that_holds_is_not_renewed(release):
    with pytest.raises(DataError, match="no certificate has expired on these audits"):
        renew(release, rows(300, seed=5))


def test_a_task_whose_certificate_holds_keeps_it():
    both = fit([*rows(1500, 0, "t"), *rows(1500, 1, "u")], portfolio(), alpha=0.1)
    audits = [*rows(300, 7, "u"), *degraded(2500, 1)]
    renewed = renew(both, audits)
    old, new = ({proof.tasks: proof for proof in one.certificate.proofs} for one in (both, renewed))
    assert old["u",] == new["u",]
    assert old["t",] != new["t",]
    assert renewed.policy.ladders["u"] == both.policy.ladders["u"]


def test_the_adaptive_level_brings_the_violation_rate_to_alpha():
    """Long-run coverage of adaptive conformal inference, on a stream that changes."""
    rng = np.random.default_rng(0)
    level, alpha, violations = AdaptiveLevel(step=0.5, floor=-50.0), 0.1, []
    for t in range(6000):
        score = rng.normal() + (1.0 if t > 3000 else 0.0)
        violations.append(score > level.shift)
        level = level.update(violations[-1] - alpha)
    assert np.mean(violations) == pytest.approx(alpha, abs=0.01)
    assert np.mean(violations[4000:]) == pytest.approx(alpha, abs=0.02)


def test_the_adaptive_level_has_a_floor_and_a_step():
    level = AdaptiveLevel(step=1.0)
    assert level.update(-0.1).shift == 0
    assert level.update(0.9).update(-0.1).shift == pytest.approx(0.8)
    with pytest.raises(DataError, match="step must be above 0"):
        AdaptiveLevel(step=0)


def test_shifting_a_ladder_moves_thresholds_only():
    confidences = (Confidence("b", (Term(1.0, "b", "confidence"), Term(1.0, "b", None, "a"))),)
    ladder = Candidate((Rung("a"), Rung("b", 0.5, confidences)), "f")
    assert shifted(ladder, 0.0) == ladder
    first, second = shifted(ladder, 1.0).rungs
    assert first == Rung("a", 1.0)  # only called, for its agreement with b
    assert second.threshold == pytest.approx(1 / (1 + np.exp(-1)))
    assert shifted(Candidate((Rung("a"),), "f"), 1.0).rungs == ()
    kept = Candidate((Rung("a", 1.0), Rung("b", 0.5, confidences)), "f")
    assert shifted(kept, -1.0).rungs[0] == Rung("a", 1.0)


def test_shifting_a_ladder_that_skips_moves_its_gates_and_tolerated_losses():
    own, belief = Confidence("a", (Term(1.0, "a", "confidence"),)), Confidence("a", (Term(1.0, "a", DIFFICULTY),))
    (moved,) = shifted(Candidate((Rung("a", 0.5, (own,), (), belief, 0.5),), "f"), 1.0).rungs
    assert moved.level == moved.threshold == pytest.approx(1 / (1 + np.exp(-1)))
    (sized,) = shifted(Candidate((Rung("a", 0.3, (own,), (), belief, 0.7, 0.5),), "f"), 1.0).rungs
    assert (sized.threshold, sized.level) == pytest.approx((0.5 - 0.2 / np.e, 0.5 + 0.2 * np.e))


def test_shifting_a_router_lowers_prices_and_so_calls_more_of_the_frontier():
    offers = (Offer("a", Confidence("a", (Term(1.0, "a", DIFFICULTY),)), 0.1), Offer("z", Confidence("z", ()), 1.0))
    moved = shifted(Candidate((Rung("a"),), "f", offers), 1.0)
    assert moved.rungs == (Rung("a"),)
    assert [offer.price for offer in moved.offers] == pytest.approx([0.1 / np.e, 1 / np.e])


@pytest.mark.long
def test_renewed_certificates_hold_over_draws(release):
    """Monte Carlo over whole streams: alarm, adaptive level and test."""
    population = degraded(6000, 3)
    exceeding = tried = 0
    rng = np.random.default_rng(0)
    for _ in range(300):
        drawn = [population[i] for i in rng.choice(len(population), 900, replace=False)]
        try:
            renewed = renew(release, drawn)
        except (RiskNotControlledError, DataError):
            continue
        tried += 1
        exceeding += replay(population, renewed).violation_rate > 0.1
    assert tried > 150
    assert binomtest(exceeding, 300, 0.05, alternative="greater").pvalue > 0.01
