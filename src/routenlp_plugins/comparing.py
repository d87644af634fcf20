"""How far two answers say the same, in [0, 1]: what agreement between tiers and quality against references rest on."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "COMPARATORS",
    "Comparator",
    "comparator",
    "entity_f1",
    "entity_set",
    "rouge_l",
    "same_label",
    "same_number",
    "same_text",
    "semantic_similarity",
]

Comparator = Callable[[str, str], float]
"""Agreement of two answers in [0, 1], the same in either order."""


def same_label(first: str, second: str) -> float:
    """1 if both are the same label up to case, surrounding space and a closing full stop, else 0.

    >>> same_label(" Lost_card.", "lost_card")
    1.0
    """
    return float(_label(first) == _label(second))


def same_text(first: str, second: str) -> float:
    """1 if both are the same up to case, punctuation, space and Unicode form (NFKC), else 0.

    >>> same_text("The bank closes at 5 p.m.", "the bank closes at 5 p m")
    1.0
    """
    return float(first == second or _words(_folded(first)) == _words(_folded(second)))


def same_number(first: str, second: str) -> float:
    """1 if the last number in both is the same, else 0; answers without a number agree with none.

    >>> same_number("It costs $1,200.50 a month.", "So the answer is 1200.5")
    1.0
    """
    one, other = _last_number(first), _last_number(second)
    return float(one is not None and one == other)


def rouge_l(first: str, second: str) -> float:
    """ROUGE-L F1 over lower-cased alphanumeric words: longest common subsequence (Lin 2004, section 3.1)."""
    words, target = _words(first.lower()), _words(second.lower())
    common = _longest_common_subsequence(words, target)
    return 2 * common / (len(words) + len(target)) if common else float(not words and not target)


def entity_f1(first: str, second: str) -> float:
    """F1 over the multiset of (text, type); both sides are JSON ``[[text, type], ...]``, and 0 if the first is not.

    Raises:
        DataError: the second is not of this form.
    """
    expected = _entities(second)
    if expected is None:
        raise DataError(f"reference: expected JSON [[text, type], ...], got {second[:80]!r}")
    return _f1(_entities(first), expected)


def entity_set(first: str, second: str) -> float:
    """`entity_f1` of two answers: 0 if either is not JSON ``[[text, type], ...]``."""
    return _f1(_entities(first), _entities(second))


def semantic_similarity(encode: Callable[[Sequence[str]], NDArray[np.floating[Any]]]) -> Comparator:
    """Cosine similarity of two embeddings, negative values as 0.

    Args:
        encode: n texts -> (n, d) array.
    """

    def compare(first: str, second: str) -> float:
        import numpy as np

        one, other = np.asarray(encode([first, second]), dtype=np.float64)
        norms = float(np.linalg.norm(one) * np.linalg.norm(other))
        return min(max(float(one @ other) / norms, 0.0), 1.0) if norms else float(first == second)

    return compare


COMPARATORS: Mapping[str, Comparator] = {
    "label": same_label,
    "text": same_text,
    "number": same_number,
    "rouge_l": rouge_l,
    "entities": entity_set,
}


def comparator(name: str, own: Mapping[str, Comparator] | None = None) -> Comparator:
    """The comparator of that name, of the user's own or of `COMPARATORS`.

    Raises:
        DataError: there is none.
    """
    known = {**COMPARATORS, **(own or {})}
    if name not in known:
        raise DataError(f"comparator {name!r} is unknown; known: {', '.join(known)}; give your own as comparators=")
    return known[name]


def _label(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _last_number(text: str) -> float | None:
    found = re.findall(r"[-+]?\d[\d,]*\.?\d*(?:[eE][-+]?\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _f1(found: Counter[Hashable] | None, expected: Counter[Hashable] | None) -> float:
    if found is None or expected is None:
        return 0.0
    if not found and not expected:
        return 1.0
    return 2 * sum((found & expected).values()) / (sum(found.values()) + sum(expected.values()))


def _entities(text: str) -> Counter[Hashable] | None:
    try:
        data = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, list):
        return None
    pairs = [tuple(item) for item in data if isinstance(item, list) and len(item) == 2]
    if len(pairs) != len(data) or not all(isinstance(part, str) for pair in pairs for part in pair):
        return None
    return Counter(pairs)
