"""The formats of rows by their columns, and the fields that say what of a row is not trained."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from liger_cli.errors import DataError

__all__ = [
    "FORMATS",
    "MESSAGE_FIELDS",
    "OPTIONAL",
    "ROW_FIELDS",
    "WANTED",
    "Marks",
    "find_format",
    "message_mark",
    "row_marks",
]

# The formats, by the columns that make them; the first that fits the first row is the source's.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt and completion": ("prompt", "completion"),
    "instruction and output": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL: dict[str, tuple[str, ...]] = {
    "messages": ("system", "tools", "images"),
    "conversations": ("system", "tools", "images"),
    "instruction and output": ("input", "system", "history"),
}
WANTED = (
    "text; or prompt and completion; or instruction, output and perhaps input, system and history; "
    "or messages (a list of role and content); or conversations (a list of from and value)"
)

_TURNS = ("messages", "conversations", "instruction and output")
_ANSWERS = (*_TURNS, "prompt and completion")
_ALL = tuple(FORMATS)

# How a field is read:
#   weight  1: trained, 0: not; between them there is nothing
#   train   true: trained, false: not
#   train?  the same where the value is true or false; anything else is a figure about the row
#   masked  true: not trained, false: trained
#   good    true: a good answer, false: an example of a bad one, which cannot be trained on here
#   last    true: of several answers only the last is trained
#   refuse  says something about training that has no meaning here
Kind = Literal["weight", "train", "train?", "masked", "good", "last", "refuse"]

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
    "loss_mask": ("refuse", _ALL),
    "mask": ("refuse", _ALL),
    "labels": ("refuse", _ALL),
}

_WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


@dataclass(frozen=True)
class Marks:
    """The content of a row's fields.

    Args:
        fields: Those that were read.
        is_trained: Whether anything of the row is trained.
        only_last: Whether of several answers only the last is trained.
    """

    fields: tuple[str, ...] = ()
    is_trained: bool = True
    only_last: bool = False


def find_format(columns: Sequence[str] | Mapping[str, Any]) -> str | None:
    """Return the format that columns make, or None."""
    return next((name for name, wanted in FORMATS.items() if set(wanted) <= set(columns)), None)


def row_marks(content: Mapping[str, Any], form: str, where: str) -> Marks:
    """Read the fields of a row of one of the FORMATS.

    Raises:
        DataError: A field asks for what is not done here, or its value is not allowed.
    """
    kinds = {name: kind for name, (kind, forms) in ROW_FIELDS.items() if form in forms}
    found = {name: (kind, truth) for name, kind, truth in _read(content, kinds, "", where)}
    trained = {name: truth for name, (kind, truth) in found.items() if kind in _TRAINED}
    _check_agreement(trained, "", where)
    return Marks(
        tuple(found),
        is_trained=all(trained.values()),
        only_last=any(truth for kind, truth in found.values() if kind == "last"),
    )


def message_mark(message: Mapping[str, Any], name: str, where: str) -> bool | None:
    """Return whether the fields of a message say that it is trained, or None: they say nothing.

    Args:
        name: Of the message, for errors: messages[3].

    Raises:
        DataError: As row_marks.
    """
    read = _read(message, MESSAGE_FIELDS, f"{name}.", where)
    found = {key: truth for key, kind, truth in read if kind in _TRAINED}
    _check_agreement(found, f"{name}.", where)
    return next(iter(found.values()), None)


_TRAINED = ("weight", "train", "train?", "masked")


def _read(
    content: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str, where: str
) -> Iterator[tuple[str, Kind, bool]]:
    """Return the fields that are there, each with its kind and whether it says yes."""
    for name, kind in kinds.items():
        value = content.get(name)
        if value is None or value == "":
            continue
        truth, label = _truth(value), f"{prefix}{name}"
        if kind == "refuse":
            raise DataError(
                f"{where}: {label} marks what is trained in a way that is not read here",
                hint="train: false on a message leaves it out, and on a row the row; a column that "
                "means something else takes another name",
            )
        if truth is None:
            if kind in ("good", "train?"):
                continue
            raise _not_allowed(label, kind, value, where)
        if kind == "good" and not truth:
            raise DataError(
                f"{where}: {label} is {_shown(value)}: rows labelled false are examples of bad "
                "answers, which training would imitate",
                hint="keep the rows labelled true; a label that means something else takes "
                "another name",
            )
        yield name, kind, not truth if kind == "masked" else truth


def _truth(value: Any) -> bool | None:
    """True or false; tables such as CSV have them as text."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _not_allowed(label: str, kind: Kind, value: Any, where: str) -> DataError:
    if kind == "weight":
        return DataError(
            f"{where}: {label} is {_shown(value)}; allowed are 0 (not trained) and 1 (trained)",
            hint="a share of the rows of a file is written NAME:WEIGHT in dataset; a column that "
            "means something else takes another name",
        )
    return DataError(
        f"{where}: {label} is {_shown(value)}; allowed are true and false",
        hint="a field that means something else takes another name",
    )


def _check_agreement(trained: Mapping[str, bool], prefix: str, where: str) -> None:
    if len(set(trained.values())) > 1:
        said = " and ".join(
            f"{prefix}{name} says {'trained' if truth else 'not trained'}"
            for name, truth in trained.items()
        )
        raise DataError(f"{where}: {said}; keep one of them")


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:40]}..."
