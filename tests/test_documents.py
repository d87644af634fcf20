"""Every Python snippet in the README, the documents and the docstrings is run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from conftest import ROOT
from pytest_examples import CodeExample, EvalExample, find_examples

import routenlp_plugins

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "integrations").glob("*/README.md")])
SNIPPETS = list(find_examples(*DOCUMENTS))
LOCALS: dict[str, dict[str, object]] = {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("snippets")


@pytest.mark.parametrize("example", [s for s in SNIPPETS if s.prefix == "python"], ids=str)
def test_a_snippet_runs(example: CodeExample, eval_example: EvalExample, folder, monkeypatch):
    """Snippets of one document continue one another, in a folder of their own."""
    monkeypatch.chdir(folder)
    names = LOCALS.setdefault(str(example.path), {})
    names.update(eval_example.run(example, module_globals=dict(names)))


def test_the_readme_has_snippets():
    assert any(s.path.name == "README.md" and s.prefix == "python" for s in SNIPPETS)


def test_docstring_examples_run():
    modules = [m.name for m in pkgutil.walk_packages(routenlp_plugins.__path__, "routenlp_plugins.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 0
