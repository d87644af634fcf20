"""A cheap tier degrades on day 4: how many bad answers get through, and how long until a certificate is valid again.

Days of 2,000 queries of cs_intent, drawn with replacement from fold B (real answers of trained classifiers). From day 4
on, the tier that answers most gives a wrong answer to a share of the queries it had right, as sure of itself as before.
5 % of all queries are audited. Three ways to live with it, on the same streams:

- nothing: the policy serves on;
- weekly: at the end of day 7 a new release is fitted on the audits of that week, whatever they say;
- watched: an anytime-valid monitor; after its alarm the frontier answers. At the end of each day `renew` is called,
  with half of delta for all its looks, and whenever the audits since the alarm have grown by half `fit` on them, with
  the other half. What is cheapest serves.

    ROUTENLP_DATA=... python benchmarks/shift.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from typing import Any

import numpy as np
from local_tiers import HERE, answered

from routenlp_plugins import DataError, Portfolio, Release, RiskNotControlledError, Watch, fit, renew
from routenlp_plugins.cascade.risks import Violation
from routenlp_plugins.evaluate.outcomes import Outcome, OutcomeRow
from routenlp_plugins.replaying import replayed
from routenlp_plugins.watching import excess_of

ALPHA, DELTA = 0.05, 0.1
DAYS, PER_DAY, CHANGE, AUDITED = 14, 2000, 4, 0.05
FITTED_ON, STREAMS = 1500, 20
MORE = 1.5
"""Growth of the audits since the alarm at which a cheaper policy is looked for."""
LOSSES = (0.1, 0.3)
"""Share of the right answers that become wrong."""
WAYS = ("nothing", "weekly", "watched")


def main() -> None:
    answered("cs_intent", "B")  # before there are two processes to collect it
    with get_context("fork").Pool(2) as pool:
        streams = pool.starmap(stream, [(loss, seed) for loss in LOSSES for seed in range(STREAMS)], chunksize=1)
    rows = [summary(loss, way, [s[way] for s in streams if s["loss"] == loss]) for loss in LOSSES for way in WAYS]
    facts = {
        "alpha": ALPHA,
        "delta": DELTA,
        "days": DAYS,
        "queries_a_day": PER_DAY,
        "day_of_change": CHANGE,
        "audited": AUDITED,
        "streams": STREAMS,
        "rows": rows,
    }
    (HERE / "results" / "shift.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(markdown(rows))


@dataclass
class Way:
    """What happened under one way of living with the change."""

    release: Release
    bad: int = 0
    alarm: int | None = None
    back: int | None = None
    violations: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    bad_before_alarm: int = 0


def stream(loss: float, seed: int) -> dict[str, Any]:
    """Two weeks under each way."""
    rng = np.random.default_rng([seed, int(100 * loss)])
    portfolio = Portfolio.from_yaml(HERE / "portfolios" / "local_tiers.yaml")
    population = answered("cs_intent", "B")
    fitted_on = rng.choice(len(population), FITTED_ON, replace=False)
    release = fit([population[i] for i in fitted_on], portfolio, alpha=ALPHA, delta=DELTA, seed=seed)
    tier = Counter(replayed(row, release).tier for row in population[:500]).most_common(1)[0][0]
    worse = [degraded(row, tier, loss, rng) for row in population]
    rest = np.setdiff1d(np.arange(len(population)), fitted_on)
    ways = {way: Way(release) for way in WAYS}
    audits: list[OutcomeRow] = []
    watch = Watch.over(release)
    fits, since, tried_with = 0, 0, 0
    for day in range(1, DAYS + 1):
        source = population if day < CHANGE else worse
        today = [source[i] for i in rng.choice(rest, PER_DAY)]
        drawn = rng.random(PER_DAY) < AUDITED
        serving = {way: ways[way].release for way in WAYS}
        tallies: dict[str, tuple[int, float]] = dict.fromkeys(WAYS, (0, 0.0))
        for number, (row, audited) in enumerate(zip(today, drawn, strict=True)):
            for way in WAYS:
                bad, ratio = asked(row, serving[way])
                tallies[way] = tallies[way][0] + bad, tallies[way][1] + ratio
                if way == "watched" and ways[way].alarm is None and day >= CHANGE:
                    ways[way].bad_before_alarm += bad
            if audited:
                audits.append(replace(row, query=replace(row.query, id=f"{day}-{number}"), source=f"{day}-{number}"))
                if ways["watched"].alarm is None:
                    watch = watch.after(audits[-1])
                    if watch.expired:
                        ways["watched"].alarm, since = (day - 1) * PER_DAY + number, len(audits)
                        serving["watched"] = ways["watched"].release = watch.serving
        for way in WAYS:
            ways[way].violations.append(tallies[way][0] / PER_DAY)
            ways[way].cost.append(tallies[way][1] / PER_DAY)
            ways[way].bad += tallies[way][0] if day >= CHANGE else 0
        if day == 7:
            ways["weekly"].release = refitted(audits, portfolio) or ways["weekly"].release
        mine = ways["watched"]
        fresh = audits[since:]
        if mine.alarm is not None:
            tries = [renewed(release, audits)]
            if len(fresh) >= MORE * tried_with:
                tried_with, fits = len(fresh), fits + 1
                tries.append(refitted(fresh, portfolio, DELTA / 2 / (fits * (fits + 1))))
            for again in tries:
                if again is not None and (mine.back is None or cost(again, fresh) < cost(mine.release, fresh)):
                    mine.release, mine.back = again, mine.back or day
    return {"loss": loss, "seed": seed, **{way: facts(ways[way]) for way in WAYS}}


def degraded(row: OutcomeRow, tier: str, loss: float, rng: np.random.Generator) -> OutcomeRow:
    """The row with the tier's right answer wrong, with this probability."""
    outcome = row.outcomes[tier]
    if outcome.quality != 1 or rng.random() >= loss:
        return row
    wrong = Outcome(0.0, replace(outcome.completion, text="something_else"))
    return replace(row, outcomes={**row.outcomes, tier: wrong})


