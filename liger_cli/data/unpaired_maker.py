"""Make tokenised answers with labels out of the records of one source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from liger_cli.config.datasets import DatasetEntry
from liger_cli.data.cache import Counts
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.encode import IGNORED, Encoded, Encoder
from liger_cli.data.makers import TOO_SHORT, RowOptions, ids_table
from liger_cli.data.pair_formats import DESIRABLE
from liger_cli.data.pair_maker import SAME, SAME_CUT
from liger_cli.data.rows import Record, only_last
from liger_cli.data.unpaired_formats import LabelledAnswer, UnpairedFormat
from liger_cli.data.used import count_names
from liger_cli.errors import DataError

if TYPE_CHECKING:
    import pyarrow

__all__ = ["GOOD", "UnpairedMaker", "refuse_one_kind"]

# Counted as notes of the data are, by label.
GOOD = {True: "answers labelled true", False: "answers labelled false"}


class _Made(NamedTuple):
    """An answer within max_length, and what of it is not trained."""

    ids: list[int]
    labels: list[int]
    is_good: bool
    is_cut: bool
    left_out: Mapping[str, int]

    @property
    def num_scored(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class UnpairedMaker:
    """Tokenize the answer of each record as sft tokenizes a row, and both of a pair."""

    form: UnpairedFormat
    encoder: Encoder
    renderer: ChatRenderer
    options: RowOptions
    entry: DatasetEntry

    def __call__(self, records: Sequence[Record]) -> tuple[pyarrow.Table, Counts]:
        """Return a table of the answers with a token to score, and the counts of records."""
        import pyarrow

        groups = [self._answers(record) for record in records]
        rows = [answer.row for group in groups for answer in group]
        counts = Counts()
        count_names(counts, rows, self.renderer)
        encoded = iter(self.encoder.encode(rows, self.renderer))
        kept: list[_Made] = []
        for group in groups:
            made = [self._made(answer, next(encoded)) for answer in group]
            if not group:
                counts.add_left_out({SAME: 1})
            elif len(made) > 1 and made[0].num_scored and made[0].ids == made[1].ids:
                counts.add_left_out({SAME_CUT: 1})
            else:
                kept += [one for one in made if self._is_kept(one, counts)]
        table = ids_table(
            {"input_ids": [one.ids for one in kept], "labels": [one.labels for one in kept]}
        )
        # A small integer: as figures of pairs, labels are hashed and collated as numbers.
        is_good = pyarrow.array([int(one.is_good) for one in kept], pyarrow.int8())
        return table.append_column(DESIRABLE, is_good), counts

    def _answers(self, record: Record) -> list[LabelledAnswer]:
        found = self.form.answers(record)
        if not self.options.last_only:
            return found
        return [
            LabelledAnswer(only_last(one.row) if one.row.messages else one.row, one.is_good)
            for one in found
        ]

    def _made(self, answer: LabelledAnswer, encoded: Encoded) -> _Made:
        if encoded.weights is not None:
            raise DataError(
                f"{answer.row.where}: labelled answers have no loss weights but 0 and 1",
                hint="desirable_weight and undesirable_weight weigh all of a kind",
            )
        size = self.options.max_length
        ids, labels = encoded.input_ids[:size], encoded.labels[:size]
        self.encoder.check_vocabulary(ids, answer.row.where, self.options.vocab_size)
        is_cut = len(encoded.input_ids) > size
        return _Made(ids, labels, answer.is_good, is_cut, encoded.left_out)

    def _is_kept(self, made: _Made, counts: Counts) -> bool:
        """Count an answer, and return whether there is something to score."""
        if len(made.ids) < self.options.min_length:
            counts.add_left_out({TOO_SHORT: 1})
            return False
        if not made.num_scored:
            counts.dropped_rows += 1
            return False
        counts.rows += 1
        counts.tokens += len(made.ids)
        counts.trained_tokens += made.num_scored
        counts.truncated_rows += made.is_cut
        counts.add_left_out({**made.left_out, GOOD[made.is_good]: 1})
        return True


def refuse_one_kind(name: str, counts: Counts) -> None:
    """Refuse training data whose answers are all good, or all bad.

    Raises:
        DataError: They are.
    """
    found = {is_good: counts.left_out.get(words, 0) for is_good, words in GOOD.items()}
    if counts.rows and not all(found.values()):
        kind = "true" if found[True] else "false"
        raise DataError(
            f"{name}: all {counts.rows} answers are labelled {kind}; objective kto learns from "
            "good and bad ones",
            hint="add answers of the other kind; objective sft learns from good ones alone",
        )
