"""Token ids and labels of rows.

A conversation has the ids of its rendered text. A prompt and its completion are tokenised so that
the completion begins between two tokens, as it does when a model writes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from liger_cli.data.answers import EMPTY, answer_weights, num_empty_answers
from liger_cli.data.borders import TokenBorders
from liger_cli.data.chat import ChatRenderer, Conversation
from liger_cli.data.clip import TextClipper
from liger_cli.data.rows import Row
from liger_cli.data.template import Span
from liger_cli.errors import DataError, ExtensionPanic, panics_raised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "WEIGHTED", "WEIGHTS", "Encoded", "Encoder", "default_weights", "labels_of"]

IGNORED = -100
# The column of the weights of tokens, where some are neither 0 nor 1.
WEIGHTS = "label_weights"
# Rows that have it, by their name in reports.
WEIGHTED = "rows whose loss has a weight other than 0 and 1"


class Encoded(NamedTuple):
    """A row as a model takes it; both lists have the same length.

    Args:
        left_out: What of a conversation is not trained although it was said, by its name.
        weights: Of the tokens, times which their loss counts; 0 where there is no label. None
            where all labels have 1.
    """

    input_ids: list[int]
    labels: list[int]
    left_out: Mapping[str, int] = MappingProxyType({})
    weights: list[float] | None = None


class Segment(NamedTuple):
    """A piece of text, and whether it is trained on."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class Encoder:
    """Tokenize rows and labels what is trained.

    Args:
        tokenizer: Any; character offsets are used where it has them.
        completion_only: Of a prompt and its completion only the completion is trained.
        assistant_only: Of a conversation only what the assistant says is trained.
        max_length: Tokens that are kept of a row; of a longer one the rest may be missing.
    """

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool = True
    assistant_only: bool = True
    max_length: int | None = None

    def encode(self, rows: Sequence[Row], renderer: ChatRenderer) -> list[Encoded]:
        """Return ids and labels of each row; a row with nothing to train on has no label.

        Raises:
            DataError: The tokenizer gives up on a row, as one does whose pattern explodes.
        """
        try:
            with panics_raised():
                return self._encode(rows, renderer)
        except ExtensionPanic as error:
            # The rows go to the tokenizer together; one by one they show whose text it was.
            for row in rows if len(rows) > 1 else ():
                self.encode([row], renderer)
            raise DataError(
                f"{rows[0].where}: the tokenizer fails on this text: {error}"
            ) from error

    def _encode(self, rows: Sequence[Row], renderer: ChatRenderer) -> list[Encoded]:
        kinds = [self._kind(row) for row in rows]

        def of_kind(kind: str) -> list[Row]:
            return [row for row, one in zip(rows, kinds, strict=True) if one == kind]

        segments = [self._clipped(self._segments(row)) for row in of_kind("text")]
        made: dict[str, Iterator[Encoded]] = {
            "conversation": iter(self._encode_conversations(of_kind("conversation"), renderer)),
            "text": map(self._label, segments, self._tokenise(segments)),
            "token ids": map(_encoded_ids, of_kind("token ids")),
        }
        return [
            _with_weight(next(made[kind]), row.weight)
            for row, kind in zip(rows, kinds, strict=True)
        ]

    def _encode_conversations(self, rows: Sequence[Row], renderer: ChatRenderer) -> list[Encoded]:
        found = [self._clipped_chat(self.conversation(row, renderer)) for row in rows]
        has_offsets = self.assistant_only and self.tokenizer.is_fast
        encoded = self._tokens([chat.text for chat in found], offsets=has_offsets)
        offsets = encoded["offset_mapping"] if has_offsets and found else [()] * len(found)
        return [
            self._label_conversation(row, chat, ids, places)
            for row, chat, ids, places in zip(
                rows, found, encoded["input_ids"], offsets, strict=True
            )
        ]

    def conversation(self, row: Row, renderer: ChatRenderer) -> Conversation:
        """Return a row as the template renders it, and what of it is trained.

        Raises:
            DataError: The template does not show what is said, or a mark cannot be honoured.
        """

        def rendered(assistant_only: bool) -> Conversation:
            return renderer.conversation(
                row.messages, row.tools, row.where, assistant_only=assistant_only
            )

        chat = rendered(self.assistant_only)
        if num_empty := num_empty_answers(row):
            chat = chat._replace(left_out=chat.left_out + Counter({EMPTY: num_empty}))
        if not row.is_trained:
            return chat._replace(trained=())
        has_prompt = self.completion_only and row.num_prompt > 0
        row = _without_prompt(row) if has_prompt else row
        if not has_prompt and not any(mark is not None for mark in row.marks):
            return chat
        answers = chat.trained if self.assistant_only else rendered(True).trained
        shown = [chat.text[begin:end] for begin, end in answers]
        row = replace(row, messages=chat.messages)
        weights = answer_weights(shown, row, assistant_only=self.assistant_only)
        pairs = zip(answers, weights, strict=True)
        chat = chat._replace(weights=tuple(pair for pair in pairs if pair[1] not in (0, 1)))
        kept = [weight > 0 for weight in weights]
        if self.assistant_only:
            return chat._replace(
                trained=tuple(span for span, keeps in zip(answers, kept, strict=True) if keeps)
            )
        dropped = [span for span, keeps in zip(answers, kept, strict=True) if not keeps]
        if has_prompt:
            # A completion begins with an answer.
            first = next((span for span, keeps in zip(answers, kept, strict=True) if keeps), None)
            begin = len(chat.text) if first is None else first[0]
            dropped = [(0, begin), *(span for span in dropped if span[0] >= begin)]
        return chat._replace(trained=tuple(_outside(dropped, len(chat.text))))

    def _label_conversation(
        self, row: Row, chat: Conversation, ids: list[int], offsets: Sequence[Span]
    ) -> Encoded:
        def ids_before(place: int) -> list[int]:
            return self._ids([chat.text[:place]])[0]

        borders = TokenBorders(chat.text, ids, ids_before, self.decode, row.where, offsets)
        labels = labels_of(ids, chat.trained, borders)
        weights = None
        if chat.weights:
            weights = default_weights(labels)
            for span, weight in chat.weights:
                first, end = borders.tokens(span)
                weights[first:end] = [weight * known for known in weights[first:end]]
        return Encoded(ids, labels, chat.left_out, weights)

    def _clipped_chat(self, chat: Conversation) -> Conversation:
        """Return the beginning of a long conversation, which has more than max_length tokens."""
        [first] = self._clipped([Segment(chat.text, True)]) if chat.text else [Segment("", True)]
        if (end := len(first.text)) == len(chat.text):
            return chat
        trained = tuple((begin, min(last, end)) for begin, last in chat.trained if begin < end)
        weights = tuple(
            ((begin, min(last, end)), weight)
            for (begin, last), weight in chat.weights
            if begin < end
        )
        return chat._replace(text=first.text, trained=trained, weights=weights)

    def _clipped(self, segments: list[Segment]) -> list[Segment]:
        """Return the first segments of a long row, which have more than max_length tokens."""
        if self.max_length is None:
            return segments
        size = self._clipper.first_size
        texts = [segment.text for segment in segments]
        while (first := self._clipper.clip(texts, size)) is not None:
            cut = [
                segment._replace(text=text) for segment, text in zip(segments, first, strict=False)
            ]
            if sum(map(len, self._tokenise([cut])[0])) > self.max_length:
                return cut
            size *= 4
        return segments

    @cached_property
    def _clipper(self) -> TextClipper:
        return TextClipper(self.tokenizer, self.max_length or 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids as it was before they were made."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def _label(self, segments: list[Segment], pieces: list[list[int]]) -> Encoded:
        ids, labels = [], []
        if self._begin and (not pieces or pieces[0][: len(self._begin)] != self._begin):
            ids, labels = list(self._begin), [IGNORED] * len(self._begin)
        for segment, piece in zip(segments, pieces, strict=True):
            ids += piece
            labels += piece if segment.is_trained else [IGNORED] * len(piece)
        end = self.tokenizer.eos_token_id
        # An end alone is nothing to learn from: a row without a trained segment stays so.
        if end is not None and segments and segments[-1].is_trained and ids[-1] != end:
            ids.append(end)
            labels.append(end)
        labels[:1] = [IGNORED] * len(labels[:1])
        return Encoded(ids, labels)

    def _segments(self, row: Row) -> list[Segment]:
        """Return the text of a row, cut where what is trained begins and ends."""
        return [
            Segment(text, is_trained and row.is_trained)
            for text, is_trained in self._parts(row)
            if text
        ]

    def _parts(self, row: Row) -> Iterator[tuple[str, bool]]:
        """Yield the text, or prompts and answers in turns, each with whether it is trained."""
        spoken = zip(row.messages, row.marks, strict=False)
        marks = [mark for message, mark in spoken if message["role"] == "assistant"]
        for i, text in enumerate(row.parts):
            if (len(row.parts) - 1 - i) % 2:
                yield text, not self.completion_only
            else:
                yield text, not marks or marks[i // 2] != 0

    def _kind(self, row: Row) -> str:
        if row.token_ids:
            return "token ids"
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        is_chat = bool(row.messages) and not row.is_text and (has_template or not row.parts)
        return "conversation" if is_chat else "text"

    @cached_property
    def _begin(self) -> list[int]:
        """The ids that the tokenizer puts before a text."""
        plain = self._ids(["a"])[0]
        full = self.tokenizer("a", verbose=False)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return list(full[:start])
        return []

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self._tokens(texts)["input_ids"]

    def _tokens(self, texts: list[str], *, offsets: bool = False) -> Mapping[str, Any]:
        if not texts:
            return {"input_ids": []}
        # Masks would be lists of Python integers too, and take as long to make as the ids.
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )

    def check_vocabulary(self, ids: Sequence[int], where: str, vocab_size: int) -> None:
        """Raise a DataError for a token that the model does not have."""
        if (token := max(ids)) >= vocab_size:
            word = self.tokenizer.convert_ids_to_tokens(token)
            raise DataError(
                f"{where}: token {token} ({word!r}) is outside the model's vocabulary of "
                f"{vocab_size}",
                hint="the tokenizer is not this model's, or has tokens that were added to it alone",
            )

    def _tokenise(self, rows: list[list[Segment]]) -> list[list[list[int]]]:
        """Return the ids of each segment of each row."""
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
        """Return the ids of segments that depend on what is before them.

        The tokens of a segment are those that it adds to the text before it. Where it would change
        tokens of that text, a token crosses the border: then the segment is tokenised by itself, as
        it is when a model writes it after the prompt.
        """
        result: list[list[int]] = []
        start, ids = 0, list[int]()
        for number in range(len(row)):
            text = "".join(segment.text for segment in row[start : number + 1])
            [longer] = self._ids([text])
            if longer[: len(ids)] == ids:
                result.append(longer[len(ids) :])
                ids = longer
            else:
                start, [ids] = number, self._ids([row[number].text])
                result.append(ids)
        return result


def default_weights(labels: Sequence[int]) -> list[float]:
    """Return the weights of tokens whose labels are given: 1, and 0 where there is no label."""
    return [float(label != IGNORED) for label in labels]


def _with_weight(encoded: Encoded, weight: float) -> Encoded:
    """Return a row with the weight of the whole row, which is not 0, times those of its tokens."""
    known = encoded.weights
    if weight in (0, 1) and known is None:
        return encoded
    known = default_weights(encoded.labels) if known is None else known
    weights = [weight * one for one in known]
    return encoded._replace(weights=None if {*weights} <= {0, 1} else weights)


def _encoded_ids(row: Row) -> Encoded:
    """Return a row that is token ids already."""
    labels = list(row.labels) if row.is_trained else [IGNORED] * len(row.labels)
    return Encoded(list(row.token_ids), labels)


def _without_prompt(row: Row) -> Row:
    """Return a row whose answers in the prompt are marked not to be trained."""
    marks = (
        0.0 if i < row.num_prompt and message["role"] == "assistant" else mark
        for i, (message, mark) in enumerate(zip(row.messages, row.marks, strict=True))
    )
    return replace(row, marks=tuple(marks))


def _outside(spans: Sequence[Span], end: int) -> Iterator[Span]:
    """Yield what of a text of `end` characters is in none of the spans, which are in order."""
    begin = 0
    for first, last in spans:
        if begin < first:
            yield begin, first
        begin = last
    if begin < end:
        yield begin, end


def labels_of(ids: Sequence[int], trained: Sequence[Span], borders: TokenBorders) -> list[int]:
    """Return the labels of a text: the ids of the tokens that hold a trained character."""
    labels = [IGNORED] * len(ids)
    for span in trained:
        first, end = borders.tokens(span)
        labels[first:end] = ids[first:end]
    labels[:1] = [IGNORED] * len(labels[:1])
    return labels
