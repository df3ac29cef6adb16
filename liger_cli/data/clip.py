"""Cutting long text before it is tokenised, at a place where no token can cross.

A tokenizer takes some 100 bytes of memory for each character, so a row of which max_length tokens
are kept is cut first. It is cut between a letter and a space or a mark of punctuation, and only
where no token of the vocabulary has the two in it: then the tokens before the cut are those of the
whole text. A text without such a place is not cut.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextClipper"]

# What may follow a letter. No apostrophe: "it's" is one word to many tokenizers.
_AFTER = " \t\n,.;:!?)\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a\uff09\u300d"
_LETTER = r"[^\W\d_]"
_MIN_CHARS = 10_000
_CHARS_A_TOKEN = 16


@dataclass(frozen=True)
class TextClipper:
    """Find where long texts can be cut.

    Args:
        tokenizer: One in Rust; the texts of others are not cut.
        max_length: Tokens that are kept of a text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    @property
    def first_size(self) -> int:
        """Characters that are worth a cut; a text of fewer is tokenised whole."""
        return max(_MIN_CHARS, _CHARS_A_TOKEN * self.max_length)

    def clip(self, texts: Sequence[str], size: int) -> list[str] | None:
        """Return the first texts, together of `size` characters or some more.

        None where they are not longer than that, or there is no place to cut them at.
        """
        for number, text in enumerate(texts):
            found = self._border.search(text, size) if size < len(text) else None
            if found is not None:
                return [*texts[:number], text[: found.start()]]
            size = max(size - len(text), 0)
        return None

    @cached_property
    def _border(self) -> re.Pattern[str]:
        """Match between a letter and a character that follows one in no token."""
        if not getattr(self.tokenizer, "is_fast", False):
            return re.compile("(?!)")
        vocabulary = self.tokenizer.get_vocab()
        words = "\0".join((*vocabulary, *map(_bytes_as_text, vocabulary))).replace("\u2581", " ")
        after = set(re.findall(f"{_LETTER}([{re.escape(_AFTER)}\ufffd])", words))
        if "\ufffd" in after:
            # The first bytes of a longer character: it may be any of them.
            after |= {char for char in _AFTER if not char.isascii()}
        free = "".join(char for char in _AFTER if char not in after)
        return re.compile(f"(?<={_LETTER})(?=[{re.escape(free)}])" if free else "(?!)")


def _byte_letters() -> dict[str, int]:
    """Return the letters of byte-level tokenizers for bytes: GPT-2's, printable, one a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + i): byte for i, byte in enumerate(rest)}


_BYTES = _byte_letters()


def _bytes_as_text(token: str) -> str:
    """Return the text of a token that is written in letters for bytes; "" for another."""
    try:
        return bytes(_BYTES[letter] for letter in token).decode("utf-8", "replace")
    except KeyError:
        return ""
