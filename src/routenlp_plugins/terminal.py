"""How certificates and replays look on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .distill.results import Round
from .policy import Policy, Rung
from .release import Release
from .replaying import Replay
from .signals.counting import Counts
from .signals.keeping import Kept
from .signals.labels import LabelModel
from .signals.ledger import Ledger

__all__ = ["show_labels", "show_ledger", "show_release", "show_replay", "show_round", "show_versions"]


def show_round(console: Console, done: Round) -> None:
    """What was taught, what the gate says, what it cost and saves."""
    console.print(Text.assemble((f"Round {done.number}", "bold"), f": {done.queries} queries of the traffic"))
    for reason, number in done.unanswered.items():
        console.print(f"{number} fresh queries without an answer of the frontier: {reason}", highlight=False)
    for reason, number in done.left_out.items():
        console.print(f"{number} traces left out: {reason}", highlight=False)
    for one in done.students:
        if one.skipped is None:
            paid = f"{one.already_paid} of them paid for when they were served"
            console.print(f"{one.tier}: {one.lessons} lessons, {paid}", highlight=False, markup=False)
    table = Table("on fresh queries", "", "queries", "quality before", "after", "p")
    for check in (check for one in done.students if one.verdict for check in one.verdict.checks):
        if check.kind != "harm" or not check.passed:
            verdict = "passed" if check.passed else "failed"
            qualities = f"{check.old:.3f}", f"{check.new:.3f}", f"{check.p_value:.3g}"
            table.add_row(escape(f"{check.kind}: {check.about}"), verdict, str(check.n), *qualities)
    if table.row_count:
        console.print(table)
    for why in done.refusals:
        console.print(f"refused: {why}", highlight=False, markup=False)
    if done.broken is not None:
        about = "what served before did not keep its promise any more, so that another version serves at any cost"
        console.print(f"{about}: {done.broken}", highlight=False, markup=False)
    if done.before is not None and done.after is not None:
        ratios = f"{_number(done.before['cost_ratio'])} before, {_number(done.after['cost_ratio'])} after"
        console.print(f"cost against always-frontier, on fresh queries: {ratios}", highlight=False)
    earned = "" if done.break_even is None else f", earned after {done.break_even} queries"
    console.print(f"spent: USD {done.bill.total:.4f}{earned}", highlight=False)
    end = "the version before serves" if done.promoted is None else f"version {done.promoted} serves: {done.certified}"
    console.print(end, highlight=False, markup=False)


def show_versions(console: Console, facts: Mapping[str, Any]) -> None:
    """One row a version and one a round."""
    table = Table("version", "", "made", "from")
    for one in facts["versions"]:
        serves = "serves" if one["version"] == facts["serving"] else ""
        table.add_row(str(one["version"]), serves, one["created"], escape(one["note"]))
    console.print(table)
    table = Table("round", "queries", "cost before", "after", "USD spent", "outcome")
    for one in facts["rounds"]:
        outcome = f"version {one['promoted']}" if one["promoted"] else "refused"
        numbers = _number(one["before"]), _number(one["after"]), f"{one['cost_usd']:.4f}"
        table.add_row(str(one["number"]), str(one["queries"]), *numbers, escape(outcome))
    if table.row_count:
        console.print(table)
    for one in facts["rounds"]:
        reasons = [*one["refusals"], *([f"at any cost: {one['broken']}"] if one["broken"] else [])]
        for why in reasons:
            console.print(f"round {one['number']}: {why}", highlight=False, markup=False)
    if facts["serving"] is None:
        console.print("no version serves; routenlp promote VERSION lets one")
    for number in facts["unfinished"]:
        console.print(
            f"round {number} was begun and is not finished; routenlp distill goes on with it", highlight=False
        )


def show_release(console: Console, release: Release) -> None:
    """One row a task, then the policies, why the other tasks stay on the frontier, and what is promised."""
    certificate = release.certificate
    if certificate is None:
        console.print("Every task stays on the frontier; nothing was tested.")
        return
    bound = "lower bound" if certificate.risk == "retention" else "upper bound"
    table = Table("task", "status", "rows", certificate.risk, bound, "cost ratio")
    for proof in certificate.proofs:
        table.add_row(
            escape(", ".join(proof.tasks)),
            proof.status if release.policy.void is None else "void",
            str(proof.n),
            _number(proof.estimate),
            _number(proof.bound),
            _with_interval(proof.cost_ratio, proof.cost_interval),
        )
    console.print(table)
    for climb, alike in _alike((_climb(release.policy, name), name) for name in certificate.certified).items():
        console.print(Text.assemble((", ".join(alike), "bold"), f": {climb}"))
    for sentence, names in certificate.obstacles.items():
        console.print(Text.assemble((", ".join(names), "bold"), f": {sentence}"))
    certified = ", ".join(certificate.certified)
    promise = f"Certified for {certified}: {certificate.claim}" if certified else "No task can leave the frontier."
    if release.policy.void is not None:
        console.print(f"The certificate is void: {release.policy.void}", highlight=False, markup=False)
        return
    console.print(promise, highlight=False, markup=False)
    if len(certificate.certified) > 1 and certificate.scope != "each task":
        console.print("It speaks of the mix of these tasks as in the outcomes, not of each of them.", highlight=False)
    if certified and certificate.risk == "retention":
        console.print(
            "Confidence and belief are (1 + expected quality - that of the frontier) / 2: 0.5 is as good as it.",
            highlight=False,
        )
    if certified:
        console.print(f"Checked while serving: {'; '.join(_guards(release))}", highlight=False, markup=False)


def _alike(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Sentence -> the names of all that it is said of."""
    found: dict[str, list[str]] = {}
    for sentence, name in pairs:
        found.setdefault(sentence, []).append(name)
    return found


