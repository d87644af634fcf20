"""Releases and programs of tiers inside the JSON state of a DSPy program."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import dspy
from dspy.predict.parameter import Parameter

from routenlp_plugins import PortfolioError, Release, ReleaseError

__all__ = ["Routing", "release_from_state", "release_state"]


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


class Routed(Protocol):
    """What is saved: programs by tier, and what decides."""

    students: dict[str, dspy.Module]

    @property
    def release(self) -> Release:
        """What decides."""
        ...

    def take(self, release: Release, students: dict[str, dspy.Module]) -> None:
        """Take others over."""
        ...


class Routing(Parameter):  # type: ignore[misc]
    """Saves and loads a router over programs wherever it stands: DSPy asks parameters only, at any depth.

    Programs that tiers share are one state; nothing depends on the order of tiers.
    """

    def __init__(self, module: Routed) -> None:
        self._module = module

    def reset(self) -> None:
        """Nothing is learned here."""

    def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
        """Release, programs, and which tier runs which."""
        students = self._module.students
        distinct = list({id(one): one for one in students.values()}.values())
        places = {id(one): place for place, one in enumerate(distinct)}
        return {
            "release": release_state(self._module.release),
            "programs": [one.dump_state(json_mode=json_mode) for one in distinct],
            "of": {name: places[id(one)] for name, one in students.items()},
        }

    def load_state(self, state: Mapping[str, Any], *, allow_unsafe_lm_state: bool = False) -> None:
        """Take them over, all or nothing.

        Raises:
            ReleaseError: the release was edited.
            PortfolioError: tiers are missing or unknown.
        """
        students = self._module.students
        if set(state["of"]) != set(students):
            raise PortfolioError(
                f"the state has the tiers {', '.join(sorted(state['of']))}, the module {', '.join(sorted(students))}"
            )
        release = release_from_state(state["release"])
        programs = {}
        for name, place in state["of"].items():
            if place not in programs:
                programs[place] = students[name].deepcopy()
                programs[place].load_state(state["programs"][place], allow_unsafe_lm_state=allow_unsafe_lm_state)
        self._module.take(release, {name: programs[state["of"][name]] for name in students})
