"""A configuration file as text: flat YAML, read strictly and with the place of every key.

The dialect is YAML without its traps: no tags, no anchors and aliases (a few hundred bytes of them
fill any memory), no merge keys, no dates, no octal or base-60 numbers (010 and 1:30 are text), and
1e-4 is a number, which PyYAML alone would take for text.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liger_cli.common.readers import read_file_bytes
from liger_cli.common.text import shorten
from liger_cli.errors import ConfigError

__all__ = ["Entry", "read_file", "read_mapping", "read_set", "to_yaml"]

# A page of YAML has a few kB; this is a model or a dataset, given by mistake.
_MAX_BYTES = 256 * 1024
# A configuration is flat, and that of a model in a preset has parts.
_MAX_DEPTH = 20

# The words of PyYAML, and what they mean for somebody who has made the mistake.
_PLAIN_WORDS = (
    (r"character '\t'", "there is a tab; YAML indents with spaces"),
    (
        "mapping values are not allowed",
        "there is a second ':' in this value, which then needs quotes, or the line is indented "
        "although nothing opens a section",
    ),
    ("expected <block end>", "this line is not aligned with the keys above it"),
    ("could not find expected ':'", "a key without ': VALUE' after it"),
    ("found another document", "'---' starts a second document"),
)


@dataclass(frozen=True)
class Entry:
    """One key that a user has set.

    Attributes:
        name: As it was written.
        source: Where, in short: FILE:LINE, --set KEY=VALUE or a flag.
        at_name: The place of the name, with its column in a file.
        at_value: The place of the value, likewise.
    """

    name: str
    value: Any
    source: str
    at_name: str
    at_value: str


class _TooDeep(yaml.composer.ComposerError):
    pass


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag, anchor = getattr(event, "tag", None), getattr(event, "anchor", None)
        message = None
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            message = (
                f"anchors and aliases such as {sign + anchor!r} are not used here; write the value "
                "out, and in quotes where it is text"
            )
        elif tag is not None:
            message = f"tags such as {tag!r} are not used here; quotes make a value text"
        elif self._depth == _MAX_DEPTH:
            message = f"nested too deep, more than {_MAX_DEPTH} levels"
            raise _TooDeep(None, None, message, event.start_mark)
        if message is not None:
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what either reader, this one or plain PyYAML, would take for more than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_NUMBER = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$"
    r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
# An integer of more digits is text: Python refuses to convert the longest ones.
_INTEGER = re.compile(r"[-+]?(0|[1-9](_?\d){0,40})$")
_BOOLEAN = re.compile("(yes|no|true|false|on|off)$", re.IGNORECASE)
_NULL = re.compile("(~|null|Null|NULL|)$")

for _tag, _pattern, _first in (
    ("float", _NUMBER, "-+.0123456789"),
    ("int", _INTEGER, "-+0123456789"),
    ("bool", _BOOLEAN, "yYnNtTfFoO"),
    ("null", _NULL, ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_file(path: Path) -> list[Entry]:
    """Return the keys of a YAML file in its order, repeated and unknown ones too.

    Raises:
        ConfigError: The file is unreadable, not YAML, or not one mapping; with line and column.
    """
    shown = shorten(str(path), 1000)
    text = _read_text(path, shown)
    try:
        return _entries(text, shown)
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = f"{shown}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        character = ascii(text[error.position])
        raise ConfigError(
            f"{place}: not valid YAML: the character {character} is not allowed"
        ) from None
    except _TooDeep as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{shown}:{line}:1: {error.problem}") from None
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{_place(shown, error)}: not valid YAML: {_explain(error)}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the keys and values of a YAML file that liger wrote or ships with; the last counts.

    Raises:
        ConfigError: As read_file, or the file is a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} cannot be read: it is no regular file")
    return {entry.name: entry.value for entry in read_file(path)}


def read_set(text: str) -> Entry:
    """Return the key of a --set KEY=VALUE; the value is read as YAML.

    Raises:
        ConfigError: There is no "=", or the value is not valid YAML.
    """
    source = f"--set {shorten(text)}"
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"{source}: expected KEY=VALUE")
    try:
        loader = _Loader(value)
        try:
            parsed = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        why = _explain(error) if isinstance(error, yaml.MarkedYAMLError) else "it cannot be read"
        raise ConfigError(f"{source}: the value is not valid YAML: {why}") from None
    return Entry(name.strip().replace("-", "_"), parsed, source, source, source)


def to_yaml(values: Mapping[str, Any]) -> str:
    """Return one line a key, which read_file reads back to equal values."""
    return "".join(
        # What is nested is written in brackets.
        f"{key}: {_dumped(value, flow=True)}"
        if value and isinstance(value, dict | list)
        else _dumped({key: value})
        for key, value in values.items()
    )


def _dumped(value: object, *, flow: bool = False) -> str:
    return yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
        default_flow_style=flow,
    )


def _read_text(path: Path, shown: str) -> str:
    try:
        content = read_file_bytes(path, max_bytes=_MAX_BYTES, any_kind=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) == errno.EFBIG:
            reason = f"it has more than {_MAX_BYTES // 1024} kB, so it is no configuration"
        raise ConfigError(f"the configuration {shown} cannot be read: {reason}") from None
    try:
        # Editors on Windows put a byte order mark in front and end lines with CR LF.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{shown}:{line}: the configuration is not UTF-8 text") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _entries(text: str, shown: str) -> list[Entry]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            what = "is empty" if root is None else "is no mapping of keys to values"
            raise ConfigError(
                f"{shown}:1:1: the configuration {what}; it has lines such as `model: llama`"
            )
        entries = []
        for key, value in root.value:
            source, at_name = _source(shown, key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{at_name}: a key must be a name, found a {key.id}")
            parsed = loader.construct_object(value, deep=True)
            at_value = _source(shown, value.start_mark)[1]
            entries.append(Entry(str(key.value), parsed, source, at_name, at_value))
        return entries
    finally:
        loader.dispose()


def _source(shown: str, mark: Any) -> tuple[str, str]:
    return f"{shown}:{mark.line + 1}", f"{shown}:{mark.line + 1}:{mark.column + 1}"


def _place(shown: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return _source(shown, mark)[1] if mark else f"{shown}:1:1"


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = shorten(error.problem or "it cannot be read")
    return next((plain for words, plain in _PLAIN_WORDS if words in problem), problem)
