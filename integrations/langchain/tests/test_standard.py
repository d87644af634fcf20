"""The unit part of LangChain's standard tests."""

from __future__ import annotations

from typing import Any

from helpers import FRONTIER, SMALL, release
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langchain_tests.unit_tests import ChatModelUnitTests

from langchain_routenlp import RouterChatModel
from routenlp_plugins.policy import Rung


class TestRouterChatModel(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[RouterChatModel]:
        return RouterChatModel

    @property
    def chat_model_params(self) -> dict[str, Any]:
        models = {SMALL: FakeListChatModel(responses=["small"]), FRONTIER: FakeListChatModel(responses=["frontier"])}
        return {"tiers": models, "release": release(Rung(SMALL))}
