"""Texts as one stream of tokens, cut into rows of one length.

The texts follow each other, each with the token that ends a text, and a row begins wherever the row
before it was full. So nothing is cut off and nothing is padding but in the last row. Attention is
not kept within a text, as in most pre-training.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from liger_cli.data.cache import Counts
from liger_cli.data.encode import IGNORED

if TYPE_CHECKING:
    import pyarrow

__all__ = ["join_texts"]

# Rows of a table.
_ROWS = 1000


def join_texts(
    tables: Iterable[tuple[pyarrow.Table, Counts]], max_length: int
) -> Iterator[tuple[pyarrow.Table, Counts]]:
    """Yield the rows of texts that were tokenized whole.

    Args:
        tables: Of the texts in their order, with the counts of their records.
        max_length: Tokens of a row; the last row may have fewer.
    """
    rest: list[int] = []
    for table, counts in tables:
        for ids in table.column("input_ids").to_pylist():
            rest += ids
        size = len(rest) - len(rest) % max_length
        yield _rows(rest[:size], counts, max_length)
        rest = rest[size:]
    # A token alone has nothing to predict.
    yield _rows(rest if len(rest) > 1 else [], Counts(), max_length)


def _rows(ids: list[int], counts: Counts, max_length: int) -> tuple[pyarrow.Table, Counts]:
    import pyarrow

    rows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    labels = [[IGNORED, *row[1:]] for row in rows]
    num_rows = {"rows": len(rows), "tokens": len(ids), "trained_tokens": len(ids) - len(rows)}
    column = pyarrow.list_(pyarrow.int32())
    table = pyarrow.table(
        {"input_ids": pyarrow.array(rows, column), "labels": pyarrow.array(labels, column)}
    )
    return table, Counts(**{**asdict(counts), **num_rows, "truncated_rows": 0})
