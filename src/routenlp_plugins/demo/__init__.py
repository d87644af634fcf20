"""The demo: a chain that exists without us, one day on its own model, the next day routed.

The story is the core's; the chain comes from an adapter, which registers a `DemoChain` as an entry point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import MissingExtraError, ReleaseError
from ..release import Release
from ..tiers.boundary import TierCallable
from ..types import Query

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DemoChain", "DemoOptions", "run_demo"]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What the command line passes on.

    Attributes:
        out: folder for outcomes and release.
        report: the HTML file.
        frontier_model: name of the frontier at ``OPENAI_BASE_URL``, where that and a key are set.
        frontier_usd_per_mtok: USD per million input and output tokens of the frontier.
    """

    out: Path
    report: Path
    seed: int = 0
    frontier_model: str = "gpt-4o"
    frontier_usd_per_mtok: tuple[float, float] = (2.5, 10.0)


class DemoChain(Protocol):
    """What an adapter brings: a chain of its framework whose model is an OpenAI-compatible endpoint.

    Attributes:
        code: the chain, and the line that swaps the router in, as a user would write them; ``{out}`` stands for the
            folder of the release.
    """

    code: tuple[str, str]

    def __init__(self, base_url: str, api_key: str, model: str, instructions: Mapping[str, str]) -> None:
        """Build the chain; `instructions` are the system prompts by task."""

    def on_each_tier(self, tiers: Mapping[str, Any]) -> Mapping[str, TierCallable]:
        """The chain once on each tier; None stands for its own model."""

    def swap_in(self, tiers: Mapping[str, Any], release: Release) -> None:
        """Put the router in the place of the chain's model."""

    def ask(self, query: Query) -> tuple[str, Mapping[str, Any]]:
        """The routed chain's answer, and the decision as `Trace.as_dict` gives it."""


def run_demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo with the chain of an installed adapter, and return the numbers of the report in JSON types.

    Raises:
        MissingExtraError: no adapter with a demo is installed.
        ReleaseError: the folder or the report is there already.
    """
    from .story import tell

    found = list(entry_points(group="routenlp_plugins.demo"))
    if not found:
        raise MissingExtraError("the demo needs an adapter: pip install langchain-routenlp langchain-openai")
    for path in (options.out, options.report):
        if path.exists():
            raise ReleaseError(f"{path}: exists already and is not overwritten; remove it or choose another")
    return tell(options, found[0].load(), console).as_dict()