def _guards(release: Release) -> list[str]:
    """What voids the certificate at run time, and what cannot."""
    policy = release.policy
    tasks = [task for task, rungs in policy.ladders.items() if rungs]
    tiers = list(dict.fromkeys(rung.tier for task in tasks for rung in policy.ladders[task]))
    checks = (
        ("the models of", tiers, policy.models, "its answers did not always say"),
        ("prompts and options for", tasks, policy.prompts, "they varied or were not recorded"),
        ("whether queries are like those of", tasks, policy.support, "too few texts, or turned off"),
    )
    lines = []
    for what, names, known, reason in checks:
        checked = [name for name in names if name in known]
        missing = [name for name in names if name not in known]
        if not checked:
            lines.append(f"not {what} {', '.join(missing)}: {reason}")
            continue
        line = f"{what} {', '.join(checked)}"
        lines.append(f"{line} (not {', '.join(missing)}: {reason})" if missing else line)
    return lines


def show_replay(console: Console, result: Replay) -> None:
    """Quality and cost, routed and against always-frontier, then who answered and what went wrong."""
    table = Table("", "routed", "ratio to always-frontier")
    table.add_row("queries", str(result.queries), "")
    table.add_row("quality", _number(result.quality, "unknown"), _number(result.quality_ratio, "unknown"))
    table.add_row("cost, USD a query", f"{result.cost_usd:.3g}", _number(result.cost_ratio, "unknown"))
    for tier, share in result.tier_share.items():
        if not share:
            continue
        table.add_row(f"answered by {escape(tier)}", f"{share:.1%}", "")
    table.add_row("escalated", f"{result.escalation_rate:.1%}", "")
    if result.violation_rate is not None:
        table.add_row("violations", f"{result.violation_rate:.2%}", "")
    for task, rate in result.violation_rate_by_task.items():
        table.add_row(f"  {escape(task)}", f"{rate:.2%}", "")
    console.print(table)


def _climb(policy: Policy, task: str) -> str:
    """The climb of a task as a person reads it."""
    offers = policy.offers.get(task, ())
    if offers:
        prices = ", ".join(f"{offer.tier} less {offer.price:.4f}" for offer in offers)
        sized = " times what the frontier is expected to cost" if task in policy.relative_cost else ""
        return f"a router picks the tier of the most belief less a price{sized}: {prices}"
    ladder = policy.ladders[task]
    if ladder and ladder[0].threshold is None and ladder[0].belief is None:
        others = ", then ".join([*(rung.tier for rung in ladder[1:]), policy.frontier])
        return f"{ladder[0].tier} for every query ({others} if it fails)"
    steps = ", then ".join([*map(_step, ladder), policy.frontier])
    weighed = any(rung.lossless is not None for rung in policy.ladders[task])
    return f"{steps}; lower where the frontier is expected to cost more" if weighed else steps


