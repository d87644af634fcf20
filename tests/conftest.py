"""What several files of tests begin with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import World

from routenlp_plugins import TraceStore


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world with a store, whose loop has not begun."""
    with TraceStore(tmp_path / "traffic.db") as store:
        yield World.begun(tmp_path, store)
