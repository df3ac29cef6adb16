"""Training data: rows of token ids with the labels that are trained on.

A label is -100 where nothing is to be learned: in a prompt, in what the user says, in padding, and
at the first token of a row, which nothing predicts. Padding is known by its place alone, since a
padding token may be the token that ends a text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from liger_cli.config.datasets import DatasetEntry, datasets_name
from liger_cli.data import cache
from liger_cli.data.cache import Counts, Tokenised
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.encode import IGNORED, Encoder
from liger_cli.data.images import ImageRows, ImagesFound
from liger_cli.data.mixture import join_sources
from liger_cli.data.rows import Record, Row, RowFormat, only_last
from liger_cli.data.sources import SYNTHETIC_NAME, Source, Split, find_sources
from liger_cli.data.text_stream import join_texts
from liger_cli.data.thoughts import Reasoning
from liger_cli.data.used import check_names, count_names
from liger_cli.data.workers import map_in_order
from liger_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BATCH",
    "DataStats",
    "Examples",
    "RowMaker",
    "RowOptions",
    "join_licences",
    "load_examples",
    "nothing_to_train",
    "open_source",
]

# Records that are tokenised at once: enough to keep a tokenizer's threads busy.
BATCH = 1000
# Fewer where they are long, which are all in memory with their tokens.
_BATCH_BYTES = 32 * 1024 * 1024
TOO_SHORT = "rows left out: fewer tokens than min_length"
_SYNTHETIC_ROWS = {"train": 1024, "eval": 64}


@dataclass(frozen=True)
class DataStats:
    """Count over the rows that are used.

    Args:
        rows: Rows used.
        dropped_rows: Rows left out, since no token of them, within max_length, is trained on.
        tokens: Token ids in the rows used.
        trained_tokens: Those with a label.
        truncated_rows: Rows used that were longer than max_length.
        columns: The columns of the source that were read.
        left_out: What of the rows used is not trained although it was said, by its name: how many
            system messages, thoughts or answers; and how many answers have no text.
        unused_columns: Those that are there and were not.
        fields: The fields of messages that were read.
    """

    rows: int
    dropped_rows: int
    tokens: int
    trained_tokens: int
    truncated_rows: int
    columns: tuple[str, ...]
    left_out: dict[str, int]
    unused_columns: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Rows with the columns input_ids and labels, in the order of the source.

    Args:
        examples: The rows by number: a datasets.Dataset, or what images and mixtures need; or a
            Stream, which has no numbers.
        counts: Of the rows that were read; a mixture uses some of them more than once.
        notes: How often the rows of each source of a mixture are used.
        has_images: Whether rows have more than ids.
    """

    examples: Any
    counts: Counts
    name: str
    licence: str | None = None
    notes: tuple[str, ...] = ()
    has_images: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def stats(self) -> DataStats:
        """The counts; of a stream those of the rows so far."""
        values = asdict(self.counts)
        del values["seen"]
        names = {key: tuple(values[key]) for key in ("columns", "unused_columns", "fields")}
        return DataStats(**{**values, **names})


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

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; at least 2, since a token predicts the next"
            )


def load_examples(
    datasets: str | Sequence[DatasetEntry],
    tokenizer: PreTrainedTokenizerBase | None,
    options: RowOptions,
    *,
    split: Split = "train",
    seed: int = 0,
    processor: Any = None,
    num_proc: int = 1,
    notify: Callable[[str], None] | None = None,
) -> Examples:
    """Return tokenised rows with labels.

    Labels: of `text` every token and the end of the text; of `prompt` and `completion` the
    completion and the end of the text; of a conversation what the assistant says and the ends of
    its turns. An instruction is a conversation where the tokenizer has a chat template.

    Args:
        datasets: What find_source takes, synthetic (random tokens, each row exactly max_length), or
            several of these with weights, as split_names reads them; or entries.
        tokenizer: Of the model; synthetic data need none.
        options: What else decides the ids and labels.
        split: The sample and synthetic data have both; a file is the same for both.
        seed: Of synthetic data only.
        processor: Of an image-text model; without it rows with images are refused.
        num_proc: Processes that tokenise; what they make does not depend on their number.
        notify: Called with notices on the cache.

    Raises:
        ConfigError: The name is unknown, or an argument is out of range.
        DataError: The data cannot be read, or hold nothing to train on.
        EnvironmentProblem: The sample's package is not installed, or the hub is out of reach.
    """
    counts, licences = Counts(), list[str]()
    parts: list[tuple[str, Any, float | None]] = []
    for entry, source in find_sources(datasets, split, as_stream=options.as_stream):
        one = entry.path
        if source is None:
            made = _synthetic(split, options, seed)
        elif tokenizer is None:
            raise ConfigError(f"{one} needs a tokenizer; only {SYNTHETIC_NAME} needs none")
        else:
            licences += [source.licence] if source.licence else []
            maker = open_source(source, tokenizer, options, entry)
            made = _tokenise(source, maker, processor, num_proc, notify)
            check_names(entry, made.counts, maker.form.name)
        if not len(made.rows):
            raise nothing_to_train(one, made.counts, options.max_length)
        counts.add(made.counts)
        parts.append((one, made.rows, entry.weight))
    has_images = any(isinstance(rows, ImageRows) for _, rows, _ in parts)
    rows, notes = join_sources(parts)
    name = datasets_name(datasets)
    return Examples(rows, counts, name, join_licences(licences), notes, has_images)


def join_licences(licences: Sequence[str]) -> str | None:
    return ", ".join(dict.fromkeys(licences)) or None


