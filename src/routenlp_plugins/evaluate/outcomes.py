"""The outcome format: JSON lines, one query a line, what each tier answered and how good that was.

Missing fields are missing evidence and stay None. A malformed line is an error that names file, line and field.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import DataError
from ..types import Completion, Query

__all__ = [
    "Outcome",
    "OutcomeRow",
    "Outcomes",
    "Paths",
    "check_row",
    "check_spelling",
    "first_problem",
    "outcome_line",
    "outcome_rows",
    "parse_outcome_line",
    "read_lines",
    "read_outcomes",
]

Paths = str | Path | Iterable[str | Path]
UnitInterval = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
LogProbability = Annotated[float, Field(le=0)]
Count = Annotated[int, Field(ge=0, le=10**15)]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one tier did on one query.

    Attributes:
        quality: in [0, 1]; None is unknown and counts as the worst case where a policy needs it.
        error: why the tier gave no answer.
    """

    quality: float | None
    completion: Completion
    error: str | None = None


@dataclass(frozen=True, slots=True)
class OutcomeRow:
    """One query with the outcomes of the tiers.

    Attributes:
        group: rows that belong together (a dialogue, a contract) and are split and bounded together.
        propensity: probability with which this row was selected for labelling; None if all were.
        policy: fingerprint of the certified policy that an audit was made for.
        asked: the words that the tiers were asked with, where a chain around them made others of the query's.
        source: ``file:line`` it was read from.
        whole_groups: whether groups were selected whole, so that `propensity` is that of the group.
    """

    query: Query
    outcomes: Mapping[str, Outcome]
    reference: str | None = None
    group: str | None = None
    timestamp: str | float | None = None
    propensity: float | None = None
    policy: str | None = None
    asked: str | None = None
    source: str = ""
    whole_groups: bool = False

    @property
    def seen(self) -> Query:
        """The query as a router in the place of the tiers sees it."""
        return self.query if self.asked is None else replace(self.query, text=self.asked)

    @property
    def unit(self) -> str:
        """What is drawn from the population: the group, or the query itself."""
        return f"group:{self.group}" if self.group is not None else f"query:{self.query.id}"


Outcomes = Paths | Sequence[OutcomeRow]
"""Paths of outcome files, or rows already read."""


class _Outcome(BaseModel):
    # a misspelt field would be missing evidence
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")

    quality: UnitInterval | None
    answer: str | None = None
    said: str | None = None
    mean_logprob: LogProbability | None = None
    token_logprobs: list[LogProbability] | None = None
    confidence: UnitInterval | None = None
    scores: dict[str, UnitInterval] | None = None
    model: str | None = None
    prompt: str | None = None
    input_tokens: Count | None = None
    cached_tokens: Count | None = None
    output_tokens: Count | None = None
    cost_usd: NonNegative | None = None
    latency_ms: NonNegative | None = None
    error: str | None = None


class _Row(BaseModel):
    # other fields are the user's own; one that looks like ours is not
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    query_id: Annotated[str, Field(min_length=1)]
    task: Annotated[str, Field(min_length=1)]
    outcomes: Annotated[dict[str, _Outcome], Field(min_length=1)]
    text: str | None = None
    reference: str | None = None
    group: str | None = None
    timestamp: str | float | None = None
    propensity: Annotated[float, Field(gt=0, le=1)] | None = None
    policy: str | None = None
    asked: str | None = None


def read_outcomes(
    paths: Paths, *, skip_bad_lines: bool = False, skipped: list[DataError] | None = None
) -> list[OutcomeRow]:
    """Read outcome files (``.jsonl`` or ``.jsonl.gz``), in order.

    Args:
        skip_bad_lines: leave malformed lines out instead of raising; each goes into `skipped`.
        skipped: collects the errors of the lines left out.

    Raises:
        DataError: a file cannot be read, a line is malformed, a query id occurs twice, or there is no row at all.
    """
    rows: list[OutcomeRow] = []
    seen: dict[str, str] = {}
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    for path in files:
        for number, line in read_lines(path):
            try:
                row = parse_outcome_line(line, f"{path}:{number}")
                first = seen.get(row.query.id or "")
                if first is not None:
                    raise DataError(f"{row.source}: query_id: {row.query.id!r} occurs already at {first}")
                seen[row.query.id or ""] = row.source
            except DataError as error:
                if not skip_bad_lines:
                    raise
                if skipped is not None:
                    skipped.append(error)
                continue
            rows.append(row)
    if not rows:
        raise DataError(f"{', '.join(map(str, files)) or 'no file'}: no outcomes found")
    return rows


