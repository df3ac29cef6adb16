"""Find the tokens that hold a piece of a text."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from liger_cli.data.template import Span
from liger_cli.errors import DataError

__all__ = ["TokenBorders"]

# How many characters from a border the nearest place between two tokens is looked for.
_REACH = 64


@dataclass(frozen=True)
class TokenBorders:
    """The borders between the tokens of one text.

    Args:
        text: That the tokens are of.
        ids: Of the whole text.
        ids_before: Returns the ids of the text up to a place.
        decode: Returns the text of a few ids.
        where: Names the row in an error.
        offsets: The characters of each token, where the tokenizer gives them. White space at
            either side of a token may be missing from them.
    """

    text: str
    ids: Sequence[int]
    ids_before: Callable[[int], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    where: str
    offsets: Sequence[Span] = ()

    def tokens(self, span: Span) -> Span:
        """Return the first token that holds a character of a span, and the one behind the last.

        Raises:
            DataError: The tokenizer gives no offsets, and prefixes of the text do not show them.
        """
        begin, end = span
        if begin >= end:
            return 0, 0
        first = self._first(begin) if begin else 0
        return first, self._last(end - 1) + 1 if end < len(self.text) else len(self.ids)

    def _first(self, place: int) -> int:
        begins, ends = self._sides
        token = bisect_right(ends, place)
        is_sure = token < len(begins) and begins[token] <= place
        if is_sure:
            return token
        number, near = self._near(place)
        return number + next(i for i, (_, end) in enumerate(near) if end > place)

    def _last(self, place: int) -> int:
        begins, ends = self._sides
        token = bisect_left(begins, place + 1) - 1
        is_sure = token >= 0 and ends[token] > place
        if is_sure:
            return token
        number, near = self._near(place)
        return number + max(i for i, (begin, _) in enumerate(near) if begin <= place)

    @cached_property
    def _sides(self) -> tuple[list[int], list[int]]:
        return [begin for begin, _ in self.offsets], [end for _, end in self.offsets]

    def _near(self, place: int) -> tuple[int, list[Span]]:
        """Return the number of the first token around a character, and the characters of each.

        The tokens of a prefix of the text that are the first of the whole text end where it does.
        """
        places = ((place - i, place + 1 + i) for i in range(_REACH))
        before, after = zip(*places, strict=True)
        low, first = next(self._ends_at(before), (0, None))
        high, last = next(self._ends_at(after), (0, None))
        if first is not None and last is not None:
            part, ids = self.text[low:high], self.ids[first:last]
            # A decoder leaves out the space that begins a text.
            shift = 1 if part == " " + self.decode(ids) else 0
            if part[shift:] == self.decode(ids):
                return first, [self._characters(ids, i, low, part, shift) for i in range(len(ids))]
        raise DataError(
            f"{self.where}: the tokenizer gives no characters of its tokens, so those of the text "
            f"to train on, around character {place} of the row, have no sure place",
            hint="use the fast tokenizer of this model (tokenizer.json)",
        )

    def _ends_at(self, places: Sequence[int]) -> Iterator[Span]:
        """Yield each place at which tokens end, and how many end there or before."""
        for place in places:
            if (number := self._tokens_before(place)) is not None:
                yield min(max(place, 0), len(self.text)), number

    def _characters(self, ids: Sequence[int], i: int, low: int, part: str, shift: int) -> Span:
        """Return the characters of a token; the bytes of a character may be in several."""
        begin, whole = (
            len(os.path.commonprefix([self.decode(ids[:n]), part[shift:]])) + shift
            for n in (i, i + 1)
        )
        is_whole = shift + len(self.decode(ids[: i + 1])) == whole
        return low + (begin if i else 0), low + whole + (not is_whole)

    def _tokens_before(self, place: int) -> int | None:
        if place <= 0:
            return 0
        if place >= len(self.text):
            return len(self.ids)
        ids = list(self.ids_before(place))
        return len(ids) if list(self.ids[: len(ids)]) == ids else None
