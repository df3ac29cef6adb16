"""The formats of rows by their columns, and the fields that say what of a row is not trained."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from liger_cli.errors import DataError

__all__ = [
    "FORMATS",
    "MESSAGE_FIELDS",
    "OPTIONAL",
    "ROW_FIELDS",
    "SHAPES",
    "TURNS",
    "WANTED",
    "Marks",
    "find_format",
    "find_shape",
    "message_weight",
    "read_truth",
    "row_marks",
]

# The formats, by the columns that make them; the first that fits the first row is the source's.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
    "token ids": ("input_ids",),
}
# Other names of columns that cannot mean something else: of a format and its optional columns, ours
# to theirs. They are looked at where the columns make no format by themselves.
SHAPES: tuple[tuple[str, dict[str, str]], ...] = (
    # Dolly, and what is made after it.
    (
        "instruction and output",
        {"instruction": "instruction", "output": "response", "input": "context"},
    ),
    ("instruction and output", {"instruction": "input", "output": "output"}),
)
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools", "images"),
    "conversations": ("system", "tools", "images"),
    "prompt and completion": ("system", "tools", "images"),
    "instruction and output": ("input", "system", "history"),
    "token ids": ("labels", "loss_mask"),
}
WANTED = (
    "text; or prompt and completion; or instruction, output and perhaps input, system and history; "
    "or messages (a list of role and content); or conversations (a list of from and value); or "
    "input_ids and perhaps labels or loss_mask"
)

# The formats whose rows have a list of messages.
TURNS = ("messages", "conversations", "prompt and completion")
_TURNS = ("messages", "conversations", "instruction and output")
_ANSWERS = (*_TURNS, "prompt and completion")
_ALL = tuple(FORMATS)
_TEXTS = tuple(name for name in FORMATS if name != "token ids")

# How a field is read:
#   weight  a number from 0 on, times which the loss of its tokens counts; 0: not trained
#   train   true: trained, false: not
#   train?  the same where the value is true or false; anything else is a figure about the row
#   masked  true: not trained, false: trained
#   good    true: a good answer, false: an example of a bad one, which cannot be trained on here
#   last    true: of several answers only the last is trained
#   list    of a row with messages: for each of them whether it is trained
#   refuse  says something about training that has no meaning here
Kind = Literal["weight", "train", "train?", "masked", "good", "last", "list", "refuse"]

# Fields of a message or turn, in the formats messages and conversations. Who writes them: OpenAI
# (weight), axolotl (train, training, train_detail), LLaMA-Factory and ms-swift (loss, learn,
# loss_scale), torchtune (masked), verl and Megatron (loss_mask).
MESSAGE_FIELDS: dict[str, Kind] = {
    "weight": "weight",
    "loss_weight": "weight",
    "loss_scale": "weight",
    "train": "train",
    "training": "train",
    "trainable": "train",
    "learn": "train",
    "loss": "train",
    "loss_mask": "train",
    "masked": "masked",
    "mask": "refuse",
    "label": "good",
    "train_detail": "refuse",
    "training_detail": "refuse",
}

# Fields of a row, with the formats in which they say something about training; in the others they
# are columns that are not used. A label beside text is its class.
ROW_FIELDS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "label": ("good", _ANSWERS),
    "kto_tag": ("good", _ANSWERS),
    "train": ("train", _ALL),
    "training": ("train", _ALL),
    "trainable": ("train", _ALL),
    "learn": ("train", _ALL),
    "loss": ("train?", _ALL),
    "masked": ("masked", _ALL),
    "weight": ("weight", _ALL),
    "loss_weight": ("weight", _ALL),
    "sample_weight": ("weight", _ALL),
    "mask_history": ("last", _TURNS),
    "loss_mask": ("list", _TEXTS),
    "mask": ("list", _ALL),
    "labels": ("refuse", _TEXTS),
}

_JOINTS = str.maketrans("", "", "_- ")
_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class Marks:
    """The content of a row's fields.

    Args:
        fields: Those that were read.
        weight: Times which the loss of its tokens counts; 0: nothing of the row is trained.
        only_last: Whether of several answers only the last is trained.
        mask: Of each message whether it is trained, by the column of that name.
    """

    fields: tuple[str, ...] = ()
    weight: float = 1.0
    only_last: bool = False
    mask: tuple[str, tuple[bool, ...]] | None = None


def find_format(
    columns: Sequence[str] | Mapping[str, Any], wanted: Collection[str] = ()
) -> str | None:
    """Return the format that columns make, or None.

    Args:
        wanted: Columns that the format has to use.
    """
    for name, needed in FORMATS.items():
        known = {*needed, *OPTIONAL.get(name, ()), *ROW_FIELDS}
        if set(needed) <= set(columns) and set(wanted) <= known:
            return name
    return None


def find_shape(columns: Collection[str]) -> dict[str, str]:
    """Return the names of the columns of one of SHAPES, ours to theirs; empty for none."""
    for form, names in SHAPES:
        if {names[ours] for ours in FORMATS[form]} <= set(columns):
            return {ours: theirs for ours, theirs in names.items() if theirs in columns}
    return {}


def row_marks(content: Mapping[str, Any], form: str, where: str) -> Marks:
    """Read the fields of a row of one of the FORMATS.

    Raises:
        DataError: A field asks for what is not done here, or its value is not allowed.
    """
    kinds = {name: kind for name, (kind, forms) in ROW_FIELDS.items() if form in forms}
    # Columns of token ids are no fields of a row, and say as much about what is trained.
    apart = dict.fromkeys(OPTIONAL[form], "list") if form == "token ids" else {}
    _check_spelling(content, {**kinds, **apart}, "", where)
    masks = [(name, _mask(content, name, where)) for name in ("loss_mask", "mask") if name in kinds]
    given = [(name, mask) for name, mask in masks if mask is not None] if form in TURNS else []
    if len(given) > 1:
        raise DataError(f"{where}: loss_mask and mask are both there; keep one of them")
    kinds = {name: kind for name, kind in kinds.items() if name not in dict(given)}
    found = {name: (kind, weight) for name, kind, weight in _read(content, kinds, "", where)}
    weight = _agreed({name: one for name, one in found.items() if one[0] in _TRAINED}, "", where)
    return Marks(
        (*found, *dict(given)),
        weight=1.0 if weight is None else weight,
        only_last=any(truth for kind, truth in found.values() if kind == "last"),
        mask=given[0] if given else None,
    )


def _mask(content: Mapping[str, Any], name: str, where: str) -> tuple[bool, ...] | None:
    """Return a column of one mark for each message; None where it is something else."""
    value = content.get(name)
    if not isinstance(value, list) or not value:
        return None
    marks = [read_truth(entry) for entry in value]
    for i, mark in enumerate(marks):
        if mark is None:
            raise _not_allowed(f"{name}[{i}]", "list", value[i], where)
    return tuple(mark is True for mark in marks)


def message_weight(message: Mapping[str, Any], name: str, where: str) -> float | None:
    """Return the weight that the fields of a message say it has, or None: they say nothing.

    Args:
        name: Of the message, for errors: messages[3].

    Raises:
        DataError: As row_marks.
    """
    _check_spelling(message, MESSAGE_FIELDS, f"{name}.", where)
    read = _read(message, MESSAGE_FIELDS, f"{name}.", where)
    found = {key: (kind, weight) for key, kind, weight in read if kind in _TRAINED}
    return _agreed(found, f"{name}.", where)


_TRAINED = ("weight", "train", "train?", "masked")
# Others are a mistake sooner than a wish, and products of small ones would be 0 in float32.
_MIN_WEIGHT, _MAX_WEIGHT = 1e-6, 1e6


def _check_spelling(
    content: Mapping[str, Any], kinds: Mapping[str, str], prefix: str, where: str
) -> None:
    """Check that no field is the name of a mark in other letters, such as Weight or lossMask.

    Raises:
        DataError: One is, and under the name of the mark its value would be read.
    """
    plain = {_letters(name): name for name in kinds}
    for name, value in content.items():
        mark = plain.get(_letters(name), name)
        if mark == name or name in kinds or value is None or value == "":
            continue
        # A text or a figure under these names is not read, however they are written.
        if kinds[mark] in ("good", "train?") and read_truth(value) is None:
            continue
        raise DataError(
            f"{where}: {prefix}{name} is {_shown(value)}; the field that says what is trained is "
            f"written {mark}, and {name} would not be read",
            hint=f"rename it to {mark}; a field that means something else takes another name",
        )


def _letters(name: object) -> str:
    return str(name).lower().translate(_JOINTS)


def _read(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str, where: str
) -> Iterator[tuple[str, Kind, float]]:
    """Return the fields that are there, each with its kind and weight: 1 for yes, 0 for no."""
    for name, kind in kinds.items():
        value = content.get(name)
        if value is None or value == "":
            continue
        truth, label = read_truth(value), f"{prefix}{name}"
        if kind in ("refuse", "list"):
            raise DataError(
                f"{where}: {label} marks what is trained in a way that is not read here",
                hint="train: false on a message leaves it out, and on a row the row; a mask is a "
                "list of 0 and 1, one for each message, or for each of input_ids; a column that "
                "means something else takes another name",
            )
        if kind == "weight" and (weight := _weight(value)) is not None:
            yield name, kind, weight
            continue
        if truth is None:
            if kind in ("good", "train?"):
                continue
            raise _not_allowed(label, kind, value, where)
        if kind == "good" and not truth:
            raise DataError(
                f"{where}: {label} is {_shown(value)}: rows labelled false are examples of bad "
                "answers, which training would imitate",
                hint="--objective kto learns from good and bad answers; or keep the rows labelled "
                "true; a label that means something else takes another name",
            )
        yield name, kind, float(not truth if kind == "masked" else truth)


def _weight(value: Any) -> float | None:
    """Return a number from 0 on, which tables such as CSV have as text; None for anything else."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        number = math.nan
    return number if number == 0 or _MIN_WEIGHT <= number <= _MAX_WEIGHT else None


