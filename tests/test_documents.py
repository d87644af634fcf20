"""Every Python snippet in the README, the documents and the docstrings is run."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["DSPY_CACHEDIR"] = tempfile.mkdtemp(prefix="dspy-")
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import pytest
from helpers import ROOT
from pytest_examples import CodeExample, find_examples

import routenlp_plugins
from routenlp_plugins import Completion
from routenlp_plugins.demo.workload import load_workload
from routenlp_plugins.testing import ScriptedServer

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "cookbook").glob("*.md"),
        *(ROOT / "integrations").glob("*/README.md"),
    ]
)
SNIPPETS = [snippet for snippet in find_examples(*DOCUMENTS) if snippet.prefix == "python"]
TITLED = re.compile(r'^```\w+ title="(?P<name>[^"]+)"\n(?P<content>.*?)^```', re.MULTILINE | re.DOTALL)
LOCALS: dict[str, dict[str, object]] = {}


FORMS = (
    (
        re.compile(r"\[\[ ## text ## \]\]\n(.*?)\n\nRespond", re.DOTALL),
        "[[ ## intent ## ]]\n{}\n\n[[ ## completed ## ]]\n",
    ),
    (re.compile(r"Query: (.*?)\nAnswer:", re.DOTALL), "{}"),
)
"""How DSPy and LlamaIndex ask, and how they want to be answered."""


def asked_in(content: str) -> tuple[str, str]:
    """The words of the user in what a framework made of them, and the form of the answer."""
    for pattern, form in FORMS:
        if found := pattern.findall(content):
            return found[-1], form
    return content, "{}"


@pytest.fixture(scope="module")
def endpoint(folder: Path) -> Iterator[ScriptedServer]:
    """Both models of the README: the dear one is always right, the cheap one is unsure where it is wrong."""
    lines = map(json.loads, (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines())
    references = {line["text"]: line["reference"] for line in lines}

    def reply(request: Mapping[str, Any]) -> Completion | Mapping[str, Any]:
        message = request["messages"][-1]
        if message["role"] == "tool":
            return Completion(f"Please {message['content']}.", mean_logprob=-0.02)
        text, form = asked_in(message["content"])
        # of tool calls there are no log-probabilities to tell: the cheap model is wrong more seldom there
        sure = request["model"] == "gpt-4o" or len(text) % (50 if request.get("tools") else 8)
        right = references.get(text, "card_arrival") if sure else "something_else"
        if request.get("tools"):
            name = request["tools"][0]["function"]["name"]
            called = {"name": name, "arguments": json.dumps({"intent": right})}
            return {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": called}]}
        return Completion(form.format(right), mean_logprob=-0.02 if sure else -1.0)

    with ScriptedServer(reply) as server, pytest.MonkeyPatch.context() as patch:
        for name in ("OPENAI_BASE_URL", "OPENAI_API_BASE"):
            patch.setenv(name, server.url)
        patch.setenv("OPENAI_API_KEY", "none")
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the files the documents show, and the queries a user would have."""
    place = tmp_path_factory.mktemp("snippets")
    for document in DOCUMENTS:
        for block in TITLED.finditer(document.read_text(encoding="utf-8")):
            (place / block["name"]).write_text(block["content"], encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, (place / "queries.jsonl").open("w", encoding="utf-8") as file:
        patch.delenv("ROUTENLP_DATA", raising=False)
        queries = {r.query.text: r for r in load_workload(0, (1, 1)).first_day if r.query.task == "cs_intent"}
        for i, (text, reference) in enumerate(queries.items()):
            line = {"query_id": str(i), "task": "intent", "text": text, "reference": reference.reference}
            file.write(json.dumps(line) + "\n")
    return place


@pytest.mark.parametrize("example", SNIPPETS, ids=str)
@pytest.mark.usefixtures("endpoint")
def test_a_snippet_runs(example: CodeExample, folder, monkeypatch):
    """Snippets of one document continue one another, in a folder of their own."""
    monkeypatch.chdir(folder)
    names = LOCALS.setdefault(str(example.path), {})
    exec(compile("\n" * example.start_line + example.source, example.path, "exec"), names)


def test_the_release_of_the_readme_is_certified_and_cheaper(folder):
    release = routenlp_plugins.Release.load(folder / "release")
    assert release.certificate.certified == ("intent",)
    assert routenlp_plugins.replay(folder / "outcomes.jsonl", release).cost_ratio < 0.5


def test_the_readme_has_snippets():
    assert len([snippet for snippet in SNIPPETS if snippet.path.name == "README.md"]) >= 5


def test_docstring_examples_run():
    modules = [m.name for m in pkgutil.walk_packages(routenlp_plugins.__path__, "routenlp_plugins.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 5