def asked(row: OutcomeRow, release: Release) -> tuple[bool, float]:
    """Whether the answer is a violation, and its cost against the frontier alone."""
    answer = replayed(row, release)
    frontier = row.outcomes[release.portfolio.frontier].completion
    tier = release.portfolio.tier(release.portfolio.frontier)
    always = frontier.cost_usd or tier.cost(frontier.input_tokens, frontier.output_tokens, None) or 1.0
    excess = excess_of(row, release, Violation(ALPHA))
    return excess > 0, (answer.trace.cost_usd or 0.0) / always


def cost(release: Release, audits: Sequence[OutcomeRow]) -> float:
    return float(np.mean([asked(row, release)[1] for row in audits]))


def renewed(release: Release, audits: Sequence[OutcomeRow]) -> Release | None:
    """By the half of delta that renewals spend here."""
    if release.certificate is None:
        raise AssertionError("fit always certifies")
    halved = tuple(replace(proof, delta=(proof.delta or DELTA) / 2) for proof in release.certificate.proofs)
    certificate = replace(release.certificate, proofs=halved)
    try:
        return renew(replace(release, certificate=certificate), list(audits), delta=DELTA)
    except (RiskNotControlledError, DataError):
        return None


def refitted(audits: Sequence[OutcomeRow], portfolio: Portfolio, delta: float = DELTA) -> Release | None:
    try:
        return fit(list(audits), portfolio, alpha=ALPHA, delta=delta)
    except (RiskNotControlledError, DataError):
        return None


def facts(way: Way) -> dict[str, Any]:
    return {
        "bad": way.bad,
        "alarm": way.alarm,
        "back": way.back,
        "bad_before_alarm": way.bad_before_alarm,
        "violations": way.violations,
        "cost": way.cost,
    }


def summary(loss: float, way: str, streams: Sequence[dict[str, Any]]) -> dict[str, Any]:
    change = (CHANGE - 1) * PER_DAY
    alarms = [s["alarm"] for s in streams if s["alarm"] is not None]
    backs = [s["back"] for s in streams if s["back"] is not None]
    after = np.array([s["violations"][CHANGE - 1 :] for s in streams])
    last = np.array([s["violations"][-3:] for s in streams]).mean(axis=1)
    return {
        "loss": loss,
        "way": way,
        "bad_answers_after_change": round(float(np.mean([s["bad"] for s in streams])), 1),
        "bad_answers_before_alarm": round(float(np.mean([s["bad_before_alarm"] for s in streams])), 1),
        "false_alarms": sum(alarm < change for alarm in alarms),
        "never_alarmed": len(streams) - len(alarms),
        "queries_to_alarm": round(float(np.median([a - change for a in alarms if a >= change])), 0) if alarms else None,
        "days_to_valid": round(float(np.median([back - CHANGE + 1 for back in backs])), 1) if backs else None,
        "back": len(backs),
        "violation_rate_after_change": round(float(after.mean()), 4),
        "violation_rate_last_3_days": round(float(last.mean()), 4),
        "streams_above_alpha_last_3_days": int((last > ALPHA).sum()),
        "cost_ratio_after_change": round(float(np.mean([s["cost"][CHANGE - 1 :] for s in streams])), 4),
        "cost_ratio_last_3_days": round(float(np.mean([s["cost"][-3:] for s in streams])), 4),
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| lost | way | bad answers | before the alarm | queries to alarm | days to valid | last 3 days: bad | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = (
        "loss",
        "way",
        "bad_answers_after_change",
        "bad_answers_before_alarm",
        "queries_to_alarm",
        "days_to_valid",
        "violation_rate_last_3_days",
        "cost_ratio_last_3_days",
    )
    lines += [f"| {' | '.join(str(row[name]) for name in names)} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
