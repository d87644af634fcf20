"""Files that are whole or not there, and names for them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ReleaseError

__all__ = ["file_name", "name_of", "new_folder", "read_json", "write_json", "write_whole"]


def write_whole(path: Path, text: str) -> Path:
    """Write a text in one step; lone surrogates, which cannot be written, become question marks."""
    scratch = path.with_name(f".{path.name}.new")
    with scratch.open("wb") as file:
        file.write(text.encode("utf-8", "replace"))
        file.flush()
        # else the name might survive a failure of the machine, and the content not
        os.fsync(file.fileno())
    return scratch.replace(path)


def write_json(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write a JSON object in one step."""
    return write_whole(path, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, *needed: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        needed: keys that it must have.

    Raises:
        ReleaseError: the file is missing, or holds something else.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReleaseError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ReleaseError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(facts, dict):
        raise ReleaseError(f"{path}: expected a JSON object, got {type(facts).__name__}")
    missing = [name for name in needed if name not in facts]
    if missing:
        raise ReleaseError(f"{path}: truncated or edited ({', '.join(missing)} is missing)")
    return facts


def new_folder(path: Path, mark: str) -> Path:
    """Make a folder, unless what is complete in it, by this file, would be overwritten.

    Raises:
        ReleaseError: it is.
    """
    if (path / mark).exists():
        raise ReleaseError(f"{path}: exists already and is not overwritten; choose a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def file_name(tier: str) -> str:
    """A name that every file system has for a tier, another one for each.

    >>> file_name("openai/gpt-4o")
    'openai%002fgpt-4o'
    """
    return "".join(c if (c.isascii() and c.isalnum()) or c in "-._" else f"%{ord(c):04x}" for c in tier)


def name_of(file: str) -> str:
    """The tier of such a name."""
    head, *rest = file.split("%")
    return head + "".join(chr(int(part[:4], 16)) + part[4:] for part in rest)