def _step(rung: Rung) -> str:
    """A rung as a person reads it."""
    called = f"{rung.tier} (after {' and '.join(rung.after)})" if rung.after else rung.tier
    if rung.belief is not None:
        called = f"{called} if the belief in it reaches {rung.level:.4f}"
    if rung.threshold is None:
        return called
    if not rung.confidences or (rung.threshold == 1 and rung.lossless is None):
        return f"{called} (as evidence)"
    best = "the best answer so far" if len(rung.confidences) > 1 else "its answer"
    joint = " and" if rung.belief is not None else ""
    return f"{called}{joint} if the confidence in {best} reaches {rung.threshold:.4f}"


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _number(value: float | None, missing: str = "") -> str:
    return missing if value is None else f"{value:.4f}"


def show_ledger(console: Console, bill: Ledger, kept: Kept, counts: Counts) -> None:
    """The calls by purpose and tier, what was saved and kept, and what the store holds."""
    columns: dict[str, list[int] | list[float]] = {
        "calls": [line.calls for line in bill.lines],
        "returned": [line.returned for line in bill.lines],
        "failed": [line.failed for line in bill.lines],
        "input": [line.input_tokens for line in bill.lines],
        "cached": [line.cached_tokens for line in bill.lines],
        "output": [line.output_tokens for line in bill.lines],
        "of judges": [line.judges_usd for line in bill.lines],
    }
    shown = {name: of for name, of in columns.items() if any(of) or name == "calls"}
    table = Table()
    for name in ("purpose", "tier", "USD", *shown):
        table.add_column(name, no_wrap=name == "USD", overflow="fold")
    for place, line in enumerate(bill.lines):
        usd = f"{line.usd:.6f}" if not line.unpriced else f"{line.usd:.6f} + {line.unpriced} unknown"
        numbers = (f"{of[place]:.6f}" if name == "of judges" else str(of[place]) for name, of in shown.items())
        table.add_row(escape(line.purpose), escape(line.tier), usd, *numbers)
    console.print(table)
    console.print(f"{bill.traces} queries", highlight=False)
    if bill.unknown:
        console.print(f"Saved: unknown. {bill.unknown}", highlight=False, markup=False)
    elif bill.saved_usd is not None and bill.always_usd is not None:
        interval = bill.interval_usd
        sure = "not known: fewer than two audits" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"
        told = f"Saved: USD {bill.saved_usd:.4f} (95 %: {sure}; of {bill.audited} answers the frontier was asked too)"
        routed = any(line.returned for line in bill.lines if line.tier != bill.frontier)
        if not routed:
            console.print(f"Nothing is routed yet. Beside the answers: USD {bill.beside_usd:.4f}", highlight=False)
        else:
            console.print(f"{told} of {bill.always_usd:.4f} that the frontier alone costs", highlight=False)
        if bill.beside_usd and routed:
            when = "never at this rate" if bill.break_even is None else f"after {bill.break_even} routed queries"
            console.print(f"Beside the answers: USD {bill.beside_usd:.4f}, earned {when}", highlight=False)
    if any(line.returned for line in bill.lines if line.tier != bill.frontier):
        told = kept.unknown
        if kept.quality is not None and kept.of_frontier is not None:
            told = f"{kept.quality:.3f}, that of the frontier {kept.of_frontier:.3f}, on {kept.audited} audited queries"
        console.print(f"Quality: {told}", highlight=False, markup=False)
    console.print(
        f"{counts.signals} signals: {counts.repeated_signals} given again, {counts.late_signals} a day late or more, "
        f"{counts.unknown_signals} about unknown runs",
        highlight=False,
    )
    if counts.misplaced_signals:
        console.print(f"{counts.misplaced_signals} signals are about tiers that were never asked", style="yellow")
    if counts.dropped:
        console.print(f"{counts.dropped} traces or signals were dropped: too much waited to be written", style="yellow")


def show_labels(console: Console, model: LabelModel) -> None:
    """Each source beside the audits, and the bounds of the labels."""
    table = Table("signal", "source", "audited", "mean if good", "mean if bad", "p of chance", "used")
    for one in model.sources:
        means = (f"{one.on_good:.2f}", f"{one.on_bad:.2f}", f"{one.p_value:.2g}")
        table.add_row(
            escape(one.kind), escape(one.source), str(sum(one.answers)), *means, "yes" if one.used else "no better"
        )
    console.print(table)
    good, bad = model.audited
    console.print(
        f"Labels of good answers are {model.noise.on_good:.3f} at most on average, of bad ones "
        f"{model.noise.on_bad:.3f}: both with probability {1 - model.noise.delta:g}, on {good} good and {bad} bad "
        "audited answers",
        highlight=False,
    )