def read_truth(value: Any) -> bool | None:
    """Return true or false, which tables such as CSV have as text; None for anything else."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _not_allowed(label: str, kind: Kind, value: Any, where: str) -> DataError:
    if kind in ("weight", "list"):
        allowed = f"0 (not trained) and numbers from {_MIN_WEIGHT:f} to {_MAX_WEIGHT:.0f}"
        allowed = allowed if kind == "weight" else "0 (not trained) and 1 (trained)"
        return DataError(
            f"{where}: {label} is {_shown(value)}; allowed are {allowed}",
            hint="a share of the rows of a file is written NAME:WEIGHT in dataset; a column that "
            "means something else takes another name",
        )
    return DataError(
        f"{where}: {label} is {_shown(value)}; allowed are true and false",
        hint="a field that means something else takes another name",
    )


def _agreed(said: Mapping[str, tuple[str, float]], prefix: str, where: str) -> float | None:
    """Return the weight that fields agree on, by name with kind; None where there are none.

    Raises:
        DataError: They contradict each other.
    """
    if len({weight > 0 for _, weight in said.values()}) > 1:
        words = " and ".join(
            f"{prefix}{name} says {'trained' if weight else 'not trained'}"
            for name, (_, weight) in said.items()
        )
        raise DataError(f"{where}: {words}; keep one of them")
    weights = {name: weight for name, (kind, weight) in said.items() if kind == "weight"}
    if len(set(weights.values())) > 1:
        words = " and ".join(f"{prefix}{name} is {weight:g}" for name, weight in weights.items())
        raise DataError(f"{where}: {words}; keep one of them")
    return next(iter(weights.values()), next((weight for _, weight in said.values()), None))


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
