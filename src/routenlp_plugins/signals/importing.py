"""What others have recorded, into a store: chat logs, run exports, outcomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..evaluate.outcomes import Paths, parse_outcome_line, read_lines
from ..types import Attempt, Trace
from .langsmith import langsmith
from .openai_logs import openai_logs
from .records import Found, ImportOptions, Line, Reader, identity, when
from .rows import Recorded
from .signal import Signal
from .store import TraceStore

__all__ = ["Imported", "import_traces", "reader_of"]


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of the records.

    Attributes:
        known: of the traces, those whose id was there already; they were left as they are.
    """

    traces: int
    known: int
    signals: int
    skipped: int


def import_traces(store: TraceStore, paths: Paths, form: str, options: ImportOptions | None = None) -> Imported:
    """Read files of JSON lines (``.jsonl``, ``.jsonl.gz``) into a store.

    A record that is in the store already is not written again, so that an import may be repeated.

    Args:
        form: ``openai``: chat completions, as ``{"request", "response"}``, as requests and responses of a batch that
            share a ``custom_id``, or as ``{"messages"}`` that end with the answer. ``langsmith``: exported runs, and
            feedback.
            ``outcomes``: the outcome format; qualities become audits.

    Raises:
        DataError: a file cannot be read, or a line is malformed; names file, line and field.
    """
    reader = reader_of(form)
    options = options or ImportOptions()
    skipped = 0

    def bad(error: DataError) -> None:
        nonlocal skipped
        if not options.skip_bad_lines:
            raise error
        skipped += 1

    traces = known = signals = 0
    last = None
    seen: dict[str, tuple[str, str | None]] = {}
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    for number, found in enumerate(reader(_lines(files, bad), options, bad), start=1):
        if found.trace is not None:
            traces += 1
            one = found.trace
            there = seen.get(one.id) or store.known(one.id)
            known += there is not None
            try:
                _check_known(one, there, found.source)
            except DataError as error:
                bad(error)
                continue
            seen[one.id] = there or ("imported", one.trace.query.text)
            if there is None or there[0] == "imported":
                last = store.record(
                    one.trace,
                    one.id,
                    runs=one.runs,
                    unit=one.unit,
                    origin="imported",
                    propensity=one.propensity,
                    drawn=one.drawn,
                    at=one.at,
                )
                # what was exported from here comes back without news
                if found.beside:
                    last = store.record_calls(one.id, "shadow", found.beside, "imported")
        for signal in found.signals:
            signals += 1
            last = store.give(signal)
        if number % 1000 == 0 and last is not None:
            # reading is faster than writing, and nothing is to be dropped
            last.result()
    store.flush()
    return Imported(traces, known, signals, skipped)


def reader_of(form: str) -> Reader:
    """What reads files of this format.

    Raises:
        DataError: there is none.
    """
    readers: dict[str, Reader] = {"openai": openai_logs, "langsmith": langsmith, "outcomes": _outcomes}
    if form not in readers:
        raise DataError(f"format must be one of {', '.join(readers)}, got {form!r}")
    return readers[form]


def _check_known(one: Recorded, there: tuple[str, str | None] | None, source: str) -> None:
    if there is None and not one.trace.attempts:
        raise DataError(f"{source}: outcomes: the frontier is missing, whose answers are taken for those served")
    if there is not None and there[1] not in (None, one.trace.query.text) and not _is_hash(there[1]):
        raise DataError(
            f"{source or 'import'}: {one.id}: a trace of this id is in the store and has another text; give the "
            "records ids of their own"
        )


def _is_hash(text: str | None) -> bool:
    return text is not None and len(text) == 64 and all(letter in "0123456789abcdef" for letter in text)


def _lines(files: list[Path], bad: Callable[[DataError], None]) -> Iterator[Line]:
    for path in files:
        for number, text in read_lines(path):
            source = f"{path}:{number}"
            try:
                facts = json.loads(text)
            except json.JSONDecodeError as error:
                bad(DataError(f"{source}: not a complete JSON object ({error})"))
                continue
            if not isinstance(facts, dict):
                bad(DataError(f"{source}: expected one JSON object per line, got {type(facts).__name__}"))
                continue
            yield Line(facts, text, source)


def _outcomes(lines: Iterator[Line], options: ImportOptions, bad: Callable[[DataError], None]) -> Iterator[Found]:
    if options.portfolio is None:
        raise DataError("outcomes: a portfolio is needed, which says whose answers were served: the frontier's")
    frontier = options.portfolio.frontier
    for line in lines:
        try:
            row = parse_outcome_line(line.text, line.source)
            attempts = {
                tier: Attempt(
                    tier,
                    tier == frontier,
                    completion=None if outcome.error is not None else outcome.completion,
                    error=outcome.error,
                )
                for tier, outcome in row.outcomes.items()
            }
            # of what is in the store already, only what was said of it is new
            served = (attempts.pop(frontier),) if frontier in attempts else ()
            name = identity(row.query.id, line)
            recorded = Recorded(
                name,
                when(row.timestamp, line.source),
                Trace(row.query, row.query.task, served, "imported"),
                "imported",
                row.group,
                # a row that does not say so was labelled like all
                1.0 if row.propensity is None else row.propensity,
                drawn=True,
            )
        except DataError as error:
            bad(error)
            continue
        signals = tuple(
            Signal(name, "audit", outcome.quality, "imported", recorded.at, tier=tier)
            for tier, outcome in row.outcomes.items()
            if outcome.quality is not None
        )
        yield Found(recorded, tuple(attempts.values()), signals, line.source)
