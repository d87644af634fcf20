"""The network of the RouteNLP paper: words and task share a hidden layer, families of tasks have a head each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingExtraError
from ..logistic import probability
from .examples import Examples, Trainer

if TYPE_CHECKING:
    import torch

__all__ = ["Losses", "Network"]

EMBEDDING, HIDDEN = 16, 64
DROPOUT = 0.2
UNSEEN = 0.1
"""Share of the rows whose task is hidden while training, so that the shared head learns to do without."""
BATCH, EPOCHS, PATIENCE = 128, 60, 5
RATE, DECAY = 3e-3, 0.05


@dataclass(frozen=True, slots=True)
class Losses:
    """Weights of what is minimised, beside the cross entropy of each tier with how good its answer was.

    With p_k = P(tier k is good enough), the cheapest sufficient tier is k with probability p_k times all (1 - p_j) of
    cheaper tiers j, and the last tier takes the rest.

    Attributes:
        route: cross entropy with the cheapest tier that was good enough; as the next two, of queries whose outcomes are
            all known.
        cost: expected cost of that tier, against the dearest.
        quality: expected shortfall of its quality below what is good enough.
        preference: Bradley-Terry loss of pairs of answers of which one was preferred (Bradley and Terry 1952).
    """

    route: float = 0.0
    cost: float = 0.0
    quality: float = 0.0
    preference: float = 1.0


PAPER = Losses(route=1.0, cost=0.3, quality=0.5)
"""As RouteNLP weighs them."""


@dataclass(frozen=True, slots=True)
class Network:
    """log-odds = relu([vector, task] * hidden + bias) * head of the task's family + its intercept.

    Attributes:
        embedding: (T + 1, e), the last for a task that was never seen.
        hidden, bias: (d + e, h) and (h,).
        heads, intercepts: (F + 1, h, K) and (F + 1, K), the last shared by all and used for unseen tasks.
        families: (T + 1,) the family of each task.
    """

    embedding: NDArray[np.float32]
    hidden: NDArray[np.float32]
    bias: NDArray[np.float32]
    heads: NDArray[np.float32]
    intercepts: NDArray[np.float32]
    families: NDArray[np.int64]

    @classmethod
    def trainers(cls, tasks: int) -> list[Trainer]:
        """One, for T tasks that are a family each."""
        return [partial(cls.train, families=np.arange(tasks + 1))]

    @classmethod
    def train(
        cls, examples: Examples, families: NDArray[np.int64], losses: Losses | None = None, seed: int = 0
    ) -> Network:
        """By AdamW, until the loss on one of the folds has not fallen for `PATIENCE` epochs.

        Args:
            families: (T + 1,) the family of each task, and for the unseen task one more than of all others.

        Raises:
            MissingExtraError: torch is not installed.
        """
        if find_spec("torch") is None:
            raise MissingExtraError("torch is not installed: pip install 'routenlp-plugins[train]'")
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _Training(examples, families, losses or Losses(), seed).run()

    def __call__(self, vectors: NDArray[np.float32], tasks: NDArray[np.intp]) -> NDArray[np.float64]:
        """(n, K) probabilities."""
        x = np.hstack([vectors, self.embedding[tasks]])
        hidden = np.maximum(x @ self.hidden + self.bias, 0)
        family = self.families[tasks]
        odds = np.empty((len(x), self.heads.shape[2]))
        for one in np.unique(family):
            rows = family == one
            odds[rows] = hidden[rows] @ self.heads[one] + self.intercepts[one]
        return probability(odds)

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """All layers."""
        return {name: getattr(self, name) for name in self.__slots__}


class _Training:
    def __init__(self, examples: Examples, families: NDArray[np.int64], losses: Losses, seed: int) -> None:
        import torch

        self.losses = losses
        self.families = torch.as_tensor(families)
        self.rng = np.random.default_rng(seed)
        self.held_out = examples.folds == self.rng.choice(np.unique(examples.folds))
        self.vectors = torch.as_tensor(examples.vectors)
        self.tasks = torch.as_tensor(examples.tasks)
        self.known = torch.as_tensor(np.isfinite(examples.good))
        self.good = torch.as_tensor(np.nan_to_num(examples.good), dtype=torch.float32)
        self.weights = torch.as_tensor(examples.weights / examples.weights.mean(), dtype=torch.float32)
        self.cost = torch.as_tensor(examples.cost / examples.cost.max(), dtype=torch.float32)
        self.preferences = _preferences_of(examples)
        count, unseen = examples.good.shape[1], int(families[-1])
        mean = np.clip(np.nan_to_num(np.nanmean(examples.good, axis=0), nan=0.5), 0.01, 0.99)

        def parameter(*shape: int, scale: float) -> torch.nn.Parameter:
            return torch.nn.Parameter(scale * torch.randn(*shape))

        width = examples.vectors.shape[1] + EMBEDDING
        self.parameters = {
            "embedding": parameter(len(families), EMBEDDING, scale=0.1),
            "hidden": parameter(width, HIDDEN, scale=width**-0.5),
            "bias": parameter(HIDDEN, scale=0.0),
            "shared": parameter(HIDDEN, count, scale=HIDDEN**-0.5),
            "intercept": torch.nn.Parameter(torch.as_tensor(np.log(mean / (1 - mean)), dtype=torch.float32)),
            # what sets a family apart starts at nothing, and decays to it
            "own": parameter(unseen + 1, HIDDEN, count, scale=0.0),
            "own_intercept": parameter(unseen + 1, count, scale=0.0),
        }

    def run(self) -> Network:
        import torch

        optimizer = torch.optim.AdamW(list(self.parameters.values()), lr=RATE, weight_decay=DECAY)
        rows, rest = np.flatnonzero(~self.held_out), np.flatnonzero(self.held_out)
        least, best, waited = np.inf, self._state(), 0
        for _ in range(EPOCHS):
            for batch in np.array_split(self.rng.permutation(rows), max(len(rows) // BATCH, 1)):
                optimizer.zero_grad()
                self._loss(batch, learning=True).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            with torch.inference_mode():
                loss = float(self._loss(rest, learning=False))
            if loss < least - 1e-4:
                least, best, waited = loss, self._state(), 0
            elif (waited := waited + 1) >= PATIENCE:
                break
        return self._network(best)

    def _state(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.parameters.items()}

    def _odds(self, rows: NDArray[np.intp], *, learning: bool) -> torch.Tensor:
        import torch

        of, tasks = self.parameters, self.tasks[rows]
        if learning:
            hide = torch.rand(len(tasks)) < UNSEEN
            tasks = torch.where(hide, len(self.families) - 1, tasks)
        family = self.families[tasks]
        x = torch.cat([self.vectors[rows], of["embedding"][tasks]], dim=1)
        hidden = torch.relu(x @ of["hidden"] + of["bias"])
        hidden = torch.nn.functional.dropout(hidden, DROPOUT, training=learning)
        own = torch.einsum("nh,nhk->nk", hidden, of["own"][family])
        seen = (family < int(self.families[-1])).float()[:, None]
        return hidden @ of["shared"] + of["intercept"] + seen * (own + of["own_intercept"][family])

    def _loss(self, rows: NDArray[np.intp], *, learning: bool) -> torch.Tensor:
        import torch

        odds, good, known = self._odds(rows, learning=learning), self.good[rows], self.known[rows].float()
        weights, complete = self.weights[rows], known.min(dim=1).values
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(odds, good, reduction="none")
        loss = (weights * (entropy * known).sum(1) / known.sum(1).clamp(min=1)).mean()
        sufficient = _cheapest_sufficient(torch.sigmoid(odds))
        terms: dict[str, Callable[[], torch.Tensor]] = {
            "route": lambda: -(_cheapest_sufficient(good) * torch.log(sufficient.clamp(min=1e-6))).sum(1),
            "cost": lambda: sufficient @ self.cost,
            "quality": lambda: (sufficient * (1 - good)).sum(1),
        }
        for name, term in terms.items():
            if share := getattr(self.losses, name):
                loss = loss + share * (weights * complete * term()).mean()
        if self.losses.preference and len(self.preferences):
            loss = loss + self.losses.preference * self._preference(odds, rows)
        return loss

    def _preference(self, odds: torch.Tensor, rows: NDArray[np.intp]) -> torch.Tensor:
        import torch

        place = {int(row): i for i, row in enumerate(rows)}
        mine = [(place[row], better, worse) for row, better, worse in self.preferences if row in place]
        if not mine:
            return torch.zeros(())
        at, better, worse = (torch.as_tensor(of) for of in zip(*mine, strict=True))
        lead = odds[at, better] - odds[at, worse]
        return torch.nn.functional.softplus(-lead).sum() / len(rows)

    def _network(self, state: Mapping[str, torch.Tensor]) -> Network:
        heads, intercepts = state["shared"] + state["own"], state["intercept"] + state["own_intercept"]
        heads[-1], intercepts[-1] = state["shared"], state["intercept"]
        return Network(
            embedding=state["embedding"].numpy(),
            hidden=state["hidden"].numpy(),
            bias=state["bias"].numpy(),
            heads=heads.numpy(),
            intercepts=intercepts.numpy(),
            families=self.families.numpy(),
        )


def _cheapest_sufficient(good: torch.Tensor) -> torch.Tensor:
    """(n, K) probability of each tier to be the cheapest that is good enough; the last one takes the rest."""
    import torch

    none_before = torch.cumprod(torch.cat([torch.ones_like(good[:, :1]), 1 - good[:, :-1]], dim=1), dim=1)
    return torch.cat([none_before[:, :-1] * good[:, :-1], none_before[:, -1:]], dim=1)


def _preferences_of(examples: Examples) -> list[tuple[int, int, int]]:
    return [(int(row), int(better), int(worse)) for row, better, worse in examples.preferences]
