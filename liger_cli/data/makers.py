"""Make rows of ids and labels out of the records of one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liger_cli.config.datasets import DatasetEntry
from liger_cli.data.cache import Counts
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.class_formats import Classes
from liger_cli.data.encode import IGNORED, WEIGHTED, WEIGHTS, Encoder
from liger_cli.data.images import ImagesFound
from liger_cli.data.rows import Record, Row, RowFormat, only_last
from liger_cli.data.thoughts import Reasoning
from liger_cli.data.used import count_names
from liger_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["TOO_SHORT", "RowMaker", "RowOptions", "ids_table"]

TOO_SHORT = "rows left out: fewer tokens than min_length"


@dataclass(frozen=True)
class RowOptions:
    """Settings that determine the ids and labels of a row, with its content and the tokenizer.

    Args:
        max_length: Longer rows are cut to this many tokens.
        vocab_size: Of the model; a token id beyond it is an error.
        completion_only: Of a prompt and its completion only the completion is trained.
        assistant_only: Of a conversation only what the assistant says is trained.
        min_length: Rows of fewer tokens are left out.
        last_only: Of several answers only the last is trained.
        enable_thinking: As ChatRenderer has it.
        reasoning: The same.
        as_stream: The texts are one stream of tokens, in rows of max_length.
        pairs: Rows are pairs of a chosen and a rejected answer.
        unpaired: Rows are answers labelled as good or bad.
        distills: A teacher computes the distributions that are learned, and none is stored.
        classes: Rows are texts with a label, which is one of these; None: they are not.
    """

    max_length: int
    vocab_size: int
    completion_only: bool = True
    assistant_only: bool = True
    min_length: int = 0
    last_only: bool = False
    enable_thinking: bool | None = None
    reasoning: Reasoning | None = None
    as_stream: bool = False
    pairs: bool = False
    unpaired: bool = False
    distills: bool = False
    classes: Classes | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; at least 2, since a token predicts the next"
            )

    @property
    def compares_answers(self) -> bool:
        """Whether answers are compared, in pairs or not."""
        return self.pairs or self.unpaired


@dataclass(frozen=True)
class RowMaker:
    """Make rows of ids and labels out of the records of one source."""

    form: RowFormat
    encoder: Encoder
    renderer: ChatRenderer
    options: RowOptions
    entry: DatasetEntry

    def __call__(self, records: Sequence[Record]) -> tuple[pyarrow.Table, Counts]:
        """Return a table of the rows that have a token to train on, and the counts of records.

        The column of weights is null in rows without.
        """
        import pyarrow

        rows = [self.row(record) for record in records]
        for row in rows:
            if row.images:
                raise ImagesFound(row.where)
        counts = Counts()
        count_names(counts, rows, self.renderer)
        kept: list[tuple[list[int], list[int], list[float] | None]] = []
        max_length = None if self.options.as_stream else self.options.max_length
        for row, encoded in zip(rows, self.encoder.encode(rows, self.renderer), strict=True):
            ids, labels = encoded.input_ids[:max_length], encoded.labels[:max_length]
            num_trained = sum(label != IGNORED for label in labels)
            if len(ids) < self.options.min_length:
                counts.add_left_out({TOO_SHORT: 1})
                continue
            if not num_trained:
                counts.dropped_rows += 1
                continue
            self.encoder.check_vocabulary(ids, row.where, self.options.vocab_size)
            weights = None if encoded.weights is None else encoded.weights[:max_length]
            if weights is not None:
                self._check_weighted(row)
                counts.add_left_out({WEIGHTED: 1})
            kept.append((ids, labels, weights))
            counts.rows += 1
            counts.tokens += len(ids)
            counts.trained_tokens += num_trained
            counts.truncated_rows += len(encoded.input_ids) > len(ids)
            counts.add_left_out(encoded.left_out)
        table = ids_table(
            {"input_ids": [ids for ids, *_ in kept], "labels": [labels for _, labels, _ in kept]}
        )
        kind = pyarrow.list_(pyarrow.float32())
        column = pyarrow.array([weights for *_, weights in kept], kind)
        return table.append_column(WEIGHTS, column), counts

    def _check_weighted(self, row: Row) -> None:
        if self.options.as_stream:
            raise DataError(
                f"{row.where}: the weight of the row is {row.weight:g}, and text_mode stream joins "
                "all texts",
                hint="text_mode document keeps them apart",
            )

    def row(self, record: Record) -> Row:
        """Return the checked row of a record.

        Raises:
            DataError: As RowFormat.row.
        """
        row = self.form.row(record)
        return only_last(row) if self.options.last_only and row.messages else row


def ids_table(columns: Mapping[str, list[list[int]]]) -> pyarrow.Table:
    """Return columns of token ids and labels as a table of 32-bit integers."""
    import pyarrow

    kind = pyarrow.list_(pyarrow.int32())
    return pyarrow.table({name: pyarrow.array(ids, kind) for name, ids in columns.items()})
