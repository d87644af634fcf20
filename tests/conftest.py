from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = os.environ.get("ROUTENLP_DATA")
    if folder is None:
        pytest.skip("ROUTENLP_DATA is not set: no real data")
    return Path(folder)
