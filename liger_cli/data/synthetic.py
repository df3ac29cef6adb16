"""Random tokens, each row exactly max_length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from liger_cli.data.cache import Counts, Tokenised, cached
from liger_cli.data.class_formats import TARGETS, Classes
from liger_cli.data.class_maker import scored_at_end
from liger_cli.data.encode import IGNORED
from liger_cli.data.makers import RowOptions, ids_table
from liger_cli.data.pair_formats import ANSWERS, DESIRABLE
from liger_cli.data.unpaired_maker import GOOD

if TYPE_CHECKING:
    import pyarrow

__all__ = ["make_synthetic"]

_NUM_ROWS = {"train": 1024, "eval": 64}
# Rows that are longer than 32 768 tokens are fewer, so that they are drawn in seconds.
_MOST_TOKENS, _LEAST_ROWS = 1 << 25, 16


def make_synthetic(split: str, options: RowOptions, seed: int) -> Tokenised:
    """Return random rows; the first half of answers is their prompt, and every other is good."""
    length = options.max_length
    num_rows = min(_NUM_ROWS[split], max(_LEAST_ROWS, _MOST_TOKENS // length))
    # Even and odd: no seed gives the rows of one split as those of the other.
    generator = torch.Generator().manual_seed(2 * seed + (split == "eval"))

    def draw(num_tokens: int) -> torch.Tensor:
        return torch.randint(options.vocab_size, (num_rows, num_tokens), generator=generator)

    num_prompt = length // 2 if options.compares_answers else 0
    prompt = draw(num_prompt)
    columns: dict[str, list[list[int]]] = {}
    for prefix in (f"{answer}_" for answer in ANSWERS) if options.pairs else ("",):
        ids = torch.cat((prompt, draw(length - num_prompt)), dim=1)
        labels = ids.clone()
        labels[:, : max(1, num_prompt)] = IGNORED
        columns |= {f"{prefix}input_ids": ids.tolist(), f"{prefix}labels": labels.tolist()}
    num_answers = len(columns) // 2
    counts = Counts(
        num_rows,
        tokens=num_answers * num_rows * length,
        trained_tokens=num_answers * num_rows * (length - max(1, num_prompt)),
    )
    table = ids_table(columns)
    if options.unpaired:
        table = _with_labels(table, counts)
    if (classes := options.classes) is not None:
        table, counts = _with_targets(table, classes, length, generator)
    return cached({}, lambda: [(table, counts)], keep=False)


def _with_labels(table: pyarrow.Table, counts: Counts) -> pyarrow.Table:
    """Return answers of which every other is good, from the first, and count both kinds."""
    import pyarrow

    num_rows = len(table)
    num_bad = num_rows // 2
    counts.add_left_out({GOOD[True]: num_rows - num_bad, GOOD[False]: num_bad})
    is_good = pyarrow.array([1 - row % 2 for row in range(num_rows)], pyarrow.int8())
    return table.append_column(DESIRABLE, is_good)


def _with_targets(
    table: pyarrow.Table, classes: Classes, length: int, generator: torch.Generator
) -> tuple[pyarrow.Table, Counts]:
    """Return random rows with random targets, scored at their last tokens, and their counts."""
    import pyarrow

    num_rows, num_classes = len(table), len(classes.names)
    if classes.is_multi:
        targets = torch.randint(2, (num_rows, num_classes), generator=generator)
    else:
        targets = torch.randint(num_classes, (num_rows, 1), generator=generator)
    kind = pyarrow.list_(pyarrow.float32())
    labels = pyarrow.array([scored_at_end(length)] * num_rows, table.schema.field("labels").type)
    table = table.set_column(table.column_names.index("labels"), "labels", labels)
    table = table.append_column(TARGETS, pyarrow.array(targets.float().tolist(), kind))
    return table, Counts(num_rows, tokens=num_rows * length, trained_tokens=num_rows)
