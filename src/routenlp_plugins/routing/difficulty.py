"""The difficulty router: from the words of a query and its task to P(good enough) of each tier."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import read_arrays, write_arrays
from ..errors import DataError, ReleaseError
from ..logistic import log_odds, logistic_regression, probability
from .encoders import AbsentEncoder, Encoder, HashedNgrams
from .examples import SMALLEST, Examples, Method, best
from .factors import MatrixFactorisation
from .linear import Logistic
from .means import TaskMeans
from .neighbours import NearestNeighbours
from .network import Network
from .observations import Observations
from .projecting import Projection

__all__ = ["METHODS", "DifficultyRouter", "Trained"]

FORMAT = "routenlp difficulty router 1"
METHODS: Mapping[str, type[Any]] = {
    "task means": TaskMeans,
    "logistic": Logistic,
    "matrix factorisation": MatrixFactorisation,
    "nearest neighbours": NearestNeighbours,
    "network": Network,
}
"""By name, from simple to complex: where several are tried, a simpler one is kept unless another is clearly better."""
FEWEST = 50
"""Rows of known outcome below which a tier's probabilities are not calibrated."""
FREE = 10.0


@dataclass(frozen=True, slots=True)
class DifficultyRouter:
    """Predicts for each tier, before any call, whether its answer will be good enough.

    Attributes:
        tiers: K names.
        tasks: T names; any other task is one that was never seen.
        kind: which of `METHODS` predicts.
        slope, intercept: (K,) of the calibration, on log-odds.
        digest: of all that decides; a certificate speaks of this router and no other.
    """

    tiers: tuple[str, ...]
    tasks: tuple[str, ...]
    kind: str
    encoder: Encoder
    projection: Projection
    method: Method
    slope: NDArray[np.float64]
    intercept: NDArray[np.float64]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = sha256(repr(sorted(self._facts().items())).encode())
        for name, array in sorted(self._arrays().items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        object.__setattr__(self, "digest", digest.hexdigest())

    @classmethod
    def train(cls, observed: Observations, options: TrainingOptions | None = None) -> Trained:
        """Learn from queries that several tiers have answered."""
        options = options or TrainingOptions()
        chosen = observed.some(options.most_rows, options.seed)
        if chosen is not None:
            return cls._on_some(observed, chosen, options)
        vectors = options.encoder(observed.texts)
        wanted = (len(observed.texts), options.encoder.size)
        if np.shape(vectors) != wanted:
            raise DataError(
                f"encoder {options.encoder.name!r}: expected an array of shape {wanted}, got {np.shape(vectors)}"
            )
        vectors = np.asarray(vectors)
        if not np.isfinite(vectors).all():
            raise DataError(f"encoder {options.encoder.name!r}: its vectors must be finite numbers")
        projection = Projection.train(vectors, options.seed)
        examples = observed.examples(projection(vectors), options.seed)
        names = observed.task_names
        trainers = [train for kind in options.methods for train in METHODS[kind].trainers(len(names))]
        method, held_out = best(trainers, examples)
        kind = next(kind for kind, of in METHODS.items() if isinstance(method, of))
        slope, intercept = _calibration(held_out, examples)
        router = cls(tuple(observed.good), names, kind, options.encoder, projection, method, slope, intercept)
        return Trained(router, _calibrated(held_out, slope, intercept))

    @classmethod
    def _on_some(cls, observed: Observations, chosen: NDArray[np.intp], options: TrainingOptions) -> Trained:
        """Of the others the router itself has seen nothing."""
        trained = cls.train(observed.take(chosen), options)
        held_out = trained.router(observed.texts, observed.tasks)
        held_out[chosen] = trained.held_out
        return Trained(trained.router, held_out)

    def __call__(self, texts: Sequence[str], tasks: Sequence[str | None]) -> NDArray[np.float64]:
        """(n, K) calibrated probabilities that an answer is good enough.

        Raises:
            DataError: texts or tasks are a single string, or not of one length.
        """
        if isinstance(texts, str) or isinstance(tasks, str) or len(texts) != len(tasks):
            raise DataError(f"expected n texts and their n tasks, got {texts!r:.60} and {tasks!r:.60}")
        place = {name: i for i, name in enumerate(self.tasks)}
        of_task = np.array([place.get(task or "", len(self.tasks)) for task in tasks], dtype=np.intp)
        predicted = self.method(self.projection(self.encoder(texts)), of_task)
        return _calibrated(predicted, self.slope, self.intercept)

    def usable(self) -> None:
        """Nothing, if it can predict.

        Raises:
            ReleaseError: its encoder is missing.
        """
        if isinstance(self.encoder, AbsentEncoder):
            self.encoder([])

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; an existing file is never touched. The encoder is named, not written.

        Raises:
            ReleaseError: there is something at `path` already.
        """
        return write_arrays(path, *self.parts())

    @classmethod
    def load(cls, path: str | Path, encoder: Encoder | None = None, *, absent: bool = False) -> DifficultyRouter:
        """Read what `save` wrote.

        Args:
            encoder: the one it was trained with; the default one may be left out.
            absent: another one may be left out too, until a prediction is asked for.

        Raises:
            ReleaseError: the file is missing, truncated, edited or something else, or names another encoder.
        """
        facts, arrays = read_arrays(path, FORMAT)
        if absent and encoder is None and facts.get("encoder") != HashedNgrams().name:
            encoder = AbsentEncoder(facts.get("encoder", ""))
        return cls.of_parts(path, facts, arrays, encoder)

    def parts(self) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
        """Facts and arrays that make it again."""
        return self._facts(), self._arrays()

    @classmethod
    def of_parts(
        cls,
        source: str | Path,
        facts: Mapping[str, str],
        arrays: Mapping[str, NDArray[Any]],
        encoder: Encoder | None = None,
    ) -> DifficultyRouter:
        """From what `parts` gave; `source` names the file in errors.

        Raises:
            ReleaseError: something is missing, or another encoder is named.
        """
        try:
            encoder = encoder or HashedNgrams()
            if encoder.name != facts["encoder"]:
                raise ReleaseError(
                    f"{source}: its vectors are those of {facts['encoder']!r}, and the encoder is {encoder.name!r}; "
                    "give load the one it was trained with"
                )
            of: dict[str, dict[str, NDArray[Any]]] = {"projection": {}, "method": {}, "calibration": {}}
            for name, array in arrays.items():
                part, _, own = name.partition(".")
                of[part][own] = array
            return cls(
                tuple(json.loads(facts["tiers"])),
                tuple(json.loads(facts["tasks"])),
                facts["kind"],
                encoder,
                Projection(**of["projection"]),
                METHODS[facts["kind"]](**of["method"]),
                **of["calibration"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ReleaseError(f"{source}: not a saved difficulty router ({error})") from None

    def _facts(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "tiers": json.dumps(self.tiers),
            "tasks": json.dumps(self.tasks),
            "kind": self.kind,
            "encoder": self.encoder.name,
        }

    def _arrays(self) -> dict[str, NDArray[Any]]:
        arrays = {f"projection.{name}": array for name, array in self.projection.arrays().items()}
        arrays |= {f"method.{name}": array for name, array in self.method.arrays().items()}
        return arrays | {"calibration.slope": self.slope, "calibration.intercept": self.intercept}


@dataclass(frozen=True, slots=True)
class Trained:
    """A router, and what it says of the queries it was trained on without having seen them.

    Attributes:
        held_out: (n, K) cross-fitted: each by a router that had not seen the query's unit.
    """

    router: DifficultyRouter
    held_out: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TrainingOptions:
    """What most trainings leave as it is.

    Attributes:
        methods: names among `METHODS`; where there are several, cross-validation chooses.
        seed: of the folds.
        most_rows: about how many queries are learned from; of more of them, whole units are drawn.
    """

    methods: tuple[str, ...] = ("task means", "logistic")
    encoder: Encoder = field(default_factory=HashedNgrams)
    seed: int = 0
    most_rows: int = 15_000

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise DataError(f"methods: expected names in a tuple, such as ({self.methods!r},), got {self.methods!r}")
        if isinstance(self.encoder, type) or not callable(self.encoder):
            raise DataError(
                f"encoder: expected one, such as HashedNgrams() or TransformerEncoder.minilm(), got {self.encoder!r}"
            )
        if isinstance(self.most_rows, bool) or not isinstance(self.most_rows, int) or self.most_rows < 2:
            raise DataError(f"most_rows: expected a whole number from 2 on, got {self.most_rows!r}")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise DataError(f"methods: unknown {', '.join(unknown) or '(none given)'}; known: {', '.join(METHODS)}")
        object.__setattr__(self, "methods", tuple(name for name in METHODS if name in self.methods))


def _calibration(held_out: NDArray[np.float64], examples: Examples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(K,) slopes and intercepts on the log-odds (Platt 1999).

    A fold that was held out has other predictions than the rest for having other outcomes, against which they go. So
    slopes come from within folds, with an intercept for each; what is upside down there is no signal.
    """
    count = held_out.shape[1]
    slope, intercept = np.ones(count), np.zeros(count)
    for k in range(count):
        known = np.isfinite(examples.good[:, k])
        x, good = log_odds(held_out[known, k], SMALLEST), examples.good[known, k]
        if known.sum() < FEWEST or np.ptp(x) == 0 or np.ptp(good) == 0:
            continue
        weights = examples.weights[known] / examples.weights.mean()
        of_fold = np.eye(int(examples.folds.max()) + 1)[examples.folds[known]]
        found, _ = logistic_regression(np.column_stack([x, of_fold]) * FREE, good, weights, 1.0)
        slope[k] = max(found[0] * FREE, 0.0)
        intercept[k] = _intercept(slope[k] * x, good, weights)
    return slope, intercept


def _intercept(total: NDArray[np.float64], good: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """What makes the mean of the probabilities that of the outcomes."""
    from scipy.optimize import brentq

    def excess(added: float) -> float:
        return float(weights @ (probability(total + added) - good))

    return float(brentq(excess, -60.0, 60.0))


def _calibrated(
    predicted: NDArray[np.float64], slope: NDArray[np.float64], intercept: NDArray[np.float64]
) -> NDArray[np.float64]:
    return probability(slope * log_odds(predicted, SMALLEST) + intercept)
