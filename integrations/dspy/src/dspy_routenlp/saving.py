"""A release inside the JSON state of a DSPy program."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from routenlp_plugins import Release, ReleaseError

__all__ = ["release_from_state", "release_state"]


def release_state(release: Release) -> dict[str, str]:
    """The files of its folder: name -> content in base64."""
    with TemporaryDirectory() as scratch:
        folder = release.save(Path(scratch) / "release")
        return {file.name: b64encode(file.read_bytes()).decode("ascii") for file in sorted(folder.iterdir())}


def release_from_state(state: Mapping[str, str]) -> Release:
    """The release of such files, checked as any folder is.

    Raises:
        ReleaseError: they are not those of a release, or were edited.
    """
    with TemporaryDirectory() as scratch:
        for name, content in state.items():
            if Path(name).name != name:
                raise ReleaseError(f"{name!r} is no file of a release")
            (Path(scratch) / name).write_bytes(b64decode(content))
        return Release.load(scratch)
