"""Training data: rows of token ids with the labels that are trained on.

A label is -100 where nothing is to be learned: in a prompt, in what the user says, in padding, and
at the first token of a row, which nothing predicts. Padding is known by its place alone, since a
padding token may be the token that ends a text.

Labels: of `text` every token and the end of the text; of `prompt` and `completion` the completion
and the end of the text; of a conversation what the assistant says and the ends of its turns. An
instruction is a conversation where the tokenizer has a chat template.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from liger_cli.config.datasets import DatasetEntry, datasets_name
from liger_cli.data import cache
from liger_cli.data.cache import Counts, Tokenised
from liger_cli.data.chat import ChatRenderer
from liger_cli.data.class_formats import ClassFormat
from liger_cli.data.class_maker import ClassMaker
from liger_cli.data.encode import Encoder
from liger_cli.data.images import ImageRows, ImagesFound
from liger_cli.data.makers import RowMaker, RowOptions
from liger_cli.data.mixture import join_sources
from liger_cli.data.pair_formats import FIGURES, PairFormat
from liger_cli.data.pair_maker import PairMaker, check_figures, refuse_same_answers
from liger_cli.data.rows import Record, RowFormat, as_object
from liger_cli.data.sources import SYNTHETIC_NAME, Source, Split, find_sources
from liger_cli.data.synthetic import make_synthetic
from liger_cli.data.text_stream import join_texts
from liger_cli.data.unpaired_formats import UnpairedFormat
from liger_cli.data.unpaired_maker import UnpairedMaker, refuse_one_kind
from liger_cli.data.used import check_names
from liger_cli.data.workers import map_in_order
from liger_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    import pyarrow
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BATCH",
    "DataStats",
    "Examples",
    "Maker",
    "RowOptions",
    "join_licences",
    "load_examples",
    "nothing_to_train",
    "open_source",
]

Maker = RowMaker | PairMaker | UnpairedMaker | ClassMaker

# Records that are tokenised at once: enough to keep a tokenizer's threads busy.
BATCH = 1000
# In the name of a column: logprobs, log_probs, logps, logits.
_STORED = re.compile(r"log[_-]?(prob|ps?(?![a-z])|it)", re.IGNORECASE)
# Fewer where they are long, which are all in memory with their tokens.
_BATCH_BYTES = 32 * 1024 * 1024


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

    Pairs have chosen_input_ids, chosen_labels, rejected_input_ids and rejected_labels, and perhaps
    margin, ref_chosen_logps and ref_rejected_logps. Labelled answers have desirable, 1 or 0, and
    rows of classes have targets beside.

    Args:
        examples: The rows by number: a datasets.Dataset, or what images and mixtures need; or a
            Stream, which has no numbers.
        counts: Of the rows that were read; a mixture uses some of them more than once.
        notes: What the sources are, and how often a mixture uses the rows of each.
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
    counts = Counts()
    parts: list[tuple[str, Any, float | None]] = []
    found = find_sources(
        datasets,
        split,
        as_stream=options.as_stream,
        pairs=options.compares_answers,
        classes=options.classes is not None,
    )
    tokenising = _Tokenising(tokenizer, options, processor, num_proc, notify)
    for entry, source in found:
        made = (
            make_synthetic(split, options, seed)
            if source is None
            else tokenising.load(source, entry)
        )
        counts.add(made.counts)
        parts.append((entry.path, made.rows, entry.weight))
    if options.pairs:
        check_figures([(name, _figures_of(rows)) for name, rows, _ in parts])
    if options.unpaired and split == "train":
        refuse_one_kind(datasets_name(datasets), counts)
    rows, shares = join_sources(parts)
    sources = [source for _, source in found if source]
    return Examples(
        examples=rows,
        counts=counts,
        name=datasets_name(datasets),
        licence=join_licences([source.licence for source in sources if source.licence]),
        notes=(*(source.note for source in sources if source.note), *shares),
        has_images=any(isinstance(rows, ImageRows) for _, rows, _ in parts),
    )


def _figures_of(rows: Any) -> tuple[str, ...]:
    return tuple(name for name in FIGURES if name in rows.column_names)


def join_licences(licences: Sequence[str]) -> str | None:
    return ", ".join(dict.fromkeys(licences)) or None


def open_source(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    entry: DatasetEntry,
) -> Maker:
    """Return a maker of the rows that the options ask for, for the records of a source.

    Raises:
        DataError: It has no records, or they are of no format.
    """
    first = next(source.read(), None)
    if first is None:
        raise DataError(f"{source.name} holds no rows")
    if options.distills:
        _refuse_stored(first)
    options = replace(options, min_length=entry.min_length or 0)
    max_length = None if options.as_stream else options.max_length
    encoder = Encoder(tokenizer, options.completion_only, options.assistant_only, max_length)
    renderer = ChatRenderer(
        tokenizer, enable_thinking=options.enable_thinking, reasoning=options.reasoning
    )
    if options.pairs:
        pairs = PairFormat.find(first, source.folder, entry.naming)
        return PairMaker(pairs, encoder, renderer, options, entry)
    if options.unpaired:
        answers = UnpairedFormat.find(first, source.folder, entry.naming)
        return UnpairedMaker(answers, encoder, renderer, options, entry)
    if options.classes is not None:
        labelled = ClassFormat.find(first, source.folder, entry.naming)
        return ClassMaker(labelled, encoder, renderer, options, entry)
    form = RowFormat.find(first, source.folder, entry.naming)
    if options.as_stream and form.name != "text":
        raise DataError(
            f"{source.name}: text_mode stream is for rows of text, and these are {form.name}",
            hint="packing fills rows with whole conversations and prompts",
        )
    return RowMaker(form, encoder, renderer, options, entry)


def _refuse_stored(record: Record) -> None:
    """Raise a DataError where a record has log-probabilities or logits, as a teacher gives them."""
    names = [name for name in as_object(record) if _STORED.search(name)]
    if names:
        raise DataError(
            f"{record[0]}: {', '.join(names)}: a teacher's stored values are not read by objective "
            "distill, which runs the teacher itself",
            hint="leave the column out; teacher_model_name_or_path names the teacher",
        )


@dataclass(frozen=True)
class _Tokenising:
    """Makes the rows of sources; the arguments are those of load_examples."""

    tokenizer: PreTrainedTokenizerBase | None
    options: RowOptions
    processor: Any
    num_proc: int
    notify: Callable[[str], None] | None

    def load(self, source: Source, entry: DatasetEntry) -> Tokenised:
        """Return the rows of a source, and check what its entry names.

        Raises:
            LigerError: As load_examples.
        """
        if self.tokenizer is None:
            raise ConfigError(f"{entry.path} needs a tokenizer; only {SYNTHETIC_NAME} needs none")
        maker = open_source(source, self.tokenizer, self.options, entry)
        made = self._rows(source, maker)
        check_names(entry, made.counts, maker.form.name)
        if self.options.compares_answers:
            rows_per_pair = 2 if self.options.unpaired else 1
            refuse_same_answers(
                entry.path, made.counts, self.options.max_length, rows_per_pair=rows_per_pair
            )
        if not len(made.rows):
            raise nothing_to_train(
                entry.path,
                made.counts,
                self.options.max_length,
                has_pairs=self.options.pairs,
            )
        return made

    def _rows(self, source: Source, maker: Maker) -> Tokenised:
        """Tokenize a source; with the processor if one of its rows has images."""
        if not isinstance(maker, RowMaker):
            return self._text_rows(source, maker)
        try:
            return self._text_rows(source, maker)
        except ImagesFound as found:
            if self.processor is None:
                raise DataError(
                    f"{found.where}: the row has images, and this model has no processor that "
                    "takes them",
                    hint="image-text models take images, with the preprocessor_config.json that "
                    "belongs to them",
                ) from None
        if self.num_proc > 1 and self.notify is not None:
            self.notify(f"{source.name}: rows with images are tokenised by one process")
        if maker.options.min_length:
            raise DataError(f"{source.name}: min_length is for rows without images")
        return ImageRows.of(
            map(maker.row, source.read()),
            maker.encoder,
            maker.renderer,
            self.processor,
            max_length=maker.options.max_length,
            vocab_size=maker.options.vocab_size,
        )

    def _text_rows(self, source: Source, maker: Maker) -> Tokenised:
        def make() -> Iterator[tuple[pyarrow.Table, Counts]]:
            tables = map_in_order(maker, _chunks(source.read()), self.num_proc)
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
        return cache.cached(key, make, keep=keep, notify=self.notify)


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


# In the text of a note on rows that are not there.
_LEFT_OUT = " left out: "


def nothing_to_train(
    name: str, counts: Counts, max_length: int, *, has_pairs: bool = False
) -> DataError:
    left_out = {text: count for text, count in counts.left_out.items() if _LEFT_OUT in text}
    number = counts.dropped_rows + sum(left_out.values())
    within = f"within the first {max_length} tokens (max_length)"
    within += "".join(f"; {count} {text}" for text, count in left_out.items())
    if has_pairs:
        return DataError(
            f"none of the {number} pairs of {name} has tokens to train on in both answers {within}",
            hint="an answer is empty, its prompt fills the row (a larger max_length makes room), "
            "or a field such as train: false leaves it out",
        )
    return DataError(
        f"none of the {number} rows of {name} has a token to train on {within}",
        hint="trained are completions, what the assistant says, and text, where no field such as "
        "train: false or weight: 0 says otherwise",
    )
