"""The chain of the demo: prompt, model and parser, as a LangChain user has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from routenlp_plugins import MissingExtraError, Query, Release

from .chains import ChainTier, Decisions, RouterRunnable, chain_tiers

__all__ = ["PromptModelParser"]


class PromptModelParser:
    """``prompt | model | parser`` with a ``ChatOpenAI`` model; see `routenlp_plugins.demo.DemoChain`."""

    code = (
        "chain = prompt | ChatOpenAI(model=...) | StrOutputParser()",
        'chain = RouterRunnable.from_chain(chain, tiers=local_tiers, release="{out}/release")',
    )

    def __init__(self, base_url: str, api_key: str, model: str, instructions: Mapping[str, str]) -> None:
        try:
            from langchain_openai import ChatOpenAI
        except ModuleNotFoundError as error:
            if error.name != "langchain_openai":
                raise
            raise MissingExtraError("langchain-openai is not installed: pip install langchain-openai") from None
        prompt = ChatPromptTemplate.from_messages([("system", "{instruction}"), ("human", "{text}")])
        chat = ChatOpenAI(model=model, base_url=base_url, api_key=lambda: api_key, temperature=0)
        self._instructions = instructions
        self._chain: Runnable[Any, Any] = prompt | chat | StrOutputParser()

    def on_each_tier(self, tiers: Mapping[str, Any]) -> dict[str, ChainTier]:
        """The chain once on each tier."""
        return chain_tiers(self._chain, tiers, to_input=self._input)

    def swap_in(self, tiers: Mapping[str, Any], release: Release) -> None:
        """Put the router in the place of the chain's model."""
        self._chain = RouterRunnable.from_chain(self._chain, tiers=tiers, release=release)

    def ask(self, query: Query) -> tuple[str, dict[str, Any]]:
        """The routed chain's answer, and the decision behind it."""
        decisions = Decisions()
        config = {"callbacks": [decisions], "metadata": {"routenlp_task": query.task}}
        text = self._chain.invoke(self._input(query), config)  # type: ignore[arg-type]
        return text, decisions.messages[-1].response_metadata["routenlp"]

    def _input(self, query: Query) -> dict[str, str]:
        return {"instruction": self._instructions[query.task or ""], "text": query.text}
