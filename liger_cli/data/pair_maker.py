"""Make tokenised pairs out of the records of one source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from liger_cli.config.datasets import DatasetEntry
from liger_cli.data.cache import Counts
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.encode import IGNORED, Encoded, Encoder
from liger_cli.data.makers import TOO_SHORT, RowOptions, ids_table
from liger_cli.data.pair_formats import ANSWERS, Pair, PairFormat
from liger_cli.data.rows import Record, Row, only_last
from liger_cli.data.used import count_names
from liger_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["SAME", "SAME_CUT", "PairMaker", "check_figures", "refuse_same_answers"]

SAME = "pairs left out: chosen and rejected are the same"
SAME_CUT = "pairs left out: chosen and rejected are the same within max_length"
_COLUMNS = tuple(f"{answer}_{name}" for answer in ANSWERS for name in ("input_ids", "labels"))


@dataclass(frozen=True)
class PairMaker:
    """Tokenize both answers of each record as sft tokenizes a row."""

    form: PairFormat
    encoder: Encoder
    renderer: ChatRenderer
    options: RowOptions
    entry: DatasetEntry

    def __call__(self, records: Sequence[Record]) -> tuple[pyarrow.Table, Counts]:
        """Return a table of the pairs that can be compared, and the counts of records."""
        import pyarrow

        pairs = [self.form.pair(record) for record in records]
        rows = [only_last(row) if self._keeps_last(row) else row for p in pairs for row in p.rows]
        counts = Counts()
        count_names(counts, rows, self.renderer)
        encoded = self.encoder.encode(rows, self.renderer)
        columns: dict[str, list[list[int]]] = {name: [] for name in _COLUMNS}
        figures: dict[str, list[float]] = {name: [] for name in self.form.figures}
        for pair, chosen, rejected in zip(pairs, encoded[::2], encoded[1::2], strict=True):
            kept = self._kept(pair, (chosen, rejected), counts)
            for name, ids in zip(_COLUMNS, kept, strict=False):
                columns[name].append(ids)
            for name, value in zip(figures, pair.figures, strict=True) if kept else ():
                figures[name].append(value)
        table = ids_table(columns)
        for name, values in figures.items():
            table = table.append_column(name, pyarrow.array(values, pyarrow.float64()))
        return table, counts

    def _keeps_last(self, row: Row) -> bool:
        return self.options.last_only and bool(row.messages)

    def _kept(self, pair: Pair, encoded: tuple[Encoded, ...], counts: Counts) -> list[list[int]]:
        """Return the columns of a pair, which is counted; none where it is left out."""
        if any(one.weights is not None for one in encoded):
            raise DataError(f"{pair.chosen.where}: pairs have no loss weights but 0 and 1")
        size = self.options.max_length
        cut = [values[:size] for one in encoded for values in (one.input_ids, one.labels)]
        answers = [(cut[0], cut[1]), (cut[2], cut[3])]
        num_trained = [sum(label != IGNORED for label in labels) for _, labels in answers]
        if min(len(ids) for ids, _ in answers) < self.options.min_length:
            counts.add_left_out({TOO_SHORT: 1})
        elif pair.is_same:
            counts.add_left_out({SAME: 1})
        elif not all(num_trained):
            # Of no token the log-probability is 0, and its mean is 0/0.
            counts.dropped_rows += 1
        elif answers[0] == answers[1]:
            counts.add_left_out({SAME_CUT: 1})
        else:
            for ids, _ in answers:
                self.encoder.check_vocabulary(ids, pair.chosen.where, self.options.vocab_size)
            counts.rows += 1
            counts.tokens += sum(len(ids) for ids, _ in answers)
            counts.trained_tokens += sum(num_trained)
            counts.truncated_rows += any(len(one.input_ids) > size for one in encoded)
            # What is left out of the prompt is left out of both.
            counts.add_left_out(Counter(encoded[0].left_out) | Counter(encoded[1].left_out))
            return cut
        return []


def check_figures(sources: Sequence[tuple[str, tuple[str, ...]]]) -> None:
    """Check that all sources of pairs have the same figures, each given with its name.

    Raises:
        DataError: One lacks a figure that another has.
    """
    for name, figures in sources[1:]:
        first, others = sources[0]
        if odd := set(figures) ^ set(others):
            has, lacks = (name, first) if odd & set(figures) else (first, name)
            raise DataError(
                f"{has} has {', '.join(sorted(odd))}, and {lacks} has not; all datasets of a run "
                "have it, or none"
            )


def refuse_same_answers(
    name: str, counts: Counts, max_length: int, at_least: int = 1, *, rows_per_pair: int = 1
) -> None:
    """Refuse data in which more than half of the pairs have the same answer twice.

    Args:
        at_least: Pairs that must have been read for that.
        rows_per_pair: Two where both answers of a pair are counted.

    Raises:
        DataError: They do.
    """
    same, same_cut = counts.left_out.get(SAME, 0), counts.left_out.get(SAME_CUT, 0)
    num_read = (counts.rows + counts.dropped_rows) // rows_per_pair + same + same_cut
    if num_read >= at_least and 2 * (same + same_cut) > num_read:
        raise DataError(
            f"{name}: in {same + same_cut} of {num_read} pairs chosen and rejected are the same"
            + (
                f", in {same_cut} of these within the first {max_length} tokens (max_length)"
                if same_cut
                else ""
            ),
            hint="columns names the columns of the answers; a larger max_length shows more of them",
        )
