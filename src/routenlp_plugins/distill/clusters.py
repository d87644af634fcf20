"""Where the cheap tiers fail: clusters of what was escalated, frozen, so that fresh traffic can be assigned to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import read_arrays, write_arrays
from ..errors import DataError, ReleaseError
from ..routing.encoders import Encoder

__all__ = ["ELSEWHERE", "Clustering", "FailureClusters"]

FORMAT = "routenlp failure clusters 1"
ELSEWHERE = -1
"""The cluster of what is near to none."""
DIMENSIONS = 128
FEWEST = 10
"""Queries of a cluster, on average, below which no more clusters are tried."""
SAMPLE = 2000
"""Queries of a task that the silhouette is computed on."""
REACH = 0.99
"""Share of a cluster's own queries that are within its radius."""
TERMS, EXEMPLARS = 4, 3


@dataclass(frozen=True, slots=True)
class Clustering:
    """How clusters are found.

    Attributes:
        method: k-means, with k by the mean silhouette (RouteNLP: Guo et al. 2026), or HDBSCAN (Campello et al. 2013).
        most: clusters of a task that are tried, for k-means.
        smallest: queries of a cluster, for HDBSCAN.
    """

    method: Literal["kmeans", "hdbscan"] = "kmeans"
    most: int = 30
    smallest: int = FEWEST

    def __post_init__(self) -> None:
        if self.method not in ("kmeans", "hdbscan"):
            raise DataError(f"clustering: method must be kmeans or hdbscan, got {self.method!r}")
        for name in ("most", "smallest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 2:
                raise DataError(f"clustering: {name} must be 2, 3, ..., got {value!r}")


@dataclass(frozen=True, slots=True, eq=False)
class FailureClusters:
    """Clusters of each task; numbered over all tasks.

    Attributes:
        encoder: whose vectors they are in.
        tasks: (C,) task of each cluster.
        labels: (C,) its distinctive terms.
        exemplars: (C,) the queries nearest to its middle.
        means, bases: task -> (d,) and (p, d) of its PCA.
        centres: task -> (c, p).
        radii: (C,) beyond which a query belongs elsewhere.
    """

    encoder: Encoder
    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    exemplars: tuple[tuple[str, ...], ...]
    means: Mapping[str, NDArray[np.float32]]
    bases: Mapping[str, NDArray[np.float32]]
    centres: Mapping[str, NDArray[np.float32]]
    radii: NDArray[np.float64]

    @classmethod
    def fit(
        cls, texts: Sequence[str], tasks: Sequence[str], encoder: Encoder, how: Clustering | None = None, seed: int = 0
    ) -> FailureClusters:
        """Cluster the n texts of each task by their vectors, after a PCA.

        Raises:
            DataError: no text, or vectors that are not finite.
        """
        how = how or Clustering()
        if not texts or len(texts) != len(tasks):
            raise DataError(f"clusters: expected n > 0 texts and their n tasks, got {len(texts)} and {len(tasks)}")
        vectors = np.asarray(encoder(texts), dtype=np.float32)
        if vectors.shape != (len(texts), encoder.size) or not np.isfinite(vectors).all():
            raise DataError(f"clusters: encoder {encoder.name!r} gave vectors of shape {vectors.shape}, or not finite")
        of_task = np.asarray(tasks)
        found: dict[str, list[Any]] = {"tasks": [], "labels": [], "exemplars": [], "radii": []}
        means, bases, centres = {}, {}, {}
        for task in sorted(set(tasks)):
            places = np.flatnonzero(of_task == task)
            means[task], bases[task] = _pca(vectors[places], seed)
            points = np.asarray((vectors[places] - means[task]) @ bases[task].T, dtype=np.float32)
            members = _members(points, how, seed)
            own = np.stack([points[of].mean(axis=0) for of in members])
            centres[task] = own
            words = [[texts[places[i]] for i in of] for of in members]
            found["labels"] += _distinctive(words)
            for of, centre in zip(members, own, strict=True):
                distance = np.linalg.norm(points[of] - centre, axis=1)
                nearest = of[np.argsort(distance, kind="stable")[:EXEMPLARS]]
                found["tasks"].append(task)
                found["exemplars"].append(tuple(texts[places[i]] for i in nearest))
                found["radii"].append(float(np.quantile(distance, REACH)) * (1 + 1e-6) + 1e-6)
        return cls(
            encoder,
            tuple(found["tasks"]),
            tuple(found["labels"]),
            tuple(found["exemplars"]),
            means,
            bases,
            centres,
            np.array(found["radii"]),
        )

    def __len__(self) -> int:
        return len(self.tasks)

    def assign(self, texts: Sequence[str], tasks: Sequence[str]) -> NDArray[np.intp]:
        """(n,) the cluster of each query; `ELSEWHERE` where it is beyond the radius of the nearest, or of no task."""
        found = np.full(len(texts), ELSEWHERE, dtype=np.intp)
        if not texts:
            return found
        vectors, of_task = np.asarray(self.encoder(texts), dtype=np.float32), np.asarray(tasks)
        for task, centres in self.centres.items():
            places = np.flatnonzero(of_task == task)
            if not len(places):
                continue
            distance = _distances(self._points(task, vectors[places]), centres)
            nearest = distance.argmin(axis=1)
            number = self.tasks.index(task) + nearest
            within = distance[np.arange(len(places)), nearest] <= self.radii[number]
            found[places] = np.where(within, number, ELSEWHERE)
        return found

    def map(self, texts: Sequence[str], task: str) -> NDArray[np.float64]:
        """(n, 2) queries of a task in the plane of the two largest components, for a picture."""
        points = self._points(task, np.asarray(self.encoder(texts), dtype=np.float32))[:, :2]
        return np.pad(points.astype(np.float64), ((0, 0), (0, 2 - points.shape[1])))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; an existing file is never touched."""
        named = {"tasks": self.tasks, "labels": self.labels, "exemplars": self.exemplars}
        facts = {"format": FORMAT, "encoder": self.encoder.name, **{n: json.dumps(v) for n, v in named.items()}}
        arrays: dict[str, NDArray[Any]] = {"radii": self.radii}
        for name, of in (("means", self.means), ("bases", self.bases), ("centres", self.centres)):
            arrays |= {f"{name}/{task}": array for task, array in of.items()}
        if Path(path).exists():
            raise ReleaseError(f"{path}: exists already and is not overwritten; choose a new file")
        scratch = Path(path).with_name(f".{Path(path).name}.new")
        scratch.unlink(missing_ok=True)
        return write_arrays(scratch, facts, arrays).replace(path)

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder) -> FailureClusters:
        """Read what `save` wrote.

        Raises:
            ReleaseError: the file cannot be read, or another encoder made its vectors.
        """
        facts, arrays = read_arrays(path, FORMAT)
        if facts.get("encoder") != encoder.name:
            raise ReleaseError(f"{path}: its vectors are those of {facts.get('encoder')!r}, not of {encoder.name!r}")
        of = {
            name: {key.partition("/")[2]: array for key, array in arrays.items() if key.startswith(f"{name}/")}
            for name in ("means", "bases", "centres")
        }
        try:
            tasks, labels = tuple(json.loads(facts["tasks"])), tuple(json.loads(facts["labels"]))
            exemplars = tuple(tuple(each) for each in json.loads(facts["exemplars"]))
            return cls(encoder, tasks, labels, exemplars, of["means"], of["bases"], of["centres"], arrays["radii"])
        except (KeyError, ValueError) as error:
            raise ReleaseError(f"{path}: not saved clusters ({error})") from None

    def _points(self, task: str, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray((vectors - self.means[task]) @ self.bases[task].T, dtype=np.float32)


def _distances(points: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.float64]:
    from sklearn.metrics import pairwise_distances

    return np.asarray(pairwise_distances(points, centres), dtype=np.float64)


def _pca(vectors: NDArray[np.float32], seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(d,) mean and (p, d) components; one of length 0 where all vectors are the same."""
    from sklearn.decomposition import PCA

    mean = vectors.mean(axis=0)
    if np.allclose(vectors, mean):
        return mean, np.zeros((1, vectors.shape[1]), dtype=np.float32)
    found = PCA(min(DIMENSIONS, len(vectors) - 1, vectors.shape[1]), random_state=seed).fit(vectors)
    return np.asarray(found.mean_, dtype=np.float32), np.asarray(found.components_, dtype=np.float32)


def _members(points: NDArray[np.float32], how: Clustering, seed: int) -> list[NDArray[np.intp]]:
    """The places of each cluster's queries; one cluster where nothing tells them apart."""
    number = _hdbscan(points, how) if how.method == "hdbscan" else _kmeans(points, how, seed)
    found = [np.flatnonzero(number == label) for label in range(number.max() + 1)]
    return found or [np.arange(len(points))]


def _hdbscan(points: NDArray[np.float32], how: Clustering) -> NDArray[np.intp]:
    from sklearn.cluster import HDBSCAN

    if len(points) < how.smallest:
        return np.zeros(len(points), dtype=np.intp)
    return np.asarray(HDBSCAN(min_cluster_size=how.smallest, copy=True).fit_predict(points), dtype=np.intp)


def _kmeans(points: NDArray[np.float32], how: Clustering, seed: int) -> NDArray[np.intp]:
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    most = min(how.most, len(points) // FEWEST, len(np.unique(points, axis=0)) - 1)
    seen = np.random.default_rng(seed).permutation(len(points))[:SAMPLE]
    best, chosen = -np.inf, np.zeros(len(points), dtype=np.intp)
    for k in _ks(most):
        labels = KMeans(k, n_init=3, random_state=seed).fit_predict(points)
        if len(np.unique(labels[seen])) < 2:
            continue
        score = silhouette_score(points[seen], labels[seen])
        if score > best:
            best, chosen = float(score), np.asarray(labels, dtype=np.intp)
    return chosen


def _ks(most: int) -> list[int]:
    """From 2 on, each at most a quarter more than the one before."""
    found = [2] if most >= 2 else []
    while found and found[-1] < most:
        found.append(min(found[-1] + max(1, found[-1] // 4), most))
    return found


def _distinctive(words: Sequence[Sequence[str]]) -> list[str]:
    """Of each cluster, the terms by class-based TF-IDF (Grootendorst 2022) that none of the others shares as much."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(ngram_range=(1, 2), stop_words="english")
    try:
        counts = vectorizer.fit_transform([" \n ".join(of) for of in words]).toarray().astype(np.float64)
    except ValueError:
        # only stop words, or no letters at all
        return ["unnamed"] * len(words)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    weight = share * np.log1p(counts.sum(axis=1).mean() / counts.sum(axis=0))
    terms = vectorizer.get_feature_names_out()
    return [", ".join(_few(terms, row)) or "unnamed" for row in weight]


def _few(terms: NDArray[np.str_], weight: NDArray[np.float64]) -> list[str]:
    """The heaviest terms, none of which is part of another."""
    found: list[str] = []
    for place in np.argsort(-weight, kind="stable"):
        if weight[place] <= 0 or len(found) == TERMS:
            break
        term = str(terms[place])
        if not any(set(term.split()) & set(other.split()) for other in found):
            found.append(term)
    return found
