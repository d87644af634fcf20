"""Is a query like those a certificate speaks of? Its character trigrams against those of the calibration texts.

A coarse check without an encoder, for every script: another language, another domain, code or noise has many
trigrams that no calibration text had. How many are too many is a conformal quantile of the calibration texts.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil
from zlib import crc32

from .policy import Support

__all__ = ["novelty", "support_of", "supported"]

SIZE = 2**16
"""Bits of the table of trigrams seen."""
FOLDS = 10
FEWEST = 50
"""Texts below which nothing can be said about what is unusual."""


def supported(support: Support, text: str) -> bool:
    """Whether a text is not more unusual than the calibration texts were."""
    return novelty(support.trigrams, text) <= support.largest_novelty


def novelty(trigrams: str, text: str) -> float:
    """Share of a text's distinct trigrams that no calibration text had; 1 without any.

    Args:
        trigrams: table of those seen, as `Support` holds it.
    """
    seen = _bits(trigrams)
    places = set(_places(text))
    return sum(not seen[place >> 3] >> (place & 7) & 1 for place in places) / len(places) if places else 1.0


def support_of(texts: Sequence[str], share: float, units: Sequence[str]) -> Support | None:
    """What these texts have in common; None if they are too few or any of them is unknown.

    The largest novelty is the conformal quantile of each text against the others in `FOLDS` folds: of queries drawn
    like these about `share` are called unlike them.

    Args:
        units: (n,) what each text was drawn with: turns of a dialogue repeat each other, so that a dialogue is new as
            a whole or not at all.
    """
    if len(texts) < FEWEST or not all(texts):
        return None
    place_of = {unit: place for place, unit in enumerate(dict.fromkeys(units))}
    fold_of = [place_of[unit] % FOLDS for unit in units]
    seen = [_table(t for t, f in zip(texts, fold_of, strict=True) if f != fold) for fold in range(FOLDS)]
    novelties = sorted(novelty(seen[fold], text) for text, fold in zip(texts, fold_of, strict=True))
    place = min(ceil((1 - share) * (len(texts) + 1)), len(texts))
    return Support(_table(iter(texts)), novelties[place - 1])


def _table(texts: Iterator[str]) -> str:
    seen = bytearray(SIZE // 8)
    for text in texts:
        for place in _places(text):
            seen[place >> 3] |= 1 << (place & 7)
    return b64encode(seen).decode()


def _places(text: str) -> Iterator[int]:
    folded = f" {' '.join(text.casefold().split())} "
    return (crc32(folded[i : i + 3].encode("utf-8", "replace")) % SIZE for i in range(len(folded) - 2))


@lru_cache(maxsize=256)
def _bits(trigrams: str) -> bytes:
    return b64decode(trigrams)
