"""Run tiers over queries with references and write the outcomes: the data everything else is fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .errors import DataError, PortfolioError, TierError
from .evaluate.metrics import Metric, metric
from .evaluate.outcomes import Outcome, OutcomeRow, Paths, outcome_line, parse_outcome_line, read_lines
from .portfolio import Portfolio
from .tiers.boundary import SyncTierCallable, TierCallable, call_tier, sync_form
from .types import Call, Completion, Query

__all__ = ["Reference", "collect", "read_references"]

MAX_FAILURES_IN_A_ROW = 10


@dataclass(frozen=True, slots=True)
class Reference:
    """A query with the answer it is scored against.

    Attributes:
        metric: name of the metric; None takes the one of the task in the portfolio.
        group: rows that belong together, kept in the outcomes.
    """

    query: Query
    reference: str
    metric: str | None = None
    group: str | None = None


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
    fails is recorded with its error and counts as unknown quality; the next run tries it again.

    Args:
        queries: references, or paths of files of them; see `read_references`.
        out: the ``.jsonl`` file; what is in it already must be of the same tiers and queries.
        tiers: name -> callable ``Call -> Completion``; the frontier must be among them.
        portfolio: a portfolio, or the path of its YAML file.
        metrics: name -> function ``(answer, reference) -> quality in [0, 1]``, beside those of
            `routenlp_plugins.evaluate.metrics`.
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
    score = {r.query.id: metric(_metric_name(r, portfolio), metrics) for r in references}
    target = Path(out)
    done = _finished(target, functions, references)
    failed = {name for name, row in done.items() if any(outcome.error for outcome in row.outcomes.values())}
    again = [reference for reference in references if reference.query.id in failed]
    waiting = [reference for reference in references if reference.query.id not in done]

    def run(reference: Reference) -> OutcomeRow:
        query = reference.query
        before = done[query.id].outcomes if query.id in done else {}
        allowed = (*portfolio.below_frontier(query.task or ""), portfolio.frontier)
        outcomes = {
            name: before[name]
            if name in before and before[name].error is None
            else _run(function, portfolio, Call(name, query), reference, score[query.id])
            for name, function in functions.items()
            if name in allowed
        }
        return OutcomeRow(query, outcomes, reference=reference.reference, group=reference.group)

    target.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max(workers, 1)) as pool, _bar(progress) as bar:
        step = bar.add_task("collecting outcomes", total=len(references), completed=len(done) - len(again))

        def rows_of(members: list[Reference]) -> Iterator[OutcomeRow]:
            streak = dict.fromkeys(functions, 0)
            batch = 4 * max(workers, 1)
            for start in range(0, len(members), batch):
                for row in pool.map(run, members[start : start + batch]):
                    yield row
                    bar.advance(step)
                    _check_streak(streak, row, target)

        if again:
            _rewrite(target, done | {row.query.id: row for row in rows_of(again)})
        with target.open("a", encoding="utf-8") as file:
            for row in rows_of(waiting):
                file.write(outcome_line(row) + "\n")
                file.flush()
    return len(again) + len(waiting)


def read_references(paths: Paths) -> list[Reference]:
    """Read JSON lines ``{"query_id", "task", "text", "reference", "metric"?, "group"?}``.

    Raises:
        DataError: names file, line and field.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    return [_reference(line, f"{path}:{number}") for path in files for number, line in read_lines(path)]


class _Reference(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    query_id: Annotated[str, Field(min_length=1)]
    task: Annotated[str, Field(min_length=1)]
    text: str
    reference: str
    metric: str | None = None
    group: str | None = None


def _reference(line: str, source: str) -> Reference:
    try:
        row = _Reference.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DataError(f"{source}: {'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}") from None
    return Reference(Query(row.text, task=row.task, id=row.query_id), row.reference, row.metric, row.group)


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
        if item.query.id is None or item.query.task is None:
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


def _metric_name(reference: Reference, portfolio: Portfolio) -> str:
    task = reference.query.task or ""
    name = reference.metric or portfolio.task(task).metric
    if name is None:
        raise DataError(f"task {task!r}: no metric; give it in the portfolio or with the query")
    return name


_BEGINNING = b'{"query_id": '


def _finished(
    target: Path, functions: Mapping[str, object], references: Sequence[Reference]
) -> dict[str | None, OutcomeRow]:
    """The rows in the file already; a last line that was half written is cut off, anything else is left alone."""
    if target.suffix == ".gz":
        raise DataError(f"{target}: outcomes are appended line by line; write to a .jsonl file and compress it later")
    if not target.exists():
        return {}
    content = target.read_bytes()
    whole = content.rfind(b"\n") + 1
    half = content[whole:]
    try:
        lines = content[:whole].decode().split("\n")[:-1]
    except UnicodeDecodeError:
        raise DataError(f"{target}: not UTF-8 text") from None
    rows = [parse_outcome_line(line, f"{target}:{number}") for number, line in enumerate(lines, start=1)]
    known = {reference.query.id for reference in references}
    for row in rows:
        other = [tier for tier in row.outcomes if tier not in functions]
        if other or row.query.id not in known:
            raise DataError(
                f"{row.source}: belongs to another collection "
                f"({'tier ' + other[0] if other else 'query ' + str(row.query.id)}); write to a new file"
            )
    if half:
        if half[: len(_BEGINNING)] != _BEGINNING[: len(half)]:
            raise DataError(f"{target}:{len(lines) + 1}: is no outcome; write to a new file")
        with target.open("r+b") as file:
            file.truncate(whole)
    return {row.query.id: row for row in rows}


def _rewrite(target: Path, rows: Mapping[str | None, OutcomeRow]) -> None:
    """Replace the whole file in one step."""
    scratch = target.with_name(f".{target.name}.new")
    scratch.write_text("".join(outcome_line(row) + "\n" for row in rows.values()), encoding="utf-8")
    scratch.replace(target)


def _run(
    function: SyncTierCallable,
    portfolio: Portfolio,
    call: Call,
    reference: Reference,
    score: Callable[[str, str], float],
) -> Outcome:
    try:
        completion = call_tier(portfolio.tier(call.tier), function, call)
    except TierError as error:
        return Outcome(None, Completion(""), error=str(error))
    quality = score(completion.text, reference.reference)
    if not isinstance(quality, int | float) or not 0 <= quality <= 1:
        raise DataError(f"query {call.query.id!r}: the metric returned {quality!r} for {call.tier}; expected [0, 1]")
    return Outcome(float(quality), completion)


def _bar(wanted: bool) -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not (wanted and console.is_terminal))


def _check_streak(streak: dict[str, int], row: OutcomeRow, target: Path) -> None:
    for tier, outcome in row.outcomes.items():
        streak[tier] = streak[tier] + 1 if outcome.error else 0
        if streak[tier] >= MAX_FAILURES_IN_A_ROW:
            raise TierError(
                f"tier {tier!r} failed {streak[tier]} times in a row, last with {outcome.error!r}; the outcomes so far "
                f"are in {target}; mend the tier and run again: what failed is tried again, what did not is kept",
                tier,
            )
