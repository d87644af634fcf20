"""Fixtures of the core's tests and of the adapters'."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

LONGEST = ("test_students.py", "test_distillation.py", "test_guarantees.py", "test_fitting.py", "test_loop_trouble.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first: of several processes none is left to end alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; tests that need it are skipped without."""
    folder = os.environ.get("ROUTENLP_DATA")
    if folder is None:
        pytest.skip("ROUTENLP_DATA is not set: no real data")
    return Path(folder)
