"""The report of `liger data preview` for a terminal: rows in colour, a histogram, shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from liger_cli.common.numbers import format_count
from liger_cli.common.text import printable
from liger_cli.data.examples import DataStats
from liger_cli.data.padding import WORTH_PACKING
from liger_cli.data.pair_facts import PairFacts
from liger_cli.report import show_json, show_lines, show_table
from liger_cli.training.model.template_facts import TemplateFacts

__all__ = ["Bar", "DataPreview", "Fill", "Piece", "RowPreview", "TokenPreview", "show_preview"]

_BAR_WIDTH = 40
_TRAINED = "bold green"


@dataclass(frozen=True)
class Piece:
    """Tokens next to each other that are all trained on, or none of them."""

    text: str
    is_trained: bool


@dataclass(frozen=True)
class TokenPreview:
    """A token: its id, its piece in the vocabulary, and its label, -100 where it has none."""

    id: int
    piece: str
    label: int


@dataclass(frozen=True)
class RowPreview:
    """A row as the model reads it, the template's marks included.

    Args:
        listed: Each token, where that was asked for.
        answer: chosen or rejected, of a pair, which has a row for both.
        figures: Margin and log-probabilities of a pair, where it has them; the label of an answer.
        weights: Of the loss of each token, where some are neither 0 nor 1.
        labels: The classes of the row; the last token is scored.
    """

    tokens: int
    trained_tokens: int
    pieces: tuple[Piece, ...]
    listed: tuple[TokenPreview, ...] | None = None
    answer: str | None = None
    figures: Mapping[str, float] | None = None
    weights: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Bar:
    """How many rows have `first` to `last` tokens."""

    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Fill:
    """The share of the tokens fed that are no padding.

    Args:
        how: Rows in batches as they come, or packed in one of the two ways.
        rows: Rows that are fed: of different lengths, or of max_length where they are packed.
    """

    how: Literal["unpacked", "bfd", "sequential"]
    rows: int
    efficiency: float


@dataclass(frozen=True)
class DataPreview:
    """The report of `liger data preview`.

    Args:
        is_part: Whether only the first block of a stream was read.
        first_row: The number of the first of the rows that are rendered.
        lengths: min, median, mean, p95 and max of the tokens of a row.
        template: The chat template; None where the tokenizer has none.
        pairs: Repetitions and contradictions of pairs; None of other rows.
        labelled: The same of labelled answers.
    """

    name: str
    licence: str | None
    max_length: int
    is_part: bool
    stats: DataStats
    lengths: dict[str, float]
    histogram: tuple[Bar, ...]
    fill: tuple[Fill, ...]
    template: TemplateFacts | None
    rows: tuple[RowPreview, ...]
    first_row: int = 1
    pairs: PairFacts | None = None
    labelled: PairFacts | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        content = {"command": "data preview", **asdict(self)}
        for part in (content, *content["rows"]):
            for name in ("listed", "answer", "figures", "weights", "labels", "pairs", "labelled"):
                if part.get(name, ...) is None:
                    del part[name]
        return content


def show_preview(preview: DataPreview, *, as_json: bool) -> None:
    """Print the rendered rows first and the figures last, or one JSON document.

    Trained tokens are green; where there is no colour they stand in double square brackets.
    """
    if as_json:
        show_json(preview.to_dict())
        return
    console = Console(highlight=False, markup=False)
    for number, row in enumerate(preview.rows):
        show_lines(_heading(number, row, preview))
        console.print(_text(row, in_colour=console.color_system is not None), soft_wrap=True)
        if row.listed is not None:
            columns = ("place", "id", "piece", "label", *(["weight"] if row.weights else []))
            show_table(columns, _token_rows(row.listed, row.weights))
        show_lines("")
    show_lines(*_figures(preview), "")
    most = max(bar.rows for bar in preview.histogram)
    show_table(
        ("tokens", "rows" if preview.pairs is None else "answers", ""),
        [
            (
                f"{bar.first}-{bar.last}" if bar.last > bar.first else str(bar.first),
                format_count(bar.rows),
                "#" * -(-bar.rows * _BAR_WIDTH // most),
            )
            for bar in preview.histogram
        ],
    )
    show_lines("")
    show_table(("how rows are fed", "rows", "not padding"), map(_fill_row, preview.fill))
    show_lines("", _advice(preview))


def _heading(number: int, row: RowPreview, preview: DataPreview) -> str:
    """Return the line above a rendered row; a pair has two."""
    share = f"{row.tokens} tokens, {row.trained_tokens} {{}} " + (
        f"({_percent(row.trained_tokens, row.tokens)})"
    )
    if row.labels is not None:
        shown = ", ".join(map(printable, row.labels)) or "none"
        return f"row {preview.first_row + number}: {row.tokens} tokens; label {shown}"
    figures = [
        f"{name} {str(value).lower() if isinstance(value, bool) else f'{value:g}'}"
        for name, value in (row.figures or {}).items()
    ]
    if row.answer is None:
        shown = f"row {preview.first_row + number}: {share.format('trained on')}"
        return "; ".join([shown, *figures])
    place = f"pair {preview.first_row + number // 2}, {row.answer}"
    return "; ".join([f"{place}: {share.format('scored')}", *figures])


def _token_rows(
    tokens: tuple[TokenPreview, ...], weights: tuple[float, ...] | None
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (str(i), str(token.id), printable(token.piece), str(token.label))
        for i, token in enumerate(tokens)
    ]
    if weights is None:
        return rows
    return [(*row, f"{weight:g}") for row, weight in zip(rows, weights, strict=True)]


def _text(row: RowPreview, *, in_colour: bool) -> Text:
    text = Text()
    for piece in row.pieces:
        shown = printable(piece.text)
        if not piece.is_trained:
            text.append(shown)
        elif in_colour:
            text.append(shown, style=_TRAINED)
        else:
            text.append(f"[[{shown}]]")
    return text


def _figures(preview: DataPreview) -> list[str]:
    stats, lengths = preview.stats, preview.lengths
    licence = f" ({preview.licence})" if preview.licence else ""
    part = ", the first block of the stream" if preview.is_part else ""
    read = stats.rows + stats.dropped_rows
    rows, trained = ("rows", "trained on") if preview.pairs is None else ("pairs", "scored")
    return [
        *_template_lines(preview.template),
        f"{preview.name}{licence}{part}: columns {', '.join(stats.columns) or 'none'}"
        + (f"; fields {', '.join(stats.fields)}" if stats.fields else "")
        + (f"; not used: {', '.join(stats.unused_columns)}" if stats.unused_columns else ""),
        f"{format_count(stats.rows)} {rows}, {format_count(stats.tokens)} tokens, "
        f"{format_count(stats.trained_tokens)} {trained} "
        f"({_percent(stats.trained_tokens, stats.tokens)})",
        f"cut to max_length {preview.max_length}: {format_count(stats.truncated_rows)} {rows} "
        f"({_percent(stats.truncated_rows, stats.rows)})",
        (
            f"left out, nothing to train on: {format_count(stats.dropped_rows)} rows "
            if preview.pairs is None
            else "left out, an answer has no token to train on within max_length: "
            f"{format_count(stats.dropped_rows)} pairs "
        )
        + f"({_percent(stats.dropped_rows, read)})",
        *(f"{format_count(number)} {name}" for name, number in stats.left_out.items()),
        *_pair_lines(preview.pairs, "pairs", "with chosen and rejected exchanged"),
        *_pair_lines(preview.labelled, "answers", "with the other label"),
        f"tokens of {'a row' if preview.pairs is None else 'an answer, with its prompt'}: "
        + ", ".join(f"{name} {format_count(value)}" for name, value in lengths.items()),
    ]


def _pair_lines(facts: PairFacts | None, what: str, contrary: str) -> list[str]:
    """Return the lines on pairs or answers that repeat or contradict each other."""
    if facts is None:
        return []
    lines = [f"{format_count(facts.repeated)} {what} are there twice"] if facts.repeated else []
    if facts.contradicting:
        places = ", ".join(f"{one} and {other}" for one, other in facts.places)
        lines.append(
            f"warning: {format_count(facts.contradicting)} {what} are there {contrary} too: "
            f"{places}"
        )
    return lines


def _template_lines(template: TemplateFacts | None) -> list[str]:
    if template is None:
        return ["chat template: none; rows of conversations need --chat-template"]
    return [template.line, *(f"warning: {warning}" for warning in template.warnings)]


def _advice(preview: DataPreview) -> str:
    """Return a line on the padding of batches and what packing brings."""
    shares = {fill.how: fill.efficiency for fill in preview.fill}
    padded, best = 1 - shares["unpacked"], max(shares["bfd"], shares["sequential"])
    line = f"padding: {padded:.0%} of the tokens of a batch"
    times = best / shares["unpacked"]
    if times < WORTH_PACKING:
        return f"{line}; packing would not make it much less"
    return f"{line}; --packing feeds {times:.1f} times fewer tokens"


def _fill_row(fill: Fill) -> tuple[str, str, str]:
    names = {"unpacked": "batches of rows", "bfd": "packed, best fit"}
    name = names.get(fill.how, "packed, in order")
    return name, format_count(fill.rows), f"{fill.efficiency:.1%}"


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
