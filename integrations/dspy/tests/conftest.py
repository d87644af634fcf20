"""DSPy without its caches on disk, without the network, and with settings that no test leaves behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="dspy-")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import dspy
import pytest
from dspy_world import SAID

from routenlp_plugins.testing import ScriptedServer


@pytest.fixture
def small() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: "a small guess") as server:
        yield server


@pytest.fixture
def frontier() -> Iterator[ScriptedServer]:
    with ScriptedServer(lambda request: SAID) as server:
        yield server


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with dspy.context(trace=[], callbacks=[], lm=None):
        yield
