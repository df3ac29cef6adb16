"""The datasets of a run: the key `dataset` as text or as entries, and the names that rows have.

A mapping is written ours to theirs. In YAML it is a mapping, as a flag OURS=THEIRS,OURS=THEIRS.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from liger_cli.common.readers import path_exists
from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name

__all__ = [
    "COLUMNS",
    "ENTRY_SCHEMA",
    "MARKS",
    "ROLES",
    "TURN_FIELDS",
    "ColumnNames",
    "DatasetEntry",
    "Datasets",
    "FieldNames",
    "Naming",
    "RoleNames",
    "datasets_name",
    "read_datasets",
    "read_entry",
    "split_names",
]

# The columns, roles and fields of messages that a mapping can name.
MARKS = (
    *("weight", "loss_weight", "loss_scale", "train", "training", "trainable", "learn", "loss"),
    *("loss_mask", "masked"),
)
COLUMNS = (
    *("text", "prompt", "completion", "instruction", "input", "output", "system", "history"),
    *("messages", "conversations", "tools", "images", "input_ids", "labels", "mask_history"),
    *("train", "training", "trainable", "learn", "loss", "masked", "weight", "loss_weight"),
    *("sample_weight", "loss_mask", "mask", "label", "kto_tag"),
    *("chosen", "rejected", "margin", "ref_chosen_logps", "ref_rejected_logps"),
)
ROLES = ("system", "user", "assistant", "tool", "function_call")
TURN_FIELDS = (
    *("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"),
    *MARKS,
)


@dataclass(frozen=True)
class Naming:
    """The names of a dataset: ours to theirs.

    Args:
        columns: Of a row.
        roles: Of who speaks; a role may have several names.
        message_fields: Of a message or a turn.
        as_llama_factory: Columns that are not named are not used, and an input follows its
            instruction on the next line.
        instruction_style: How instructions are written: chat, by the chat template where there is
            one, or alpaca, in Alpaca's words.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    message_fields: Mapping[str, str] = field(default_factory=dict)
    as_llama_factory: bool = False
    instruction_style: str = "chat"


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a run.

    Args:
        path: A file, folder, glob, hub name, chitchat or synthetic.
        weight: Its share of the rows of an epoch, relative to the others.
        split: Which split of a hub or saved dataset; by default the usual one.
        columns, roles, message_fields: As in Naming; None takes those of all datasets.
        max_samples: Rows that are read, the first.
        min_length: Rows of fewer tokens are left out and counted.
        delimiter: Between the fields of a CSV or TSV file.
        encoding: Of a file of text.
        data_key: Where the rows of a JSON file are: a key, or several joined by dots.
        instruction_style: As in Naming; None is chat.
        as_llama_factory: As in Naming; no key says it.
    """

    path: str
    weight: float | None = None
    split: str | None = None
    columns: Mapping[str, str] | None = None
    roles: Mapping[str, Sequence[str]] | None = None
    message_fields: Mapping[str, str] | None = None
    max_samples: int | None = None
    min_length: int | None = None
    delimiter: str | None = None
    encoding: str | None = None
    data_key: str | None = None
    instruction_style: str | None = None
    as_llama_factory: bool = False

    @property
    def naming(self) -> Naming:
        """The names of its rows."""
        return Naming(
            self.columns or {},
            self.roles or {},
            self.message_fields or {},
            self.as_llama_factory,
            self.instruction_style or "chat",
        )


_ENTRY_KEYS = ("path", *(part.name for part in fields(DatasetEntry) if part.default is None))


def split_names(text: str) -> list[tuple[str, float | None]]:
    """Return the datasets that a value of `dataset` names, each with its weight if it has one.

    Several are written NAME:WEIGHT,NAME,...; the path of one that exists is taken as it is.
    """
    if path_exists(text):
        return [(text, None)]
    found: list[tuple[str, float | None]] = []
    for part in text.split(","):
        name, colon, tail = part.strip().rpartition(":")
        try:
            weight = float(tail) if colon else None
        except ValueError:
            weight = None
        found.append((part.strip(), None) if weight is None else (name, weight))
    for name, weight in found:
        if not name or (weight is not None and not 0 < weight < float("inf")):
            raise ConfigError(
                f"{text!r}: each of several is NAME or NAME:WEIGHT, with a weight above 0"
            )
    return found


def read_datasets(
    value: str | Sequence[Mapping[str, Any]], naming: Naming | None = None
) -> list[DatasetEntry]:
    """Return the entries of a value of `dataset`.

    Args:
        value: Text, or entries as the key holds them.
        naming: Of the entries that have none of theirs.

    Raises:
        ConfigError: As split_names.
    """
    if isinstance(value, str):
        entries = [DatasetEntry(name, weight) for name, weight in split_names(value)]
    else:
        entries = [DatasetEntry(**entry) for entry in value]
    names = ("columns", "roles", "message_fields")
    common = {name: getattr(naming, name) for name in names if naming and getattr(naming, name)}
    return [
        DatasetEntry(**{**common, **{k: v for k, v in vars(entry).items() if v is not None}})
        for entry in entries
    ]


def datasets_name(value: str | Sequence[Mapping[str, Any] | DatasetEntry]) -> str:
    """Return the names of datasets with their weights, as text has them."""
    if isinstance(value, str):
        return value
    entries = [asdict(entry) if isinstance(entry, DatasetEntry) else entry for entry in value]
    return ",".join(_plain_words(entry) for entry in entries)


def _plain_words(entry: Mapping[str, Any]) -> str:
    weight = entry.get("weight")
    return entry["path"] if weight is None else f"{entry['path']}:{weight}"


# The value of `dataset`: text where text can say it, else a list of entries.


def _read_entries(value: object) -> object:
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    if not value:
        raise ValueError("should name a dataset")
    entries = [read_entry(entry) for entry in value]
    is_text = all(set(entry) <= {"path", "weight"} for entry in entries) and not any(
        re.search(r",|:[\d.e+-]+$", entry["path"]) for entry in entries
    )
    return datasets_name(entries) if is_text else entries


def read_entry(
    entry: object, more: Mapping[str, Callable[[object], Any]] = MappingProxyType({})
) -> dict[str, Any]:
    """Return an entry of a list of datasets, its values checked.

    Args:
        entry: A name, or a mapping with path.
        more: Readers of keys that an entry may have here beside those of `dataset`.

    Raises:
        ValueError: The entry or a value is not one, or a key is unknown.
    """
    known = (*_ENTRY_KEYS, *more)
    if isinstance(entry, str):
        entry = {"path": entry}
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError("a dataset of a list is a name, or a mapping with path")
    for key in entry:
        if key not in known:
            near = nearest_name(str(key), known)
            raise ValueError(
                f"(entry {str(entry['path'])[:60]!r}): unknown key {str(key)[:60]!r}"
                f"{f'; did you mean {near}?' if near else ''} (keys: {', '.join(known)})"
            )
    result: dict[str, Any] = {}
    for key, value in entry.items():
        if value is None:
            continue
        try:
            result[key] = {**_ENTRY_VALUES, **more}[key](value)
        except ValueError as error:
            raise ValueError(f"(entry {str(entry['path'])[:60]!r}): {key} {error}") from None
    return result


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise ValueError("should be text without control characters")
    return value


def _weight(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        raise ValueError("should be a number above 0")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError("should be an integer from 1 on")
    return value


def _delimiter(value: object) -> str:
    value = {"\\t": "\t", "tab": "\t"}.get(value, value) if isinstance(value, str) else value
    if not isinstance(value, str) or len(value) != 1 or value in '\r\n"\0':
        raise ValueError("should be one character, or tab")
    # A tab would be no text of a configuration.
    return "tab" if value == "\t" else value


def _style(value: object) -> str:
    if value not in ("chat", "alpaca"):
        raise ValueError("should be chat or alpaca")
    return str(value)


def _encoding(value: object) -> str:
    try:
        return codecs.lookup(_text(value)).name
    except LookupError:
        raise ValueError(
            "should be an encoding that Python knows, such as cp1252 or utf-16"
        ) from None


def _pairs_of(value: object, *, many: bool) -> dict[Any, Any]:
    """Return a mapping, which as a flag is OURS=THEIRS,OURS=THEIRS."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError("should map our names to those of the data, OURS=THEIRS,OURS=THEIRS")
    found: dict[str, Any] = {}
    for pair in value.split(","):
        ours, equals, theirs = (part.strip() for part in pair.partition("="))
        if not equals or not ours or not theirs:
            raise ValueError("should be OURS=THEIRS,OURS=THEIRS")
        if ours in found and not many:
            raise ValueError(f"names {ours!r} twice")
        found[ours] = [*found.get(ours, []), theirs] if many else theirs
    return found


