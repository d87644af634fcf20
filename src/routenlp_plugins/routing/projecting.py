"""Vectors of an encoder in fewer dimensions: those in which the queries that were seen differ most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Projection"]

MOST = 128
SEEN = 20_000
"""Vectors that components are looked for among."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Principal components, scaled so that vectors have length 1 on average.

    Attributes:
        centre: (d,) float32.
        components: (d, r) float32.
    """

    centre: NDArray[np.float32]
    components: NDArray[np.float32]

    @classmethod
    def train(cls, vectors: NDArray[np.float32], seed: int = 0) -> Projection:
        """At most `MOST` components, and fewer than there are different vectors."""
        from sklearn.decomposition import PCA

        rng = np.random.default_rng(seed)
        some = vectors if len(vectors) <= SEEN else vectors[rng.choice(len(vectors), SEEN, replace=False)]
        count = min(MOST, vectors.shape[1], max(len(np.unique(some, axis=0)) - 1, 0))
        centre = some.mean(axis=0) if len(some) else np.zeros(vectors.shape[1], dtype=np.float32)
        if not count:
            return cls(centre, np.zeros((vectors.shape[1], 0), dtype=np.float32))
        found = PCA(count, svd_solver="randomized", random_state=seed).fit(some)
        scale = np.sqrt(found.explained_variance_.sum())
        return cls(found.mean_.astype(np.float32), (found.components_.T / (scale or 1.0)).astype(np.float32))

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, r)."""
        return np.asarray((vectors - self.centre) @ self.components)

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Centre and components."""
        return {"centre": self.centre, "components": self.components}
