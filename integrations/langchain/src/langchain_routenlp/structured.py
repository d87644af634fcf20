"""Structured output: each tier asks for it in its own way, and an answer that does not parse is not valid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import PydanticOutputParser
from langchain_core.runnables import (
    Runnable,
    RunnableBinding,
    RunnableConfig,
    RunnableLambda,
    RunnablePassthrough,
    RunnableSequence,
)
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_function

from routenlp_plugins import PortfolioError, TierError

__all__ = ["Form", "Structured", "parsed"]


@dataclass(frozen=True, slots=True)
class Form:
    """How one tier is asked, and how its answer is read.

    Attributes:
        options: of its call.
        parser: from its message to the result.
        unable: why it cannot be asked; None if it can.
    """

    options: Mapping[str, Any]
    parser: Runnable[Any, Any] | None
    unable: str | None = None

    def valid(self, message: BaseMessage) -> bool:
        """Whether an answer parses."""
        if self.parser is None:
            return False
        # as values, since what a parser may raise is not known; without a run, since the answer may be rejected
        (found,) = self.parser.batch([message], {"callbacks": []}, return_exceptions=True)
        return found is not None and not isinstance(found, Exception)


@dataclass(frozen=True, slots=True)
class Structured:
    """What `with_structured_output` was asked for.

    Attributes:
        forms: tier -> its form.
        schema: as JSON, which is part of the prompt.
    """

    forms: Mapping[str, Form]
    schema: str

    @classmethod
    def of(
        cls, models: Mapping[str, BaseChatModel | None], frontier: str, schema: Any, options: Mapping[str, Any]
    ) -> Structured:
        """In the way of each model.

        Raises:
            PortfolioError: the frontier is no LangChain model, or builds it in a way that cannot be taken apart.
        """
        if models[frontier] is None:
            raise PortfolioError(f"tier {frontier!r} is a plain callable: structured output needs a chat model for it")
        nothing = Form({}, None, "no structured output: not a chat model")
        forms = {
            name: nothing if model is None else _form(model, schema, options, needed=name == frontier)
            for name, model in models.items()
        }
        return cls(forms, json.dumps([convert_to_json_schema(schema), options], default=str, sort_keys=True))

    def form(self, tier: str) -> Form:
        """That of a tier.

        Raises:
            TierError: it cannot be asked.
        """
        form = self.forms[tier]
        if form.unable is not None:
            raise TierError(form.unable, tier)
        return form


def _form(model: BaseChatModel, schema: Any, options: Mapping[str, Any], *, needed: bool) -> Form:
    """How a model asks for a schema by itself; if it is `needed`, what it raises is raised."""
    try:
        own = model.with_structured_output(schema, **options)
    except (NotImplementedError, ValueError, TypeError) as error:
        if needed:
            raise
        return Form({}, None, f"no structured output: {error}")
    first = own.first if isinstance(own, RunnableSequence) else None
    if isinstance(own, RunnableSequence) and isinstance(first, RunnableBinding) and first.bound is model:
        told = {name: value for name, value in first.kwargs.items() if not name.startswith("ls_")}
        parser = own.last if not own.middle else RunnableSequence(*own.middle, own.last)
        if isinstance(told.get("response_format"), type):
            # a client that is given a class reads the answer itself, and nobody hears what a wrong one cost
            return Form(
                {**told, "response_format": _plain_format(schema)}, PydanticOutputParser(pydantic_object=schema)
            )
        return Form(told, parser)
    why = f"structured output of {type(model).__name__} is not a bound model followed by a parser"
    if needed:
        raise PortfolioError(f"{why}: give the router a chat model that builds it so")
    return Form({}, None, why)


def _plain_format(schema: type) -> dict[str, Any]:
    """What an OpenAI client makes of a class."""
    function = convert_to_openai_function(schema, strict=True)
    described = {"description": function["description"]} if function.get("description") else {}
    named = {"name": function["name"], **described, "schema": function["parameters"], "strict": True}
    return {"type": "json_schema", "json_schema": named}


def parsed(model: Runnable[Any, Any], structured: Structured, *, include_raw: bool) -> Runnable[Any, Any]:
    """The routed model, followed by the parser of whichever tier answered."""

    def parser(message: BaseMessage) -> Runnable[Any, Any]:
        form = structured.form(message.response_metadata["routenlp"]["tier"])
        assert form.parser is not None, "it was asked"
        # a runnable that is returned is run on the input
        return form.parser

    parse: Runnable[Any, Any] = RunnableLambda(parser).with_config(run_name="parser")
    if not include_raw:
        return model | parse
    good = RunnablePassthrough.assign(parsed=(lambda both: both["raw"]) | parse, parsing_error=lambda _: None)
    nothing = RunnablePassthrough.assign(parsed=lambda _: None)
    either = good.with_fallbacks([nothing], exception_key="parsing_error")

    # in one piece: of a stream whose first piece came there is no fallback
    def read(both: dict[str, Any], config: RunnableConfig) -> Any:
        return either.invoke(both, config)

    async def aread(both: dict[str, Any], config: RunnableConfig) -> Any:
        return await either.ainvoke(both, config)

    return {"raw": model} | RunnableLambda(read, aread)