def _names(known: Sequence[str], *, many: bool = False) -> Callable[[object], dict[str, Any]]:
    """Return the reader of a mapping whose names on our side are known."""

    def read(value: object) -> dict[str, Any]:
        owners: dict[str, str] = {}
        result: dict[str, Any] = {}
        for ours, theirs in _pairs_of(value, many=many).items():
            if ours not in known:
                raise ValueError(_no_name_of_ours(ours, theirs, known))
            names = theirs if many and isinstance(theirs, list) else [theirs]
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(f"should map {ours} to a name{' or a list of names' * many}")
            for name in map(_text, names):
                if owners.setdefault(name, ours) != ours:
                    raise ValueError(f"has {name!r} for both {owners[name]} and {ours}")
            result[ours] = list(names) if many else theirs
        if not result:
            raise ValueError("should map a name")
        return result

    return read


def _no_name_of_ours(ours: object, theirs: object, known: Sequence[str]) -> str:
    near = nearest_name(str(ours)[:60], known)
    advice = f"; did you mean {near}?" if near else ""
    if isinstance(theirs, str) and theirs in known:
        # The other way round is the mistake that is made most.
        advice = f"; ours come first: {theirs}: {ours}"
    return f"has {str(ours)[:60]!r}, which is none of our names{advice} (ours: {', '.join(known)})"


