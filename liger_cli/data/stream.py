"""Rows that are read as the run goes, for data that no memory holds.

The records are read in the order of their source and shuffled a block at a time. A block is a
function of where it starts, so a place in the data is a few numbers: what was read of each source
when the block began, and how many of its rows are used. A resumed run skips to the block without
tokenising, makes it once more and goes on behind the row it had come to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from liger_cli.config.datasets import DatasetEntry, datasets_name
from liger_cli.data.batches import without_nulls
from liger_cli.data.cache import Counts
from liger_cli.data.examples import (
    BATCH,
    Examples,
    Maker,
    RowOptions,
    join_licences,
    nothing_to_train,
    open_source,
)
from liger_cli.data.images import ImagesFound
from liger_cli.data.mixture import next_source
from liger_cli.data.packing import Strategy, answer_lengths, join_rows, pack_lengths
from liger_cli.data.pair_maker import PairMaker, check_figures, refuse_same_answers
from liger_cli.data.rows import Record
from liger_cli.data.sources import SYNTHETIC_NAME, Source, find_sources
from liger_cli.data.text_stream import join_texts
from liger_cli.data.unpaired_batches import mismatch, one_prompt
from liger_cli.data.unpaired_maker import UnpairedMaker, refuse_one_kind
from liger_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Place", "Stream", "open_stream"]


@dataclass(frozen=True)
class Place:
    """A place in a stream: the start of a block, and the rows of it that are used.

    Args:
        epoch: Passes over all the data before this one.
        block: Blocks of this epoch before this one.
        read: Records of each source that were read in this epoch.
        offsets: Records of each source that were read in its current pass.
        passes: Passes over each source in this epoch.
        used: Rows of the block before this place.
        counts: Of the rows before the block, over all epochs.
    """

    epoch: int
    block: int
    read: list[int]
    offsets: list[int]
    passes: list[int]
    used: int = 0
    counts: Counts = field(default_factory=Counts)


class StreamRow(NamedTuple):
    """A row, the epoch it belongs to, and the place behind it."""

    row: dict[str, Any]
    epoch: int
    after: Place


@dataclass(frozen=True)
class Stream:
    """Tokenised rows without numbers.

    Args:
        sources: Each with what makes its rows.
        weights: Of the sources; empty where every record is read once an epoch.
        buffer_size: Records of a block.
        seed: Of the order within blocks.
        counts: Of the rows that were given out, and those of their block.
        packing: How the rows of a block are packed, if they are.
        mismatches: Whether the rows of a block get mismatched answers; a later block whose rows
            have one prompt, such as a last row, gets none.
    """

    sources: Sequence[tuple[Source, Maker]]
    weights: Sequence[float]
    buffer_size: int
    seed: int
    max_length: int
    packing: Strategy | None
    counts: Counts
    mismatches: bool = False

    @property
    def name(self) -> str:
        return ", ".join(source.name for source, _ in self.sources)

    def start(self) -> Place:
        zeros = [0] * len(self.sources)
        return Place(0, 0, zeros, zeros, zeros)

    def rows(self, place: Place) -> Iterator[StreamRow]:
        """Yield the rows from a place on, without end; one block is made ahead in a thread.

        Raises:
            DataError: A record cannot be used, or a whole epoch has nothing to train on.
        """
        blocks = _Blocks(self, place)
        self.counts.set(place.counts)
        skip, has_rows = place.used, place.used + place.block > 0
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(blocks.next)
            while True:
                begin, rows, counts = ahead.result()
                ahead = thread.submit(blocks.next)
                if begin.block == 0 and begin.epoch > place.epoch:
                    self._refuse_same(1)
                    if self._is_unpaired:
                        refuse_one_kind(self.name, self.counts)
                    if not has_rows:
                        raise nothing_to_train(
                            self.name, self.counts, self.max_length, has_pairs=self._has_pairs
                        )
                    has_rows = False
                self.counts.add(counts)
                self._refuse_same(BATCH)
                has_rows = has_rows or bool(rows)
                for number, row in enumerate(rows):
                    if number >= skip:
                        yield StreamRow(row, begin.epoch, replace(begin, used=number + 1))
                skip = 0

    @property
    def _has_pairs(self) -> bool:
        return isinstance(self.sources[0][1], PairMaker)

    @property
    def _is_unpaired(self) -> bool:
        return isinstance(self.sources[0][1], UnpairedMaker)

    def _refuse_same(self, at_least: int) -> None:
        rows_per_pair = 2 if self._is_unpaired else 1
        refuse_same_answers(
            self.name, self.counts, self.max_length, at_least, rows_per_pair=rows_per_pair
        )


class _Blocks:
    """Make one block after the other; the sources stay open in between."""

    def __init__(self, stream: Stream, place: Place) -> None:
        self._stream = stream
        self._place = place
        self._counts = Counts(**asdict(place.counts))
        self._readers: list[Iterator[Record]] = []

    def next(self) -> tuple[Place, list[dict[str, Any]], Counts]:
        """Return where the block starts, its rows in their order, and their counts."""
        begin, stream = self._place, self._stream
        if not self._readers:
            starts = zip(stream.sources, begin.offsets, strict=True)
            self._readers = [source.read(offset) for (source, _), offset in starts]
        found, reached, is_end = self._read(begin)
        rows: list[dict[str, Any]] = []
        counts = Counts()
        for (_, maker), records in zip(stream.sources, found, strict=True):
            batches = (records[i : i + BATCH] for i in range(0, len(records), BATCH))
            tables: Iterator[tuple[Any, Counts]] = map(maker, batches)
            if maker.options.as_stream:
                tables = join_texts(tables, maker.options.max_length)
            try:
                for table, added in tables:
                    rows += map(without_nulls, table.to_pylist())
                    counts.add(added)
            except ImagesFound as image:
                raise DataError(f"{image.where}: images are not streamed") from None
        self._counts.add(counts)
        self._place = self._after(begin, reached, is_end)
        mismatched = mismatch(rows, stream.max_length) if stream.mismatches and rows else None
        if mismatched is not None:
            rows = [mismatched[i] for i in range(len(rows))]
        elif stream.mismatches and rows and begin.block == 0:
            raise one_prompt(f"{stream.name}, its first shuffle_buffer_size rows", rows)
        if stream.packing is not None:
            lengths = np.asarray([answer_lengths(row) for row in rows])
            lengths = lengths if mismatched is None else mismatched.lengths
            packs, _ = pack_lengths(lengths, stream.max_length, stream.packing)
            rows = [join_rows([rows[document] for document in one]) for one in packs]
        # Hashed, since a generator of torch looks at 32 bits of its seed.
        key = f"{stream.seed} {begin.epoch} {begin.block}".encode()
        seed = int.from_bytes(hashlib.sha256(key).digest()[:4])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        return begin, [rows[number] for number in order], counts

    def _after(self, begin: Place, reached: Place, is_end: bool) -> Place:
        counts = Counts(**asdict(self._counts))
        if is_end:
            self._readers = []
            return replace(self._stream.start(), epoch=begin.epoch + 1, counts=counts)
        return replace(reached, block=begin.block + 1, counts=counts)

    def _read(self, begin: Place) -> tuple[list[list[Record]], Place, bool]:
        """Read the records of a block by source, their end, and whether the epoch ends there."""
        stream = self._stream
        read, offsets, passes = list(begin.read), list(begin.offsets), list(begin.passes)
        found: list[list[Record]] = [[] for _ in stream.sources]
        num_missing = stream.buffer_size
        while num_missing and not all(passes):
            number = self._turn(read, passes)
            record = next(self._readers[number], None)
            if record is None:
                passes[number] += 1
                offsets[number] = 0
                self._readers[number] = stream.sources[number][0].read()
                continue
            found[number].append(record)
            read[number] += 1
            offsets[number] += 1
            num_missing -= 1
        return found, replace(begin, read=read, offsets=offsets, passes=passes, used=0), all(passes)

    def _turn(self, read: list[int], passes: list[int]) -> int:
        """Which source is read next. Without weights each is read once an epoch."""
        weights = self._stream.weights
        if weights:
            return next_source(read, weights)
        is_read = [passed > 0 for passed in passes]
        waits = [float("inf") if done else n for n, done in zip(read, is_read, strict=True)]
        return next_source(waits, [1.0] * len(waits))


def open_stream(
    datasets: str | Sequence[DatasetEntry],
    tokenizer: PreTrainedTokenizerBase | None,
    options: RowOptions,
    *,
    buffer_size: int,
    seed: int,
    packing: Strategy | None = None,
    mismatches: bool = False,
) -> Examples:
    """Return examples whose rows are a Stream.

    Args:
        datasets: As load_examples takes them; not synthetic.
        tokenizer: Of the model.
        buffer_size: Records that are shuffled, and packed, at a time.
        seed: Of the order.
        packing, mismatches: As Stream has them.

    Raises:
        LigerError: As load_examples.
    """
    parts = find_sources(
        datasets, streaming=True, as_stream=options.as_stream, pairs=options.compares_answers
    )
    sources = [(entry, source) for entry, source in parts if source is not None]
    if tokenizer is None or len(sources) < len(parts):
        raise ConfigError(f"streaming: {SYNTHETIC_NAME} data are made and not read")
    made = [(source, open_source(source, tokenizer, options, entry)) for entry, source in sources]
    check_figures([(s.name, m.form.figures) for s, m in made if isinstance(m, PairMaker)])
    given = [entry.weight for entry, _ in parts]
    weights = [] if not any(given) else [1.0 if weight is None else weight for weight in given]
    counts = Counts()
    stream = Stream(
        made, weights, buffer_size, seed, options.max_length, packing, counts, mismatches
    )
    licences = [source.licence for _, source in sources if source.licence]
    notes = tuple(source.note for _, source in sources if source.note)
    return Examples(stream, counts, datasets_name(datasets), join_licences(licences), notes)
