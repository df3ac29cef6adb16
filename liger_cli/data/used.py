"""Which columns and fields of rows are used, and which are not."""

from __future__ import annotations

from collections.abc import Sequence

from liger_cli.config.datasets import DatasetEntry
from liger_cli.data.cache import Counts
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.rows import Row
from liger_cli.errors import DataError

__all__ = ["check_names", "count_names"]

# Rows that a field is looked for in.
_MAX_ROWS = 20


def count_names(counts: Counts, rows: Sequence[Row], renderer: ChatRenderer) -> None:
    """Add the columns and fields of rows to counts.

    A field of messages that is the template's business is used where a rendering changes without
    it.
    """
    others: dict[str, list[Row]] = {}
    for row in rows:
        counts.add(
            Counts(
                columns=list(row.columns),
                unused_columns=list(row.unused),
                fields=list(row.fields),
                seen=list(row.seen),
            )
        )
        for name in row.others:
            others.setdefault(name, []).append(row)
    for name, having in others.items():
        field = name.rpartition(".")[2]
        if any(_is_shown(field, row, renderer) for row in having[:_MAX_ROWS]):
            counts.add(Counts(fields=[field]))
        else:
            counts.add(Counts(unused_columns=[name]))


def check_names(entry: DatasetEntry, counts: Counts, form: str) -> None:
    """Check that each name that an entry maps is in its data.

    Args:
        counts: Of all rows of the entry.
        form: The format of its rows.

    Raises:
        DataError: One is in no row.
    """
    used = {*counts.columns, *counts.fields, *(set(counts.seen) - set(counts.unused_columns))}
    for key, mapped in (
        ("columns", entry.columns),
        ("message_fields", entry.message_fields),
    ):
        for ours, theirs in (mapped or {}).items():
            if not {f"{theirs} as {ours}", ours if ours == theirs else ""} & used:
                raise DataError(
                    f"{entry.path}: {key}: {ours} is {theirs}, and no row of {form} has a value "
                    "of it that is used"
                )


def _is_shown(field: str, row: Row, renderer: ChatRenderer) -> bool:
    """Return whether the rendering of a row depends on a field of its messages."""
    without = [
        {key: value for key, value in message.items() if key != field} for message in row.messages
    ]
    try:
        return renderer.render(row.messages) != renderer.render(without)
    except DataError:
        # The template asks for it, or refuses the row, which an error says soon.
        return True