_ENTRY_VALUES: dict[str, Callable[[object], Any]] = {
    **dict.fromkeys(("path", "split", "data_key"), _text),
    **dict.fromkeys(("max_samples", "min_length"), _count),
    "weight": _weight,
    "delimiter": _delimiter,
    "instruction_style": _style,
    "encoding": _encoding,
    "columns": _names(COLUMNS),
    "roles": _names(ROLES, many=True),
    "message_fields": _names(TURN_FIELDS),
}

_NAMES: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}
_ROLE_NAMES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]
    },
}
ENTRY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        **dict.fromkeys(("path", "split", "delimiter", "encoding", "data_key"), {"type": "string"}),
        **dict.fromkeys(("columns", "message_fields"), _NAMES),
        "roles": _ROLE_NAMES,
        "instruction_style": {"enum": ["chat", "alpaca"]},
        "weight": {"type": "number", "exclusiveMinimum": 0},
        **dict.fromkeys(("max_samples", "min_length"), {"type": "integer", "minimum": 1}),
    },
    "required": ["path"],
    "additionalProperties": False,
}
_MANY = {"type": "array", "items": {"anyOf": [{"type": "string"}, ENTRY_SCHEMA]}}

# A flag spells the first type of a key; a file may also have the second.
Datasets = Annotated[
    str | list[dict[str, Any]],
    BeforeValidator(_read_entries),
    WithJsonSchema({"anyOf": [{"type": "string"}, ENTRY_SCHEMA, _MANY]}),
]


def _mapping(key: str, schema: dict[str, Any]) -> Any:
    def read(value: object) -> object:
        return None if value is None else _ENTRY_VALUES[key](value)

    return Annotated[
        str | dict[str, Any],
        BeforeValidator(read),
        WithJsonSchema({"anyOf": [{"type": "string"}, schema]}),
    ]


ColumnNames = _mapping("columns", _NAMES)
RoleNames = _mapping("roles", _ROLE_NAMES)
FieldNames = _mapping("message_fields", _NAMES)
