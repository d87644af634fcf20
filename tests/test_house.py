"""The rules of the house, each of them a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

import routenlp_plugins

CORE = ROOT / "src" / "routenlp_plugins"
ADAPTERS = {
    "dspy_routenlp": ROOT / "integrations" / "dspy" / "src" / "dspy_routenlp",
    "langchain_routenlp": ROOT / "integrations" / "langchain" / "src" / "langchain_routenlp",
    "llama_index.llms.routenlp": ROOT / "integrations" / "llama_index" / "src" / "llama_index" / "llms" / "routenlp",
}
MODULES = sorted([*CORE.rglob("*.py"), *(m for folder in ADAPTERS.values() for m in folder.rglob("*.py"))])
FRAMEWORKS = ("langchain", "llama_index", "dspy")


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module)
    return found


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_imports_run_in_one_direction():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 5 kept, 0 broken" in done.stdout


def test_importing_the_package_is_cheap():
    loaded = python(
        "import sys; before = set(sys.modules); import routenlp_plugins; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    heavy = {
        "numpy",
        "scipy",
        "sklearn",
        "pydantic",
        "torch",
        "transformers",
        "matplotlib",
        "openai",
        "rich",
        "xllamacpp",
    }
    assert "routenlp_plugins" in loaded
    assert not [m for m in loaded if m in heavy or m.startswith(FRAMEWORKS)]


def test_importing_the_package_takes_at_most_150_ms():
    measure = (
        "import time; start = time.perf_counter(); import routenlp_plugins; print((time.perf_counter() - start) * 1e3)"
    )
    times = sorted(float(python(measure)) for _ in range(5))
    assert times[2] <= 150


def test_every_public_name_is_loaded_and_documented():
    for name in routenlp_plugins.__all__:
        assert getattr(routenlp_plugins, name).__doc__, name
    assert set(routenlp_plugins.__all__) <= set(dir(routenlp_plugins))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        routenlp_plugins.Nothing  # noqa: B018


def test_the_public_list_is_the_one_that_type_checkers_see():
    tree = ast.parse((CORE / "__init__.py").read_text())
    typed = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    assert typed == set(routenlp_plugins.__all__)


@pytest.mark.parametrize("path", MODULES, ids=names)
def test_a_module_keeps_the_rules(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= 400, "a module is one idea"
    assert not imports(tree) & {"pickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len(parameters) - 1 <= 6, "a constructor takes at most six parameters"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"filterwarnings", "simplefilter", "basicConfig"}, "the user's own settings stay"


def test_errors_of_any_kind_are_caught_at_one_place_only():
    broad = [
        names(path)
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or (isinstance(node.type, ast.Name) and node.type.id in {"Exception", "BaseException"}))
    ]
    assert broad == ["src/routenlp_plugins/tiers/boundary.py"]


def test_adapters_import_public_names_only():
    for folder in ADAPTERS.values():
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("routenlp_plugins"):
                    assert node.module == "routenlp_plugins", names(path)
                    assert {alias.name for alias in node.names} <= set(routenlp_plugins.__all__), names(path)


def test_nothing_happens_at_import():
    python(
        "import socket, logging\n"
        "def refuse(*a, **k): raise AssertionError('network at import')\n"
        "socket.socket.connect = refuse\n"
        "handlers = list(logging.getLogger().handlers)\n"
        "import pkgutil, importlib, routenlp_plugins as package\n"
        "names = [m.name for m in pkgutil.walk_packages(package.__path__, 'routenlp_plugins.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "assert logging.getLogger().handlers == handlers\n"
    )


def test_no_file_names_a_place_of_one_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    marks = ("/" + "root/", "/" + "home/", "/" + "work/", "/" + "tmp/")
    texts = {f: (ROOT / f).read_text(encoding="utf-8", errors="ignore") for f in files if (ROOT / f).is_file()}
    assert [f for f, text in texts.items() if any(mark in text for mark in marks)] == []
