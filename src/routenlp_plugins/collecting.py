"""Run tiers over queries with references and write the outcomes: the data everything else is fitted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
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

__all__ = ["Judge", "collect", "progress_bar"]

Judge = Callable[[Reference, Completion], float | None]
"""How good an answer is, in [0, 1], where its text is not enough to tell; None cannot tell."""
MAX_FAILURES_IN_A_ROW = 10


def collect(
    queries: Iterable[Reference] | Paths,
    tiers: Mapping[str, TierCallable],
    out: str | Path,
    *,
    portfolio: Portfolio | str | Path,
    metrics: Mapping[str, Metric] | None = None,
    judge: Judge | None = None,
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
        judge: judges every answer instead of metrics, payload included.
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
    judges = {r.query.id: judge or _of_text(_scorer(r, portfolio, metrics)) for r in references}
    target = Path(out).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target), progress_bar(progress) as bar:
        done = finished_rows(target, functions, references)
        collection = _Collection(functions, portfolio, judges, done, target)
        again = [r for r in references if r.query.id in done and not collection.finished(r)]
        waiting = [r for r in references if r.query.id not in done]
        step = bar.add_task("collecting outcomes", total=len(references), completed=len(done) - len(again))
        with target.open("a", encoding="utf-8") as file:
            for row in collection.rows(waiting, max(workers, 1)):
                file.write(outcome_line(row) + "\n")
                file.flush()
                bar.advance(step)
                collection.check_streak(row)
        if again:
            replace_rows(target, collection.rows_again(again, max(workers, 1), lambda: bar.advance(step)))
    return len(again) + len(waiting)


@dataclass(slots=True)
class _Collection:
    """Tiers over queries, beside the rows that are there already.

    Attributes:
        judges: id of a query -> what judges its answers.
        streak: tier -> how often it failed in a row.
    """

    functions: Mapping[str, SyncTierCallable]
    portfolio: Portfolio
    judges: Mapping[str | None, Judge]
    done: Mapping[str | None, OutcomeRow]
    target: Path
    streak: Counter[str] = field(default_factory=Counter)

    def wanted(self, reference: Reference) -> list[str]:
        """The tiers that are to answer a query."""
        may = {*self.portfolio.below_frontier(reference.query.task or ""), self.portfolio.frontier}
        return [name for name in self.functions if name in may]

    def finished(self, reference: Reference) -> bool:
        """Whether all of them have answered it."""
        return set(self._answered(reference)) >= set(self.wanted(reference))

    def row(self, reference: Reference) -> OutcomeRow:
        """Ask the tiers that have not answered yet."""
        query, before = reference.query, self.done.get(reference.query.id)
        answered = self._answered(reference)
        outcomes = {
            name: answered[name] if name in answered else self._outcome(Call(name, query), reference)
            for name in self.wanted(reference)
        }
        asked = [*(outcome.completion.asked for outcome in outcomes.values()), None if before is None else before.asked]
        return OutcomeRow(
            query,
            outcomes,
            reference=reference.reference,
            group=reference.group,
            asked=next((text for text in asked if text not in (None, query.text)), None),
        )

    def rows(self, references: Sequence[Reference], workers: int) -> Iterator[OutcomeRow]:
        """As they come: a slow call must not hold back what others were paid for, nor a metric that fails."""
        batch = 4 * workers
        with ThreadPoolExecutor(workers) as pool:
            for start in range(0, len(references), batch):
                running = [pool.submit(self.row, reference) for reference in references[start : start + batch]]
                failed: list[Future[OutcomeRow]] = []
                for future in as_completed(running):
                    if isinstance(future.exception(), Exception):
                        failed.append(future)
                    else:
                        yield future.result()
                for future in failed:
                    future.result()

    def rows_again(
        self, references: Sequence[Reference], workers: int, advance: Callable[[], None]
    ) -> Iterator[OutcomeRow]:
        """Rows that are there already, with the answers they lack."""
        for row in self.rows(references, workers):
            yield row
            advance()
            # what failed on this query before may always do
            before = self.done[row.query.id].outcomes
            self.check_streak(replace(row, outcomes={t: o for t, o in row.outcomes.items() if t not in before}))

    def check_streak(self, row: OutcomeRow) -> None:
        """Stop if a tier is down.

        Raises:
            TierError: it has failed too often in a row.
        """
        for tier, outcome in row.outcomes.items():
            self.streak[tier] = 0 if outcome.error is None else self.streak[tier] + 1
            if self.streak[tier] >= MAX_FAILURES_IN_A_ROW:
                raise TierError(
                    f"tier {tier!r} failed {self.streak[tier]} times in a row, last with {outcome.error!r}; the "
                    f"outcomes so far are in {self.target}; mend the tier and run again: what failed is tried again, "
                    "what did not is kept",
                    tier,
                )

    def _answered(self, reference: Reference) -> dict[str, Outcome]:
        before = self.done.get(reference.query.id)
        return {} if before is None else {t: o for t, o in before.outcomes.items() if o.error is None}

    def _outcome(self, call: Call, reference: Reference) -> Outcome:
        try:
            completion = call_tier(self.portfolio.tier(call.tier), self.functions[call.tier], call)
        except TierError as error:
            return Outcome(None, Completion(""), error=str(error))
        with _Place(f"while scoring the answer of {call.tier} to query {call.query.id!r}"):
            quality = self.judges[call.query.id](reference, completion)
        if quality is None:
            return Outcome(None, completion)
        if not isinstance(quality, Real) or not 0 <= quality <= 1:
            raise DataError(
                f"query {call.query.id!r}: the metric returned {quality!r} for {call.tier}; expected [0, 1]"
            )
        return Outcome(float(quality), completion)


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
        tasks = ", ".join(one.name for one in portfolio.tasks) or "none"
        raise DataError(
            f"query {reference.query.id!r}: task {task!r} has no metric; give it in the portfolio, whose tasks are "
            f"{tasks}, or with the query"
        )
    score = metric(name, metrics)
    try:
        score(reference.reference, reference.reference)
    except DataError as error:
        raise DataError(f"query {reference.query.id!r}: {error}") from None
    return score


def _of_text(metric: Metric) -> Judge:
    return lambda reference, completion: metric(completion.text, reference.reference)


@dataclass(frozen=True, slots=True)
class _Place:
    """Tells errors of the user's own functions where they arose."""

    note: str

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            error.add_note(self.note)


def progress_bar(wanted: bool) -> Progress:
    """Steps done, steps in all and the time that is left, on standard error if that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (wanted and console.is_terminal))
