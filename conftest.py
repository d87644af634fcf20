"""Fixtures of the core's tests and of the adapters'."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data; tests that need it are skipped without."""
    folder = os.environ.get("ROUTENLP_DATA")
    if folder is None:
        pytest.skip("ROUTENLP_DATA is not set: no real data")
    return Path(folder)
