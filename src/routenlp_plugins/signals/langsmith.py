"""Run exports of LangSmith: JSON lines of runs, and of feedback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..conversation import user_words
from ..errors import DataError
from ..tiers.openai_format import alternative_scores, text_completion
from ..types import Completion, Query
from .records import Found, ImportOptions, Line, imported, seconds, text_of, when
from .rows import Recorded
from .signal import KINDS, Signal

__all__ = ["langsmith"]

_ROLES = {"human": "user", "ai": "assistant", "developer": "system"}
_UNITS = ("routenlp_unit", "thread_id", "session_id", "conversation_id")


def langsmith(lines: Iterator[Line], options: ImportOptions, bad: Callable[[DataError], None]) -> Iterator[Found]:
    """A trace for each call of a model; of other runs what the traces below them may be called by, and feedback."""
    parents: dict[str, str | None] = {}
    calls: list[Line] = []
    for line in lines:
        try:
            facts = line.facts
            if "run_type" not in facts and "key" in facts:
                yield Found(signals=_feedback(facts, line.source))
                continue
            if not isinstance(facts.get("id"), str) or not isinstance(facts.get("run_type"), str):
                raise DataError(f"{line.source}: neither a run (id, run_type) nor feedback (run_id, key, score)")
            above = facts.get("parent_run_id")
            parents[facts["id"]] = above if isinstance(above, str) else None
            if facts["run_type"] == "llm":
                calls.append(line)
            yield Found(signals=_statistics(facts, line.source))
        except DataError as error:
            bad(error)
    # what is around a call may stand behind it
    for line in calls:
        try:
            recorded = _call(line, options, parents)
        except DataError as error:
            bad(error)
        else:
            yield Found(recorded)


def _call(line: Line, options: ImportOptions, parents: Mapping[str, str | None]) -> Recorded:
    facts, source = line.facts, line.source
    extra = facts.get("extra")
    told = extra.get("metadata") if isinstance(extra, Mapping) else None
    metadata: Mapping[str, Any] = told if isinstance(told, Mapping) else {}
    chat = _chat(facts.get("inputs"), source)
    answer = _answer(facts)
    begun, ended = seconds(facts.get("start_time"), source), seconds(facts.get("end_time"), source)
    if isinstance(answer, Completion):
        latency = (ended - begun) * 1e3 if begun is not None and ended is not None and ended >= begun else None
        cost = facts.get("total_cost")
        try:
            known_cost = float(cost) if isinstance(cost, int | float | str) and cost else None
        except ValueError:
            raise DataError(f"{source}: total_cost: expected a number, got {cost!r}") from None
        answer = replace(answer, latency_ms=latency, cost_usd=known_cost)
    named = metadata.get("ls_model_name")
    task = metadata.get("routenlp_task") or options.task
    name = str(facts["id"])
    known: dict[str, int | None] = {}
    above = facts.get("parent_run_id")
    while isinstance(above, str) and above not in known:
        known[above] = None
        above = parents.get(above)
    root = facts.get("trace_id")
    if isinstance(root, str) and root != name:
        known[root] = None
    unit = next((str(metadata[one]) for one in _UNITS if metadata.get(one)), root if isinstance(root, str) else None)
    query = Query(user_words(chat), str(task), None, chat, _beyond(extra))
    asked = named if isinstance(named, str) else None
    return imported(line, options, query, answer, asked, id=name, at=when(begun, source), unit=unit, runs=known)


def _chat(inputs: Any, source: str) -> tuple[dict[str, str], ...]:
    """The messages of a call, as LangChain serialises them or as OpenAI's client sends them; or its prompt."""
    given = inputs.get("messages") if isinstance(inputs, Mapping) else None
    if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
        given = given[0]
    if isinstance(given, list) and given and all(isinstance(one, Mapping) for one in given):
        return tuple(_message(one) for one in given)
    prompts = inputs.get("prompts", inputs.get("prompt")) if isinstance(inputs, Mapping) else None
    prompt = prompts[0] if isinstance(prompts, list) and prompts else prompts
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    raise DataError(f"{source}: inputs: expected messages or a prompt, got {inputs!r:.60}")


def _message(one: Mapping[str, Any]) -> dict[str, str]:
    kwargs = one.get("kwargs")
    facts: Mapping[str, Any] = kwargs if isinstance(kwargs, Mapping) else one
    own = str(facts.get("role") or facts.get("type") or "user")
    return {"role": _ROLES.get(own, own), "content": text_of(facts.get("content"))}