def outcome_rows(outcomes: Outcomes) -> list[OutcomeRow]:
    """The rows of these files, or these rows, none of them twice."""
    if isinstance(outcomes, str | Path):
        return read_outcomes(outcomes)
    if not isinstance(outcomes, Iterable):
        raise DataError(f"outcomes: expected paths or rows, got {outcomes!r}")
    items = list(cast("Iterable[str | Path | OutcomeRow]", outcomes))
    rows = [item for item in items if isinstance(item, OutcomeRow)]
    if not items:
        raise DataError("outcomes: empty; there is nothing to calibrate on")
    if not rows:
        return read_outcomes([item for item in items if not isinstance(item, OutcomeRow)])
    if len(rows) < len(items):
        raise DataError("outcomes: give paths or rows, not both")
    repeated = [name for name, count in Counter(row.query.id for row in rows).items() if count > 1]
    if repeated:
        raise DataError(f"query_id: {repeated[0]!r} occurs more than once")
    for row in rows:
        check_row(row)
    return rows


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, plain or gzip.

    Raises:
        DataError: the file cannot be read, is truncated or is not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{number + 1}: truncated or damaged gzip file ({error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}:{number + 1}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def outcome_line(row: OutcomeRow) -> str:
    """The JSON line of a row, without newline; `read_outcomes` reads it back."""
    facts: dict[str, Any] = {
        "query_id": row.query.id,
        "task": row.query.task,
        "text": row.query.text,
        "reference": row.reference,
    }
    own = ("group", "timestamp", "propensity", "policy", "asked")
    facts |= {name: value for name in own if (value := getattr(row, name)) is not None}
    facts["outcomes"] = {tier: _outcome_facts(outcome) for tier, outcome in row.outcomes.items()}
    # a lone surrogate cannot be written
    return json.dumps(facts, ensure_ascii=False).encode("utf-8", "replace").decode()


def check_row(row: OutcomeRow) -> None:
    """Hold a row that was made in memory to what a line of a file is held to.

    Raises:
        DataError: names the row and the field.
    """
    facts: dict[str, Any] = {"query_id": row.query.id, "task": row.query.task, "propensity": row.propensity}
    facts["outcomes"] = {
        tier: {"quality": outcome.quality, **{name: getattr(outcome.completion, name) for name in _NUMBERS}}
        for tier, outcome in row.outcomes.items()
    }
    try:
        _Row.model_validate(facts)
    except ValidationError as error:
        got = _short(error.errors(include_url=False)[0]["input"])
        raise DataError(f"{row.source or row.query.id}: {first_problem(error)}, got {got}") from None


_NUMBERS = (
    *("confidence", "mean_logprob", "input_tokens", "cached_tokens", "output_tokens", "cost_usd", "latency_ms"),
)


def _outcome_facts(outcome: Outcome) -> dict[str, Any]:
    completion = outcome.completion
    facts: dict[str, Any] = {
        "quality": outcome.quality,
        "answer": None if outcome.error else completion.text,
        "mean_logprob": completion.mean_logprob,
        "confidence": completion.confidence,
        "input_tokens": completion.input_tokens,
        "output_tokens": completion.output_tokens,
        "cost_usd": completion.cost_usd,
        "latency_ms": completion.latency_ms,
    }
    if completion.token_logprobs is not None:
        facts["token_logprobs"] = list(completion.token_logprobs)
    if completion.scores:
        facts["scores"] = dict(completion.scores)
    told = ("said", "model", "prompt", "cached_tokens")
    facts |= {name: value for name in told if (value := getattr(completion, name)) is not None}
    if outcome.error is not None:
        facts["error"] = outcome.error
    return facts


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def check_spelling(row: BaseModel, source: str) -> None:
    """Refuse a field that is none of a line's but looks like one: it would be missing without a word.

    Raises:
        DataError: names the place, the field and what it looks like.
    """
    for name in row.model_extra or ():
        like = _looks_like(name, tuple(type(row).model_fields))
        if like is not None:
            raise DataError(f"{source}: {name}: unknown field; did you mean {like}?")


@lru_cache(1000)
def _looks_like(name: str, known: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(name.lower(), known, n=1, cutoff=0.75)), None)


def first_problem(error: ValidationError) -> str:
    """The first field that is wrong and what is wrong with it, in a line."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'line'}: {first['msg']}"


def parse_outcome_line(line: str, source: str) -> OutcomeRow:
    """The row of one JSON line; `source` names its place in errors.

    Raises:
        DataError: names place and field.
    """
    if not line.strip():
        raise DataError(f"{source}: empty line")
    try:
        row = _Row.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "json_invalid":
            raise DataError(f"{source}: not a complete JSON object ({first['ctx']['error']})") from None
        raise DataError(f"{source}: {first_problem(error)}, got {_short(first['input'])}") from None
    check_spelling(row, source)
    return OutcomeRow(
        query=Query(row.text or "", task=row.task, id=row.query_id),
        outcomes={tier: _outcome(facts) for tier, facts in row.outcomes.items()},
        reference=row.reference,
        group=row.group,
        timestamp=row.timestamp,
        propensity=row.propensity,
        policy=row.policy,
        asked=row.asked,
        source=source,
    )


def _outcome(facts: _Outcome) -> Outcome:
    completion = Completion(
        text=facts.answer or "",
        said=facts.said,
        confidence=facts.confidence,
        mean_logprob=facts.mean_logprob,
        token_logprobs=None if facts.token_logprobs is None else tuple(facts.token_logprobs),
        scores=facts.scores or {},
        model=facts.model,
        prompt=facts.prompt,
        input_tokens=facts.input_tokens,
        cached_tokens=facts.cached_tokens,
        output_tokens=facts.output_tokens,
        cost_usd=facts.cost_usd,
        latency_ms=facts.latency_ms,
    )
    return Outcome(facts.quality, completion, facts.error)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
