"""Token ids of text that is trained in parts, so that a part begins and ends between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from liger_cli.data.chat import ChatRenderer, Segment
from liger_cli.data.rows import Row
from liger_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "Encoder", "in_context"]

IGNORED = -100


class Encoded(NamedTuple):
    """A row as a model takes it; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Encoder:
    """Tokenises rows and labels what is trained.

    Args:
        tokenizer: Any; character offsets are not needed, which some give without leading spaces.
        completion_only: Of a prompt and its completion only the completion is trained.
        assistant_only: Of a conversation only what the assistant says is trained.
    """

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool = True
    assistant_only: bool = True

    def encode(self, rows: Sequence[Row], renderer: ChatRenderer) -> list[Encoded]:
        """Returns ids and labels of each row; a row with nothing to train on has no label."""
        segments = [self.segments(row, renderer) for row in rows]
        return [
            self._label(row, cut, pieces)
            for row, cut, pieces in zip(rows, segments, self._tokenise(segments), strict=True)
        ]

    def _label(self, row: Row, segments: list[Segment], pieces: list[list[int]]) -> Encoded:
        ids, labels = [], []
        # A template writes the marks of begin and end itself.
        is_plain = not self._is_conversation(row)
        if (
            is_plain
            and self._begin
            and (not pieces or pieces[0][: len(self._begin)] != self._begin)
        ):
            ids, labels = list(self._begin), [IGNORED] * len(self._begin)
        for segment, piece in zip(segments, pieces, strict=True):
            ids += piece
            labels += piece if segment.is_trained else [IGNORED] * len(piece)
        end = self.tokenizer.eos_token_id
        # An end alone is nothing to learn from: a row without a trained segment stays so.
        if is_plain and end is not None and segments and segments[-1].is_trained and ids[-1] != end:
            ids.append(end)
            labels.append(end)
        labels[:1] = [IGNORED] * len(labels[:1])
        return Encoded(ids, labels)

    def segments(self, row: Row, renderer: ChatRenderer) -> list[Segment]:
        """Returns the text of a row, cut where what is trained begins and ends."""
        if self._is_conversation(row):
            cut = renderer.with_tools(row.tools).segments(row.messages, row.where)
            return cut if self.assistant_only else [Segment(text, True) for text, _ in cut]
        *untrained, trained = row.parts
        parts = [Segment(text, not self.completion_only) for text in untrained]
        return [segment for segment in [*parts, Segment(trained, True)] if segment.text]

    def _is_conversation(self, row: Row) -> bool:
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        return bool(row.messages) and (has_template or not row.parts)

    @cached_property
    def _begin(self) -> list[int]:
        """What the tokenizer puts before a text."""
        plain = self._ids(["a"])[0]
        full = self.tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return list(full[:start])
        return []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # Masks would be lists of Python integers too, and take as long to make as the ids.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def check_vocabulary(self, ids: Sequence[int], where: str, vocab_size: int) -> None:
        """Raises a DataError for a token that the model does not have."""
        if (token := max(ids)) >= vocab_size:
            word = self.tokenizer.convert_ids_to_tokens(token)
            raise DataError(
                f"{where}: token {token} ({word!r}) is outside the model's vocabulary of "
                f"{vocab_size}",
                hint="the tokenizer is not this model's, or has tokens that were added to it alone",
            )

    def _tokenise(self, rows: list[list[Segment]]) -> list[list[list[int]]]:
        """Returns the ids of each segment of each row."""
        whole = self._ids(["".join(segment.text for segment in row) for row in rows])
        pieces = iter(self._ids([segment.text for row in rows for segment in row]))
        result = []
        for row, ids in zip(rows, whole, strict=True):
            alone = [next(pieces) for _ in row]
            # The usual case, and the cheap one: alone they tokenise as they do in the whole.
            is_same = list(chain.from_iterable(alone)) == ids
            result.append(alone if is_same else self._in_context(row))
        return result

    def _in_context(self, row: list[Segment]) -> list[list[int]]:
        def ids_of(start: int, stop: int) -> list[int]:
            return self._ids(["".join(segment.text for segment in row[start:stop])])[0]

        return in_context(len(row), ids_of)


def in_context(num_segments: int, ids_of: Callable[[int, int], list[int]]) -> list[list[int]]:
    """Returns the ids of segments that depend on what is before them.

    The tokens of a segment are those that it adds to the text before it. Where it would change
    tokens of that text, a token crosses the border: then the segment is tokenised by itself, as it
    is when a model writes it after the prompt.

    Args:
        ids_of: Returns the ids of the segments from one number to another, as one text.
    """
    result: list[list[int]] = []
    start, ids = 0, list[int]()
    for number in range(num_segments):
        longer = ids_of(start, number + 1)
        if longer[: len(ids)] == ids:
            result.append(longer[len(ids) :])
            ids = longer
        else:
            start, ids = number, ids_of(number, number + 1)
            result.append(ids)
    return result
