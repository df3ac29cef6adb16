"""How the ranks of a run hold the parameters of a model: the table and the lines of it."""

from __future__ import annotations

import re
from collections import Counter

from pydantic import BaseModel, ConfigDict

from liger_cli.common.numbers import format_bytes
from liger_cli.report.tables import Table

__all__ = ["LayoutPart", "ParameterRow", "layout_lines", "layout_table"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_COLUMNS = ("parameter", "count", "shape", "dtype", "group", "placement", "a rank", "op")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ParameterRow(_Part):
    """Where the ranks of a run have a parameter.

    Attributes:
        group: The module that it is gathered with; "" of the model itself, None where it is not.
        placement: As torch's DTensor says it.
        bytes_per_rank: Of the largest shard.
        op: That runs in its module, where that is patched.
    """

    name: str
    shape: list[int]
    dtype: str
    group: str | None
    placement: str
    bytes_per_rank: int
    op: str | None = None


class LayoutPart(_Part):
    """How ranks hold the parameters of a model.

    Attributes:
        largest_group: Bytes of the largest group as it is gathered.
    """

    name: str
    why: str
    dp_replicate_size: int
    dp_shard_size: int
    bytes_per_rank: int
    largest_group: int
    parameters: list[ParameterRow]


def layout_table(layout: LayoutPart) -> Table:
    """Return one row a parameter; those of layers that are alike are one, with * for the number."""
    rows = Counter(
        (
            _NUMBER.sub("*", row.name),
            " x ".join(map(str, row.shape)),
            row.dtype,
            "" if row.group is None else _NUMBER.sub("*", row.group) or "(model)",
            row.placement,
            format_bytes(row.bytes_per_rank),
            row.op or "",
        )
        for row in layout.parameters
    )
    lines = [
        (name, f"x{count}" if count > 1 else "", *others) for (name, *others), count in rows.items()
    ]
    return Table.with_used_columns("Parameters", _COLUMNS, lines)


def layout_lines(layout: LayoutPart) -> list[str]:
    """Return the layout, why it is this one, and what a rank has of the parameters."""
    lines = [
        f"{layout.name}: {layout.why}",
        f"a rank has {format_bytes(layout.bytes_per_rank)} of the parameters",
    ]
    if layout.dp_shard_size > 1:
        lines[-1] += f"; the largest group is {format_bytes(layout.largest_group)}, gathered"
    return lines
