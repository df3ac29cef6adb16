"""Make tokenised rows with targets out of the records of one source."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from liger_cli.config.datasets import DatasetEntry
from liger_cli.data.cache import Counts
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.class_formats import TARGETS, Classes, ClassFormat, find_classes
from liger_cli.data.encode import IGNORED, Encoder
from liger_cli.data.makers import TOO_SHORT, RowOptions, ids_table
from liger_cli.data.rows import Record
from liger_cli.data.sources import Source, Split, find_sources
from liger_cli.data.used import count_names
from liger_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["ClassMaker", "scan_classes", "scored_at_end"]

EMPTY = "rows left out: the text is empty"


def scored_at_end(length: int) -> list[int]:
    """Return the labels of a row whose last token is scored: 0 there, and nowhere else."""
    return [IGNORED] * (length - 1) + [0]


def scan_classes(
    datasets: Sequence[DatasetEntry], split: Split, num_labels: int | None, names: Sequence[str]
) -> Classes:
    """Return the classes of datasets, all labels of which are read.

    Args:
        num_labels: As find_classes has it.
        names: The same.

    Raises:
        DataError: Labels are no classes, or of another number.
        LigerError: The data cannot be read.
    """
    found = [
        (entry, source)
        for entry, source in find_sources(datasets, split, classes=True)
        if source is not None
    ]
    if not found:
        # Of synthetic data alone.
        return Classes(tuple(names or (f"LABEL_{i}" for i in range(num_labels or 2))))
    return find_classes(_labels(found), num_labels, names)


def _labels(sources: Sequence[tuple[DatasetEntry, Source]]) -> Iterator[tuple[str, Any]]:
    for entry, source in sources:
        form = None
        for record in source.read():
            form = form or ClassFormat.find(record, source.folder, entry.naming)
            row, label = form.labelled(record)
            yield row.where, label
        if form is None:
            raise DataError(f"{source.name} holds no rows")


@dataclass(frozen=True)
class ClassMaker:
    """Tokenize each record as a text that is read and not learned, without an end of the text.

    So a text has the tokens that it has in a program that loads the model, and its last one is
    scored. A row that is too long is cut, and the last token that is left is scored.
    """

    form: ClassFormat
    encoder: Encoder
    renderer: ChatRenderer
    options: RowOptions
    entry: DatasetEntry

    def __call__(self, records: Sequence[Record]) -> tuple[pyarrow.Table, Counts]:
        """Return a table of the rows that have a text, and the counts of records."""
        import pyarrow

        classes = self.options.classes
        assert classes is not None, "they are found first"
        counts = Counts()
        rows, targets = [], []
        for row, label in map(self.form.labelled, records):
            if row.images:
                raise DataError(f"{row.where}: rows with images are not classified")
            if row.has_weights:
                raise DataError(
                    f"{row.where}: rows of classes have no loss weights but 0 and 1",
                    hint="class_weights has a weight for each class",
                )
            targets.append(classes.target(label, row.where))
            rows.append(row)
        count_names(counts, rows, self.renderer)
        unlearned = [replace(row, weight=0.0) for row in rows]
        kept: list[tuple[list[int], list[float]]] = []
        encoded = self.encoder.encode(unlearned, self.renderer)
        for row, target, one in zip(rows, targets, encoded, strict=True):
            ids = one.input_ids[: self.options.max_length]
            if row.parts and not "".join(row.parts).strip():
                counts.add_left_out({EMPTY: 1})
            elif len(ids) < self.options.min_length:
                counts.add_left_out({TOO_SHORT: 1})
            elif not (ids and row.is_trained):
                counts.dropped_rows += 1
            else:
                self.encoder.check_vocabulary(ids, row.where, self.options.vocab_size)
                kept.append((ids, target))
                counts.rows += 1
                counts.tokens += len(ids)
                counts.trained_tokens += 1
                counts.truncated_rows += len(one.input_ids) > len(ids)
        table = ids_table(
            {
                "input_ids": [ids for ids, _ in kept],
                "labels": [scored_at_end(len(ids)) for ids, _ in kept],
            }
        )
        kind = pyarrow.list_(pyarrow.float32())
        column = pyarrow.array([target for _, target in kept], kind)
        return table.append_column(TARGETS, column), counts