def _answer(facts: Mapping[str, Any]) -> Completion | str:
    """The answer, or why there is none."""
    if facts.get("error"):
        return str(facts["error"])
    outputs = facts.get("outputs")
    if not isinstance(outputs, Mapping):
        return "no answer"
    if isinstance(outputs.get("choices"), list):
        try:
            return text_completion(outputs)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            return f"no answer: {error}"
    generations: Any = outputs.get("generations")
    while isinstance(generations, list) and generations:
        generations = generations[0]
    if not isinstance(generations, Mapping):
        return "no answer"
    message = generations.get("message")
    kwargs = message.get("kwargs", message) if isinstance(message, Mapping) else {}
    kwargs = kwargs if isinstance(kwargs, Mapping) else {}
    metadata = kwargs.get("response_metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    usage = kwargs.get("usage_metadata")
    usage = usage if isinstance(usage, Mapping) else {}
    details = usage.get("input_token_details")
    tokens = _tokens(metadata.get("logprobs"))
    logprobs = tuple(min(float(token["logprob"]), 0.0) for token in tokens)
    model = metadata.get("model_name") or metadata.get("model")
    return Completion(
        text_of(kwargs.get("content", generations.get("text"))),
        mean_logprob=sum(logprobs) / len(logprobs) if logprobs else None,
        token_logprobs=logprobs or None,
        scores=alternative_scores(tokens) if tokens else {},
        model=model if isinstance(model, str) and model else None,
        input_tokens=_count(usage.get("input_tokens", facts.get("prompt_tokens"))),
        output_tokens=_count(usage.get("output_tokens", facts.get("completion_tokens"))),
        cached_tokens=_count(details.get("cache_read")) if isinstance(details, Mapping) else None,
    )


def _tokens(reported: Any) -> Sequence[Mapping[str, Any]]:
    """Whole or not at all: the log-probability of every token."""
    tokens = reported.get("content") if isinstance(reported, Mapping) else None
    if not isinstance(tokens, list):
        return ()
    whole = all(isinstance(token, Mapping) and isinstance(token.get("logprob"), int | float) for token in tokens)
    return tokens if whole else ()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _beyond(extra: Any) -> frozenset[str]:
    asked = extra.get("invocation_params") if isinstance(extra, Mapping) else None
    if not isinstance(asked, Mapping):
        return frozenset()
    names = {"tools": "tools", "functions": "tools", "response_format": "structured output"}
    return frozenset(names[name] for name in names if asked.get(name))


def _feedback(facts: Mapping[str, Any], source: str) -> tuple[Signal, ...]:
    score = facts.get("score")
    if score is None:
        # a comment alone is no evidence
        return ()
    run = facts.get("run_id") or facts.get("trace_id")
    told = facts.get("feedback_source")
    metadata = told.get("metadata") if isinstance(told, Mapping) else None
    who = metadata.get("__user") or metadata.get("user_id") if isinstance(metadata, Mapping) else None
    at = seconds(facts.get("created_at"), source)
    return (_signal(run, facts["key"], score, at, source, who or facts.get("created_by")),)


def _statistics(facts: Mapping[str, Any], source: str) -> tuple[Signal, ...]:
    """Of a run that was exported with the means of its feedback instead of the feedback itself."""
    found = facts.get("feedback_stats")
    if not isinstance(found, Mapping):
        return ()
    at = seconds(facts.get("end_time"), source)
    means = {key: of.get("avg") for key, of in found.items() if isinstance(of, Mapping)}
    return tuple(_signal(facts["id"], key, mean, at, source) for key, mean in means.items() if mean is not None)


def _signal(run: Any, key: Any, score: Any, at: float | None, source: str, who: Any = None) -> Signal:
    if not isinstance(score, int | float) or not 0 <= score <= 1:
        raise DataError(f"{source}: feedback {key!r}: score must be in [0, 1], got {score!r}; rescale it before")
    kind = str(key) if key in KINDS and key != "preference" else "other"
    try:
        # annotators have errors of their own
        named = f"langsmith:{key}:{who}" if isinstance(who, str) and who else f"langsmith:{key}"
        return Signal(str(run or ""), kind, float(score), named[:256], at)
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
