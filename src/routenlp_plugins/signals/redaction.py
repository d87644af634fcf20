"""What of the words of users and models is kept."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal

from ..errors import DataError, TierError
from ..tiers.boundary import boundary

__all__ = ["Redact", "Redaction", "writable"]

logger = logging.getLogger(__name__)

Redact = Literal["drop", "hash"] | Callable[[str], str] | None
"""``"drop"``, ``"hash"``, or a function from a text to what is kept of it; None keeps all."""

_TYPE_OF_ERROR = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Timeout|Warning|Interrupt|Exit)(?=: |$)")
"""What else stands before a colon may be a word of the query."""


@dataclass(frozen=True, slots=True)
class Redaction:
    """Applied to every text before it is written."""

    how: Redact = None

    def __post_init__(self) -> None:
        if not (self.how in (None, "drop", "hash") or callable(self.how)):
            raise DataError(f'redact must be "drop", "hash", a function from text to text, or None, got {self.how!r}')

    def text(self, words: str | None) -> str | None:
        """What is kept of a text; None where that is nothing, also where the user's function failed."""
        if words is None or self.how == "drop":
            return None
        if self.how is None:
            return writable(words)
        if self.how == "hash":
            return sha256(words.encode("utf-8", "replace")).hexdigest()
        try:
            with boundary("redact"):
                kept = self.how(words)
        except TierError as error:
            # the message may quote the text
            logger.warning("redact failed with %s: the text is not kept", type(error.__cause__).__name__)
            return None
        return writable(kept) if isinstance(kept, str) else None

    def message(self, given: Mapping[str, str]) -> dict[str, str] | None:
        """What is kept of a message: its role, and of its words what `text` keeps; None where that is nothing."""
        content = self.text(str(given.get("content", "")))
        if content is None:
            return None
        # whatever else a message holds may quote the user
        others = {name: writable(str(value)) for name, value in given.items()} if self.how is None else {}
        return {**others, "role": writable(str(given.get("role", "user"))), "content": content}

    def error(self, words: str | None) -> str | None:
        """What is kept of an error, which may quote the query: its type, where no text is kept."""
        if words is None or self.how is None:
            return None if words is None else writable(words)
        kind = _TYPE_OF_ERROR.match(words)
        named = kind.group() if kind else "error"
        return named if self.how in ("drop", "hash") else self.text(words) or named

    def reason(self, words: str) -> str:
        """What is kept of why a decision was made; what stands in parentheses may quote an error."""
        return writable(words if self.how is None else words.split(" (")[0])


def writable(words: str) -> str:
    """Without what PostgreSQL or UTF-8 cannot hold."""
    return words.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