@dataclass(frozen=True)
class RowMaker:
    """Make rows of ids and labels out of the records of one source."""

    form: RowFormat
    encoder: Encoder
    renderer: ChatRenderer
    options: RowOptions
    entry: DatasetEntry

    def __call__(self, records: Sequence[Record]) -> tuple[pyarrow.Table, Counts]:
        """Return a table of the rows that have a token to train on, and the counts of records."""
        rows = [self.row(record) for record in records]
        for row in rows:
            if row.images:
                raise ImagesFound(row.where)
        counts = Counts()
        count_names(counts, rows, self.renderer)
        kept: list[tuple[list[int], list[int]]] = []
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
            kept.append((ids, labels))
            counts.rows += 1
            counts.tokens += len(ids)
            counts.trained_tokens += num_trained
            counts.truncated_rows += len(encoded.input_ids) > len(ids)
            counts.add_left_out(encoded.left_out)
        return _table([ids for ids, _ in kept], [labels for _, labels in kept]), counts

    def row(self, record: Record) -> Row:
        """Return the checked row of a record.

        Raises:
            DataError: As RowFormat.row.
        """
        row = self.form.row(record)
        return only_last(row) if self.options.last_only and row.messages else row


def open_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    entry: DatasetEntry,
) -> RowMaker:
    """Return a RowMaker for the records of a source.

    Raises:
        DataError: It has no records, or they are of no format.
    """
    first = next(source.read(), None)
    if first is None:
        raise DataError(f"{source.name} holds no rows")
    options = replace(options, min_length=entry.min_length or 0)
    max_length = None if options.as_stream else options.max_length
    encoder = Encoder(tokenizer, options.completion_only, options.assistant_only, max_length)
    form = RowFormat.find(first, source.folder, entry.naming)
    if options.as_stream and form.name != "text":
        raise DataError(
            f"{source.name}: text_mode stream is for rows of text, and these are {form.name}",
            hint="packing fills rows with whole conversations and prompts",
        )
    renderer = ChatRenderer(
        tokenizer, enable_thinking=options.enable_thinking, reasoning=options.reasoning
    )
    return RowMaker(form, encoder, renderer, options, entry)


def _tokenise(
    source: Source,
    maker: RowMaker,
    processor: Any,
    num_proc: int,
    notify: Callable[[str], None] | None,
) -> Tokenised:
    """Tokenize a source; with a processor if one of its rows has images."""
    try:
        return _tokenise_text(source, maker, num_proc, notify)
    except ImagesFound as found:
        if processor is None:
            raise DataError(
                f"{found.where}: the row has images, and this model has no processor that takes "
                "them",
                hint="image-text models take images, with the preprocessor_config.json that "
                "belongs to them",
            ) from None
    if num_proc > 1 and notify is not None:
        notify(f"{source.name}: rows with images are tokenised by one process")
    if maker.options.min_length:
        raise DataError(f"{source.name}: min_length is for rows without images")
    return ImageRows.of(
        map(maker.row, source.read()),
        maker.encoder,
        maker.renderer,
        processor,
        max_length=maker.options.max_length,
        vocab_size=maker.options.vocab_size,
    )


def _tokenise_text(
    source: Source,
    maker: RowMaker,
    num_proc: int,
    notify: Callable[[str], None] | None,
) -> Tokenised:
    def make() -> Iterator[tuple[pyarrow.Table, Counts]]:
        tables = map_in_order(maker, _chunks(source.read()), num_proc)
        options = maker.options
        return join_texts(tables, options.max_length) if options.as_stream else tables

    keep = source.num_bytes >= cache.MIN_BYTES
    key: dict[str, Any] = {}
    if keep:
        # Only now: the hash of the data reads all of them. Their name and weight do not matter.
        key = {
            "data": source.fingerprint(),
            "split": source.split,
            "tokenizer": cache.tokenizer_content(maker.encoder.tokenizer),
            "options": asdict(maker.options),
            "entry": asdict(replace(maker.entry, path="", weight=None)),
        }
    return cache.cached(key, make, keep=keep, notify=notify)


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record[1]) if isinstance(record[1], bytes) else 0
        if len(batch) == BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def nothing_to_train(name: str, counts: Counts, max_length: int) -> DataError:
    short = counts.left_out.get(TOO_SHORT, 0)
    return DataError(
        f"none of the {counts.dropped_rows + short} rows of {name} has a token to train on within "
        f"the first {max_length} tokens (max_length)"
        + (f"; {short} of them have fewer tokens than min_length" if short else ""),
        hint="trained are completions, what the assistant says, and text, where no field such as "
        "train: false or weight: 0 says otherwise",
    )


def _synthetic(split: Literal["train", "eval"], options: RowOptions, seed: int) -> Tokenised:
    num_rows = _SYNTHETIC_ROWS[split]
    # Even and odd: no seed gives the rows of one split as those of the other.
    generator = torch.Generator().manual_seed(2 * seed + (split == "eval"))
    shape = (num_rows, options.max_length)
    ids = torch.randint(options.vocab_size, shape, generator=generator)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    counts = Counts(
        num_rows, tokens=ids.numel(), trained_tokens=num_rows * (options.max_length - 1)
    )
    table = _table(ids.tolist(), labels.tolist())
    return cache.cached({}, lambda: [(table, counts)], keep=False)


def _table(input_ids: list[list[int]], labels: list[list[int]]) -> pyarrow.Table:
    """Return rows as a table of 32-bit integers."""
    import pyarrow

    column = pyarrow.list_(pyarrow.int32())
    return pyarrow.table(
        {"input_ids": pyarrow.array(input_ids, column), "labels": pyarrow.array(labels, column)}
    )
