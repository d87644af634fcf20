"""Run tiers over queries with references and write the outcomes: the data everything else is fitted on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import DataError, PortfolioError, TierError
from .evaluate.metrics import Metric, metric
from .evaluate.outcomes import Outcome, OutcomeRow, Paths, outcome_line
from .evaluate.references import Reference, read_references
from .evaluate.resuming import finished_rows, locked, replace_rows
from .portfolio import Portfolio
from .tiers.boundary import SyncTierCallable, TierCallable, call_tier, sync_form
from .types import Call, Completion

__all__ = ["collect"]

MAX_FAILURES_IN_A_ROW = 10


def collect(
    queries: Iterable[Reference] | Paths,
    tiers: Mapping[str, TierCallable],
    out: str | Path,
    *,
    portfolio: Portfolio | str | Path,
    metrics: Mapping[str, Metric] | None = None,
    workers: int = 1,
    progress: bool = True,
) -> int:
    """Run every tier that may serve a query over it, score the answers and append a line a query to `out`.

    Resumable: queries already in `out` are left out, and a half-written last line is done again. A tier that
    fails is recorded with its error and counts as unknown quality; the next run tries it again, after the queries
    that are still waiting, and runs tiers that were added.

    Args:
        queries: references, or paths of files of them; see `routenlp_plugins.evaluate.references`.
        out: the ``.jsonl`` file; what is in it already must be of the same tiers and queries.
        tiers: name -> callable ``Call -> Completion``; the frontier must be among them.
        portfolio: a portfolio, or the path of its YAML file.
        metrics: name -> function ``(answer, reference) -> quality in [0, 1]``, or None where it cannot tell, beside
            those of `routenlp_plugins.evaluate.metrics`.
        workers: queries that are run at the same time.
        progress: whether to draw a bar on standard error if that is a terminal.

    Returns:
        The number of outcomes written now.

    Raises:
        DataError: queries or the existing file are malformed, or no metric is known for a task.
        PortfolioError: a tier is not in the portfolio, is async only, or the frontier is missing.
        TierError: a tier failed ten times in a row; what was written stays, and the next run goes on from there.
    """
    if not isinstance(portfolio, Portfolio):
        portfolio = Portfolio.from_yaml(portfolio)
    functions = _functions(tiers, portfolio)
    references = _references(queries)
    score = {r.query.id: _scorer(r, portfolio, metrics) for r in references}
    target = Path(out).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target):
        done = finished_rows(target, functions, references)
        wanted = {r.query.id: _wanted(r, functions, portfolio) for r in references}
        again = [r for r in references if r.query.id in done and not _answered(done[r.query.id]) >= wanted[r.query.id]]
        waiting = [r for r in references if r.query.id not in done]

        def run(reference: Reference) -> OutcomeRow:
            query = reference.query
            before = done[query.id].outcomes if query.id in done else {}
            outcomes = {
                name: before[name]
                if name in before and before[name].error is None
                else _run(function, portfolio, Call(name, query), reference, score[query.id])
                for name, function in functions.items()
                if name in wanted[query.id]
            }
            asked = [o.completion.asked for o in outcomes.values()] + [
                done[query.id].asked if query.id in done else None
            ]
            return OutcomeRow(
                query,
                outcomes,
                reference=reference.reference,
                group=reference.group,
                asked=next((text for text in asked if text not in (None, query.text)), None),
            )

        with ThreadPoolExecutor(max(workers, 1)) as pool, _bar(progress) as bar:
            step = bar.add_task("collecting outcomes", total=len(references), completed=len(done) - len(again))

            def rows_of(members: list[Reference]) -> Iterator[OutcomeRow]:
                batch = 4 * max(workers, 1)
                for start in range(0, len(members), batch):
                    running = [pool.submit(run, member) for member in members[start : start + batch]]
                    # as they come: a slow call must not hold back what others were paid for
                    failed: list[Future[OutcomeRow]] = []
                    for future in as_completed(running):
                        if isinstance(future.exception(), Exception):
                            failed.append(future)
                        else:
                            yield future.result()
                            bar.advance(step)
                    for future in failed:
                        future.result()

            def new_tiers_checked(rows: Iterator[OutcomeRow]) -> Iterator[OutcomeRow]:
                for row in rows:
                    yield row
                    # what failed on this query before may always do
                    before = done[row.query.id].outcomes
                    _check_streak(streak, {t: o for t, o in row.outcomes.items() if t not in before}, target)

            streak = dict.fromkeys(functions, 0)
            with target.open("a", encoding="utf-8") as file:
                for row in rows_of(waiting):
                    file.write(outcome_line(row) + "\n")
                    file.flush()
                    _check_streak(streak, row.outcomes, target)
            if again:
                replace_rows(target, new_tiers_checked(rows_of(again)))
    return len(again) + len(waiting)


def _references(queries: Iterable[Reference] | Paths) -> list[Reference]:
    items: list[Reference] = []
    paths: list[str | Path] = []
    for item in [queries] if isinstance(queries, str | Path) else queries:
        if isinstance(item, Reference):
            items.append(item)
        else:
            paths.append(item)
    items += read_references(paths)
    if not items:
        raise DataError("queries: empty; there is nothing to run")
    seen: set[str | None] = set()
    for item in items:
        if not (isinstance(item.query.id, str) and item.query.id and isinstance(item.query.task, str)):
            raise DataError(f"queries: id and task are needed, got {item.query!r}")
        if item.query.id in seen:
            raise DataError(f"query_id: {item.query.id!r} occurs more than once")
        seen.add(item.query.id)
    return items


def _functions(tiers: Mapping[str, TierCallable], portfolio: Portfolio) -> dict[str, SyncTierCallable]:
    if portfolio.frontier not in tiers:
        raise PortfolioError(f"tiers: the frontier {portfolio.frontier!r} is missing")
    functions = {}
    for name, tier in tiers.items():
        portfolio.tier(name)
        function = sync_form(tier)
        if function is None:
            raise PortfolioError(f"tier {name!r} is async only; collect needs a sync form")
        functions[name] = function
    return functions


def _scorer(reference: Reference, portfolio: Portfolio, metrics: Mapping[str, Metric] | None) -> Metric:
    task = reference.query.task or ""
    name = reference.metric or portfolio.task(task).metric
    if name is None:
        raise DataError(f"task {task!r}: no metric; give it in the portfolio or with the query")
    score = metric(name, metrics)
    try:
        score(reference.reference, reference.reference)
    except DataError as error:
        raise DataError(f"query {reference.query.id!r}: {error}") from None
    return score


def _wanted(reference: Reference, functions: Mapping[str, object], portfolio: Portfolio) -> set[str]:
    """The tiers that are to answer a query."""
    return {*portfolio.below_frontier(reference.query.task or ""), portfolio.frontier} & set(functions)


def _answered(row: OutcomeRow) -> set[str]:
    return {tier for tier, outcome in row.outcomes.items() if outcome.error is None}


def _run(
    function: SyncTierCallable,
    portfolio: Portfolio,
    call: Call,
    reference: Reference,
    score: Metric,
) -> Outcome:
    try:
        completion = call_tier(portfolio.tier(call.tier), function, call)
    except TierError as error:
        return Outcome(None, Completion(""), error=str(error))
    with _Place(f"while scoring the answer of {call.tier} to query {call.query.id!r}"):
        quality = score(completion.text, reference.reference)
    if quality is None:
        return Outcome(None, completion)
    if not isinstance(quality, Real) or not 0 <= quality <= 1:
        raise DataError(f"query {call.query.id!r}: the metric returned {quality!r} for {call.tier}; expected [0, 1]")
    return Outcome(float(quality), completion)


@dataclass(frozen=True, slots=True)
class _Place:
    """Tells errors of the user's own functions where they arose."""

    note: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self.note)


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (wanted and console.is_terminal))


def _check_streak(streak: dict[str, int], outcomes: Mapping[str, Outcome], target: Path) -> None:
    for tier, outcome in outcomes.items():
        streak[tier] = 0 if outcome.error is None else streak[tier] + 1
        if streak[tier] >= MAX_FAILURES_IN_A_ROW:
            raise TierError(
                f"tier {tier!r} failed {streak[tier]} times in a row, last with {outcome.error!r}; the outcomes so far "
                f"are in {target}; mend the tier and run again: what failed is tried again, what did not is kept",
                tier,
            )
