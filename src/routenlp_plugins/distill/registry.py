"""Releases with their students, numbered; one of them serves. What serves is always whole.

FOLDER/versions/0001/release/           what `Release.save` writes
FOLDER/versions/0001/students/NAME/     what a student saves, one folder for each tier that can be taught
FOLDER/versions/0001/version.json       SHA-256 of every file, and where it came from
FOLDER/serving.json                     which version serves, and which did before: replaced in one step
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from filelock import FileLock

from ..errors import ReleaseError
from ..portfolio import Portfolio
from ..release import Release
from ..routing.encoders import Encoder
from .files import file_name, name_of, read_json, write_json
from .student import Student, known_kind, load_student

__all__ = ["ReleaseRegistry", "Version", "loaded"]

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Version:
    """One release with its students.

    Attributes:
        number: from 1 on.
        note: where it came from.
    """

    number: int
    folder: Path
    created: str
    note: str

    def release(self, *encoders: Encoder, portfolio: Portfolio | None = None) -> Release:
        """Its release, with that of these encoders that its router was trained with; see `Release.load`."""
        return loaded(self.folder / "release", *encoders, portfolio=portfolio)

    def students(self) -> dict[str, Student]:
        """Tier -> its student."""
        folders = sorted((self.folder / "students").glob("*"))
        return {name_of(folder.name): load_student(folder) for folder in folders}


@dataclass(frozen=True, slots=True)
class _Serving:
    """What `serving.json` says.

    Attributes:
        history: versions that served, the last one serves.
        changes: what was done, in words, with its time.
    """

    history: tuple[int, ...] = ()
    changes: tuple[Mapping[str, Any], ...] = field(default=())


class ReleaseRegistry:
    """The versions of a folder; several processes may look, one at a time changes.

    Args:
        folder: is made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def versions(self) -> tuple[Version, ...]:
        """All that are there, in order."""
        return tuple(self.version(number) for number in self._numbers())

    def version(self, number: int) -> Version:
        """One of them, every byte checked.

        Raises:
            ReleaseError: there is none, or a file is missing, truncated or edited.
        """
        folder = self.folder / "versions" / f"{number:04}"
        if not folder.is_dir():
            there = ", ".join(str(number) for number in self._numbers()) or "none"
            raise ReleaseError(f"{self.folder}: there is no version {number}; versions: {there}")
        facts = read_json(folder / "version.json", "format_version", "sha256", "created", "note")
        if facts.get("format_version") != FORMAT_VERSION:
            raise ReleaseError(
                f"{folder / 'version.json'}: format_version: expected {FORMAT_VERSION}, got "
                f"{facts.get('format_version')!r}; if it is newer, upgrade routenlp-plugins"
            )
        found = _digests(folder)
        # what lies there beside it is read by nobody
        wrong = sorted(name for name, digest in facts["sha256"].items() if found.get(name) != digest)
        if wrong:
            raise ReleaseError(
                f"{folder / wrong[0]}: missing, truncated or edited (its SHA-256 is not that of version.json)"
            )
        return Version(number, folder, str(facts["created"]), str(facts["note"]))

    @property
    def serving(self) -> Version | None:
        """The version that serves; None before the first was promoted."""
        history = self._read().history
        return self.version(history[-1]) if history else None

    @property
    def changes(self) -> tuple[Mapping[str, Any], ...]:
        """What was promoted and rolled back: ``{"at", "what", "version"}``, in order."""
        return self._read().changes

    def add(self, release: Release, students: Mapping[str, Student], note: str) -> Version:
        """Keep a release with its students as a new version, in one step; it does not serve yet."""
        root = self.folder / "versions"
        root.mkdir(parents=True, exist_ok=True)
        with self._locked():
            # what an interruption left behind
            for left in root.glob(".new-*"):
                shutil.rmtree(left)
            number = max(self._numbers(), default=0) + 1
            scratch = Path(mkdtemp(dir=root, prefix=".new-"))
            release.save(scratch / "release")
            for tier, student in students.items():
                known_kind(student.save(scratch / "students" / file_name(tier)))
            facts = {
                "format_version": FORMAT_VERSION,
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "note": note,
                "sha256": _digests(scratch),
            }
            write_json(scratch / "version.json", facts)
            for path in scratch.rglob("*"):
                if path.is_file():
                    _sync(path)
            scratch.chmod(0o755)
            scratch.rename(root / f"{number:04}")
            _sync(root)
        return self.version(number)

    def promote(self, number: int, *, instead_of: int | None = None) -> Version | None:
        """Let a version serve. What loads the registry from now on gets it.

        Args:
            instead_of: only if this one serves, and `number` never did; None whatever serves.

        Returns:
            It; None if another one serves than `instead_of`, and goes on.

        Raises:
            ReleaseError: there is none of that number, or it is not whole.
        """
        version = self.version(number)
        with self._locked():
            before = self._read()
            if before.history[-1:] == (number,):
                return version
            served = any(change["version"] == number for change in before.changes)
            if instead_of is not None and (served or before.history[-1:] != (instead_of,)):
                return None
            self._change(before, (*before.history, number), "promoted", number)
        return version

    def rollback(self) -> Version:
        """Let the version serve that did before.

        Raises:
            ReleaseError: there was none, or it is not whole.
        """
        with self._locked():
            before = self._read()
            if len(before.history) < 2:
                now = (
                    f"nothing served before version {before.history[0]}" if before.history else "no version serves yet"
                )
                raise ReleaseError(f"{self.folder}: {now}; there is nothing to return to")
            version = self.version(before.history[-2])
            self._change(before, before.history[:-1], "rolled back to", version.number)
        return version

    def _numbers(self) -> list[int]:
        return sorted(int(p.name) for p in (self.folder / "versions").glob("[0-9]*") if p.name.isdecimal())

    def _change(self, before: _Serving, history: tuple[int, ...], what: str, number: int) -> None:
        change = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "version": number}
        facts = {"format_version": FORMAT_VERSION, "history": history, "changes": [*before.changes, change]}
        write_json(self.folder / "serving.json", facts)
        _sync(self.folder)

    def _read(self) -> _Serving:
        file = self.folder / "serving.json"
        if not file.exists():
            return _Serving()
        facts = read_json(file, "format_version", "history", "changes")
        if facts.get("format_version") != FORMAT_VERSION:
            raise ReleaseError(
                f"{file}: format_version: expected {FORMAT_VERSION}, got {facts.get('format_version')!r}"
            )
        return _Serving(tuple(facts["history"]), tuple(facts["changes"]))

    def _locked(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock")


def loaded(folder: Path, *encoders: Encoder, portfolio: Portfolio | None = None) -> Release:
    """A release, with that of these encoders that its router was trained with."""
    release = Release.load(folder, portfolio)
    name = None if release.router is None else release.router.encoder.name
    encoder = next((one for one in encoders if one.name == name), None)
    return release if encoder is None else Release.load(folder, portfolio, encoder)


def _digests(folder: Path) -> dict[str, str]:
    """Of all files but `version.json`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "version.json")
    return {str(p.relative_to(folder)): _digest(p) for p in files}


def _digest(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """So that it survives the machine going down."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
