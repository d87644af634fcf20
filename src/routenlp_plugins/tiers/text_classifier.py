"""A tier that answers with a label: a linear text classifier with calibrated probabilities."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..arrays import read_arrays, write_arrays
from ..errors import DataError, ReleaseError
from ..types import Call, Completion

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["TextClassifierTier"]

FORMAT = "routenlp text classifier 1"
_NGRAMS = {"word": (1, 1), "char_wb": (2, 5)}
_FEATURES = {"word": 2**14, "char_wb": 2**16}
RATE, EPOCHS = 0.02, 5
"""Of an update."""
FEW = 16


@dataclass(frozen=True, slots=True, eq=False)
class TextClassifierTier:
    """Linear classifier over hashed TF-IDF n-grams; its confidence is a calibrated class probability.

    Attributes:
        labels: (C,) what it can answer.
        analyzer: "word" for single words, "char_wb" for character 2- to 5-grams, which need no word boundaries
            of a known script.
        idf: (D,) inverse document frequencies.
        weights: (C, D) float32.
        intercepts: (C,).
        inverse_temperature: scale of the decision values, fitted on out-of-fold predictions.
        model: fingerprint of all that, as its answers name it: a certificate speaks of this classifier and no other.
    """

    labels: tuple[str, ...]
    analyzer: Literal["word", "char_wb"]
    idf: NDArray[np.float64]
    weights: NDArray[np.float32]
    intercepts: NDArray[np.float64]
    inverse_temperature: float
    model: str = field(init=False)

    def __post_init__(self) -> None:
        digest = sha256(repr((self.labels, self.analyzer, self.inverse_temperature)).encode())
        for array in (self.idf, self.weights, self.intercepts):
            digest.update(np.ascontiguousarray(array).tobytes())
        object.__setattr__(self, "model", f"text classifier {digest.hexdigest()[:16]}")

    @classmethod
    def train(
        cls,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        analyzer: Literal["word", "char_wb"] = "char_wb",
        seed: int = 0,
    ) -> TextClassifierTier:
        """Fit on labelled texts; the temperature (Guo et al. 2017) on cross-validated decision values.

        Raises:
            DataError: fewer than two labels, or a label with a single text.
        """
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.svm import LinearSVC

        counts = Counter(labels)
        if len(texts) != len(labels):
            raise DataError(f"texts and labels must be of the same length, got {len(texts)} and {len(labels)}")
        if len(counts) < 2:
            raise DataError(f"a classifier needs at least two labels, got {', '.join(counts) or 'none'}")
        rare = [label for label, count in counts.items() if count < 2]
        if rare:
            raise DataError(f"label {rare[0]!r} has a single text; give at least two of each label, or leave it out")
        tfidf = TfidfTransformer(sublinear_tf=True)
        features = tfidf.fit_transform(_count(texts, analyzer))
        classifier = LinearSVC(C=0.5, random_state=seed)
        folds = StratifiedKFold(min(5, *counts.values()), shuffle=True, random_state=seed)
        decisions = cross_val_predict(classifier, features, np.asarray(labels), cv=folds, method="decision_function")
        classifier.fit(features, labels)
        names = [str(label) for label in classifier.classes_]
        weights, intercepts = classifier.coef_, classifier.intercept_
        if len(names) == 2:
            weights, intercepts = np.vstack([-weights, weights]) / 2, np.append(-intercepts, intercepts) / 2
        targets = np.searchsorted(classifier.classes_, np.asarray(labels))
        return cls(
            labels=tuple(names),
            analyzer=analyzer,
            idf=np.asarray(tfidf.idf_),
            weights=weights.astype(np.float32),
            intercepts=np.asarray(intercepts, dtype=np.float64),
            inverse_temperature=_fit_inverse_temperature(decisions, targets),
        )

    def updated(self, texts: Sequence[str], labels: Sequence[str], *, seed: int = 0) -> TextClassifierTier:
        """Go on from these weights with new texts, by stochastic gradient descent; labels may be new ones.

        What the classifier learned before fades unless some of it is among the texts. The scale of the probabilities
        stays as it is.

        Raises:
            DataError: no texts, or not as many labels.
        """
        from sklearn.linear_model import SGDClassifier

        if not texts or len(texts) != len(labels):
            raise DataError(f"expected n > 0 texts and their n labels, got {len(texts)} and {len(labels)}")
        names = tuple(sorted({*self.labels, *labels}))
        features, targets = self._features(texts), np.asarray(labels)
        model = SGDClassifier(learning_rate="constant", eta0=RATE, alpha=1e-6, random_state=seed)
        model.partial_fit(features[:1], targets[:1], classes=np.asarray(names))
        old = [self.labels.index(name) if name in self.labels else -1 for name in names]
        weights = np.where(np.array(old)[:, None] < 0, 0.0, self.weights[old].astype(np.float64))
        # never seen, so it should not be said: as its regression begins
        intercepts = np.where(np.array(old) < 0, -1.0, self.intercepts[old])
        if len(names) == 2:
            # of two labels there is one weight vector, of the second
            weights, intercepts = 2 * weights[1:], 2 * intercepts[1:]
        model.coef_, model.intercept_ = weights, intercepts
        shuffled = np.random.default_rng(seed)
        for _ in range(EPOCHS):
            order = shuffled.permutation(len(targets))
            model.partial_fit(features[order], targets[order])
        weights, intercepts = model.coef_, model.intercept_
        if len(names) == 2:
            weights, intercepts = np.vstack([-weights, weights]) / 2, np.append(-intercepts, intercepts) / 2
        return TextClassifierTier(
            labels=names,
            analyzer=self.analyzer,
            idf=self.idf,
            weights=np.asarray(weights, dtype=np.float32),
            intercepts=np.asarray(intercepts, dtype=np.float64),
            inverse_temperature=self.inverse_temperature,
        )

    def __call__(self, call: Call) -> Completion:
        """The most probable label of the query's text."""
        (label,), (confidence,) = self.predict([call.query.text])
        return Completion(text=label, confidence=confidence, model=self.model)

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        """Most probable label of each text, and its probability."""
        probabilities = self.probabilities(texts)
        best = probabilities.argmax(axis=1)
        return [self.labels[i] for i in best], [float(p) for p in probabilities.max(axis=1)]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(n, C) calibrated probabilities, in the order of `labels`."""
        from scipy.special import softmax

        features = self._features(texts)
        if len(texts) < FEW:
            # of a few texts the n-grams are few: a product with all weights would read all of them
            rows = (features[[i]] for i in range(len(texts)))
            decisions = np.array([self.weights[:, row.indices] @ row.data for row in rows]) + self.intercepts
        else:
            decisions = features @ self.weights.T + self.intercepts
        return np.asarray(softmax(self.inverse_temperature * decisions, axis=1))

    def _features(self, texts: Sequence[str]) -> Any:
        from scipy.sparse import diags_array
        from sklearn.preprocessing import normalize

        counts = _count(texts, self.analyzer)
        counts.data = 1 + np.log(counts.data)
        return normalize(counts @ diags_array(self.idf))

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; an existing file is never touched.

        Raises:
            ReleaseError: there is something at `path` already.
        """
        facts = {"format": FORMAT, "analyzer": self.analyzer, "labels": json.dumps(self.labels)}
        arrays: dict[str, NDArray[Any]] = {
            "idf": self.idf,
            "weights": self.weights,
            "intercepts": self.intercepts,
            "inverse_temperature": np.array([self.inverse_temperature]),
        }
        return write_arrays(path, facts, arrays)

    @classmethod
    def load(cls, path: str | Path) -> TextClassifierTier:
        """Read what `save` wrote.

        Raises:
            ReleaseError: the file is missing, truncated or something else.
        """
        facts, arrays = read_arrays(path, FORMAT)
        try:
            return cls(
                labels=tuple(json.loads(facts["labels"])),
                analyzer="word" if facts["analyzer"] == "word" else "char_wb",
                idf=arrays["idf"],
                weights=arrays["weights"],
                intercepts=arrays["intercepts"],
                inverse_temperature=float(arrays["inverse_temperature"][0]),
            )
        except (KeyError, ValueError) as error:
            raise ReleaseError(f"{path}: not a saved text classifier ({error})") from None


def _count(texts: Sequence[str], analyzer: Literal["word", "char_wb"]) -> csr_matrix:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer=analyzer,
        ngram_range=_NGRAMS[analyzer],
        n_features=_FEATURES[analyzer],
        norm=None,
        alternate_sign=False,
    )
    counts: csr_matrix = vectorizer.transform(texts)
    return counts


def _fit_inverse_temperature(decisions: NDArray[np.float64], targets: NDArray[np.intp]) -> float:
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    if decisions.ndim == 1:
        decisions = np.column_stack([-decisions, decisions]) / 2
    rows = np.arange(len(targets))

    def log_loss(log_scale: float) -> float:
        return -float(log_softmax(np.exp(log_scale) * decisions, axis=1)[rows, targets].mean())

    return float(np.exp(minimize_scalar(log_loss, bounds=(-5, 7), method="bounded").x))
