"""A Hugging Face encoder that is taught, end to end, which tiers are good enough for which texts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingExtraError
from .encoders import TransformerEncoder, readable
from .observations import Observations

if TYPE_CHECKING:
    import torch

__all__ = ["FineTuning", "fine_tuned"]

EMBEDDING = 16


@dataclass(frozen=True, slots=True)
class FineTuning:
    """What most trainings leave as it is.

    Attributes:
        epochs, batch: passes over the texts, and texts in a step.
        rate, head_rate: learning rates of the encoder, and of the task embedding and the head above it.
        warm_up: share of the steps over which they rise from 0; then they fall to it again.
        decay: of the weights.
    """

    epochs: int = 3
    batch: int = 32
    rate: float = 3e-5
    head_rate: float = 3e-3
    warm_up: float = 0.1
    decay: float = 0.01
    seed: int = 0


def fine_tuned(
    encoder: TransformerEncoder, observed: Observations, folder: str | Path, options: FineTuning | None = None
) -> TransformerEncoder:
    """Teach an encoder and save it; the original is not touched.

    The mean of its last layer and an embedding of the task go into a linear head with an output for each tier; what is
    minimised is the cross entropy with how good the answers were, of those that are known. The head is thrown away:
    routers are trained on the vectors.

    Vectors of texts that it was taught on know their outcomes. Fit releases on other queries than these.

    Args:
        folder: where it is saved, in the format of transformers; must not exist.

    Raises:
        DataError: the folder exists.
        MissingExtraError: torch or transformers is not installed.
    """
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise MissingExtraError("torch or transformers is not installed: pip install 'routenlp-plugins[train]'")
    import torch

    target = Path(folder)
    if target.exists():
        raise DataError(f"{target}: exists already and is not overwritten; choose a new folder")
    options = options or FineTuning()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        tokenizer, model = _Training(encoder, observed, options).run()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return TransformerEncoder(target, encoder.longest)


class _Training:
    def __init__(self, encoder: TransformerEncoder, observed: Observations, options: FineTuning) -> None:
        import torch
        from transformers import AutoModel, AutoTokenizer

        self.options = options
        self.longest = encoder.longest
        self.texts = [readable(text) for text in observed.texts]
        self.good = torch.as_tensor(observed.columns, dtype=torch.float32)
        self.weights = torch.as_tensor(observed.row_weights / observed.row_weights.mean(), dtype=torch.float32)
        place = {task: i for i, task in enumerate(observed.task_names)}
        self.tasks = torch.as_tensor([place[task] for task in observed.tasks])
        # copies of their own: what serves elsewhere stays as it is
        self.tokenizer = AutoTokenizer.from_pretrained(encoder.folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(encoder.folder, local_files_only=True)
        self.embedding = torch.nn.Embedding(len(place), EMBEDDING)
        self.head = torch.nn.Linear(self.model.config.hidden_size + EMBEDDING, self.good.shape[1])

    def run(self) -> tuple[Any, Any]:
        import torch

        options, rng = self.options, np.random.default_rng(self.options.seed)
        above = [*self.embedding.parameters(), *self.head.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": list(self.model.parameters()), "lr": options.rate},
            {"params": above, "lr": options.head_rate},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=options.decay)
        steps = options.epochs * -(-len(self.texts) // options.batch)
        warm = max(int(options.warm_up * steps), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(steps - warm, 1))
        )
        self.model.train()
        for _ in range(options.epochs):
            for rows in self._batches(rng):
                optimizer.zero_grad()
                self._loss(rows).backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
                optimizer.step()
                schedule.step()
        return self.tokenizer, self.model.eval()

    def _batches(self, rng: np.random.Generator) -> list[NDArray[np.intp]]:
        """Of texts of like length, in any order."""
        lengths = np.array([len(text) for text in self.texts])
        order = np.argsort(lengths + rng.random(len(lengths)) * lengths.mean(), kind="stable")
        batches = [order[start : start + self.options.batch] for start in range(0, len(order), self.options.batch)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _loss(self, rows: NDArray[np.intp]) -> torch.Tensor:
        import torch

        some = [self.texts[row] for row in rows]
        tokens = self.tokenizer(some, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        layer = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        mean = (layer * mask).sum(1) / mask.sum(1).clamp(min=1)
        odds = self.head(torch.cat([mean, self.embedding(self.tasks[rows])], dim=1))
        good = self.good[rows]
        known = torch.isfinite(good)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(
            odds, torch.where(known, good, 0.0), reduction="none"
        )
        weights = known * self.weights[rows, None]
        return (losses * weights).sum() / weights.sum().clamp(min=1e-9)
