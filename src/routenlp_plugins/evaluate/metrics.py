"""Quality of an answer against a reference, in [0, 1]."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping

from ..errors import DataError

__all__ = ["METRICS", "Metric", "accuracy", "entity_f1", "metric", "rouge_l"]

Metric = Callable[[str, str], float]


def accuracy(answer: str, reference: str) -> float:
    """1 if both are the same label up to case, surrounding space and a closing full stop, else 0.

    >>> accuracy(" Lost_card.", "lost_card")
    1.0
    """
    return float(_label(answer) == _label(reference))


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 over lower-cased alphanumeric words: longest common subsequence (Lin 2004, section 3.1)."""
    words, target = _words(answer), _words(reference)
    common = _longest_common_subsequence(words, target)
    return 2 * common / (len(words) + len(target)) if common else float(not words and not target)


def entity_f1(answer: str, reference: str) -> float:
    """F1 over the multiset of (text, type); both sides are JSON ``[[text, type], ...]``.

    An answer that is not of this form scores 0.

    Raises:
        DataError: the reference is not of this form.
    """
    expected = _entities(reference)
    if expected is None:
        raise DataError(f"reference: expected JSON [[text, type], ...], got {reference[:80]!r}")
    found = _entities(answer)
    if found is None:
        return 0.0
    if not found and not expected:
        return 1.0
    return 2 * sum((found & expected).values()) / (sum(found.values()) + sum(expected.values()))


METRICS: Mapping[str, Metric] = {"accuracy": accuracy, "rouge_l": rouge_l, "entity_f1": entity_f1}


def metric(name: str, own: Mapping[str, Metric] | None = None) -> Metric:
    """The metric of that name, of the user's own or of `METRICS`.

    Raises:
        DataError: there is none.
    """
    known = {**METRICS, **(own or {})}
    if name not in known:
        raise DataError(f"metric {name!r} is unknown; known: {', '.join(known)}")
    return known[name]


def _label(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _longest_common_subsequence(first: list[str], second: list[str]) -> int:
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


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
