"""Trained things as one safetensors file: arrays, and the facts about them in its header."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ReleaseError

__all__ = ["packed", "read_arrays", "write_arrays"]


def write_arrays(path: str | Path, facts: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Write a new file; an existing one is never touched.

    Args:
        facts: with the name of the format under ``format``.

    Raises:
        ReleaseError: there is something at `path` already, or it cannot be written.
    """
    content = packed(facts, arrays)
    try:
        with Path(path).open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise ReleaseError(f"{path}: exists already and is not overwritten; choose a new file") from None
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be written ({error.strerror or error})") from None
    return Path(path)


def packed(facts: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The content of such a file."""
    from safetensors.numpy import save

    # safetensors writes memory as it lies, so columns first would be read back as rows
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=dict(facts) or None)


def read_arrays(path: str | Path, format_name: str) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Facts and arrays of a file that `write_arrays` wrote.

    Raises:
        ReleaseError: the file is missing, truncated, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("format") != format_name:
                raise ReleaseError(f"{path}: expected format {format_name!r}, got {facts.get('format')!r}")
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ReleaseError(f"{path}: not a readable file of format {format_name!r} ({error})") from None
