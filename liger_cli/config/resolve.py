"""Defaults, then the file, then --set, then flags: what each key is in the end, and from where."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from liger_cli.common.text import shorten
from liger_cli.config.describe import allowed, choices, nearest_key, parallel_advice
from liger_cli.config.keys import ALIASES
from liger_cli.config.run_config import RunConfig
from liger_cli.config.yaml_file import Entry, read_file, read_set, to_yaml
from liger_cli.errors import ConfigError
from liger_kernels.nearest import nearest_name

__all__ = ["ResolvedConfig", "find_problems", "flag_name", "load_config", "resolve_config"]

# A placeholder of the one required key where a file is checked that need not have it.
_NO_MODEL = {"model": "not set"}

# Unknown keys that get advice; a search takes milliseconds, and a file may have 10 000 keys.
_MAX_ADVICE = 20

# Errors whose message names every allowed value by itself.
_SELF_EXPLAINED = {"literal_error", "value_error", "string_too_short"} | {
    f"{side}_than{equal}" for side in ("greater", "less") for equal in ("", "_equal")
}


@dataclass(frozen=True)
class ResolvedConfig:
    """The value of every key, and the sources that set it.

    Attributes:
        values: Every key in the order of RunConfig, as JSON has it; model may be None: not set.
        sources: By key, the source that won, then those it overrode; keys left alone are absent.
    """

    values: dict[str, Any]
    sources: dict[str, list[str]]

    def source(self, key: str) -> str:
        """Return where a value comes from: FILE:LINE, --set KEY=VALUE, a flag, or default."""
        return self.sources.get(key, ["default"])[0]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return for every key its value, its source and the sources that were overridden."""
        return {
            key: {
                "value": value,
                "source": self.source(key),
                "overridden": self.sources.get(key, [])[1:],
            }
            for key, value in self.values.items()
        }

    def to_yaml(self, *, with_sources: bool = False) -> str:
        """Return the YAML of all keys, if asked with the sources of each as a comment."""
        text = to_yaml(self.values)
        if not with_sources:
            return text
        lines = text.splitlines()
        width = max(map(len, lines))
        return "".join(
            f"{line:{width}}  # {self._comment(key)}\n"
            for line, key in zip(lines, self.values, strict=True)
        )

    def _comment(self, key: str) -> str:
        lost = self.sources.get(key, [])[1:]
        return self.source(key) + (f" (over {', '.join(lost)})" if lost else "")


def load_config(
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    *,
    warn_unknown: Callable[[str], None] | None = None,
    drops: Sequence[str] = (),
) -> RunConfig:
    """Return the configuration of a run: defaults, then the file, then --set, then flags.

    Args:
        path: A YAML file of keys.
        flags: Values by key; a value of None is a flag that was not given.
        sets: "key=value" strings; the value is read as YAML.
        warn_unknown: Called with a line for each unknown key, which is then ignored, not refused.
        drops: Keys of the file that do not count.

    Raises:
        ConfigError: For an unreadable file and for unknown, repeated or invalid keys, all of them
            at once, each with its file, line and column.
    """
    return _collect(path, flags, sets, warn_unknown, drops).validate({})


def resolve_config(
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    *,
    warn_unknown: Callable[[str], None] | None = None,
    drops: Sequence[str] = (),
) -> ResolvedConfig:
    """Resolve the values that load_config would take, with sources; a model need not be set.

    Raises:
        ConfigError: As load_config.
    """
    given = _collect(path, flags, sets, warn_unknown, drops)
    values = given.validate(_NO_MODEL).model_dump(mode="json")
    sources = {
        key: [given.entries[rank].source for rank in ranks] for key, ranks in given.ranks.items()
    }
    if "model" not in sources:
        values["model"] = None
        sources["model"] = ["not set: give --model"]
    return ResolvedConfig(values, sources)


def find_problems(path: Path) -> list[str]:
    """Return everything that is wrong with a file, a line each; a model need not be set."""
    try:
        resolve_config(path)
    except ConfigError as error:
        return error.message.splitlines()
    return []


def flag_name(key: str) -> str:
    """Return the flag of a key."""
    return "--" + key.replace("_", "-")


class _Given:
    """The values that a user has set, in the order of the sources, and their problems.

    Attributes:
        entries: Of all sources, the weakest first.
        ranks: By key, the positions of its entries, the winning one first.
        problems: Positions with messages.
    """

    def __init__(self, warn_unknown: Callable[[str], None] | None) -> None:
        self._warn_unknown = warn_unknown
        self._num_unknown = 0
        self.entries: list[Entry] = []
        self.ranks: dict[str, list[int]] = {}
        self.problems: list[tuple[int, str]] = []

    def add(self, read: Callable[[], Iterable[Entry]]) -> None:
        """Add a source, which wins over those before it."""
        try:
            entries = read()
        except ConfigError as error:
            self.problems.append((len(self.entries), error.message))
            return
        seen: dict[str, Entry] = {}
        for entry in entries:
            rank = len(self.entries)
            self.entries.append(entry)
            key = ALIASES.get(entry.name, entry.name)
            if key not in RunConfig.model_fields:
                self._num_unknown += 1
                near = _advice(entry) if self._num_unknown <= _MAX_ADVICE else ""
                message = f"{entry.at_name}: unknown key '{shorten(entry.name)}'{near}"
                if self._warn_unknown is None:
                    self.problems.append((rank, message))
                else:
                    self._warn_unknown(message)
            elif key in seen:
                first = seen[key].source
                message = f"{entry.at_name}: {entry.name!r} is set twice, first at {first}"
                self.problems.append((rank, message))
            else:
                seen[key] = entry
                self.ranks.setdefault(key, []).insert(0, rank)

    def validate(self, placeholders: Mapping[str, Any]) -> RunConfig:
        """Return the configuration.

        Args:
            placeholders: Values for required keys that may be missing.

        Raises:
            ConfigError: All problems, in the order of the entries.
        """
        values = {key: self.entries[ranks[0]].value for key, ranks in self.ranks.items()}
        problems = list(self.problems)
        config = None
        try:
            config = RunConfig(**{**placeholders, **values})
        except ValidationError as error:
            problems += self._explain(error)
            # Conflicts are looked for once every key is valid, so the invalid ones are left out.
            bad = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
            valid = {key: value for key, value in values.items() if key not in bad}
            try:
                if bad:
                    RunConfig(**{**_NO_MODEL, **valid})
            except ValidationError as conflicts:
                problems += self._explain(conflicts, left_out=bad)
        if config is None and not problems:
            problems.append((0, "model is missing: give --model or set it in the file"))
        if config is None or problems:
            unknown = any("unknown key" in text for _, text in problems)
            raise ConfigError(
                "\n".join(text for _, text in sorted(problems, key=lambda problem: problem[0])),
                hint="`liger config show` lists every key." if unknown else None,
            )
        return config

    def _explain(
        self, error: ValidationError, left_out: Set[str] = frozenset()
    ) -> Iterator[tuple[int, str]]:
        for detail in error.errors():
            if detail["type"] == "conflicts":
                for conflict in detail["ctx"]["found"]:
                    if left_out & set(conflict["keys"]):
                        # With a default in place of what was left out; it need not be one at all.
                        continue
                    keys = self.ranks.keys() & conflict["keys"]
                    ranks = sorted(self.ranks[key][0] for key in keys)
                    places = ", ".join(self.entries[rank].at_value for rank in ranks)
                    yield ranks[-1], f"{places}: {conflict['message']}"
            elif detail["type"] != "missing":
                key = str(detail["loc"][0])
                rank = self.ranks[key][0]
                yield rank, f"{self.entries[rank].at_value}: {_invalid(key, detail)}"


def _collect(
    path: Path | None,
    flags: Mapping[str, Any] | None,
    sets: Iterable[str],
    warn_unknown: Callable[[str], None] | None,
    drops: Sequence[str],
) -> _Given:
    given = _Given(warn_unknown)
    if path is not None:
        given.add(lambda: [entry for entry in read_file(path) if entry.name not in drops])
    given.add(lambda: [read_set(text) for text in sets])
    words = [_flag_entry(key, value) for key, value in (flags or {}).items() if value is not None]
    given.add(lambda: words)
    return given


def _flag_entry(key: str, value: Any) -> Entry:
    flag = flag_name(key)
    if value is False:
        flag = f"--no-{flag[2:]}"
    return Entry(key, value, flag, flag, flag)


def _advice(entry: Entry) -> str:
    """Return the end of a message on an unknown key: the key that was probably meant."""
    if advice := parallel_advice(entry.name):
        return advice
    if not isinstance(entry.value, Mapping):
        near = nearest_key(entry.name)
        return f"; did you mean {near!r}?" if near else ""
    inner = [str(key) for key in list(entry.value)[:20]]
    found = (nearest_key(key) or nearest_key(f"{entry.name}.{key}") for key in inner)
    keys = ", ".join(dict.fromkeys(key for key in found if key))
    advice = f": write {keys} at the left margin" if keys else ""
    return f"; a configuration has no sections{advice}"


def _invalid(key: str, detail: Mapping[str, Any]) -> str:
    if detail["type"] in ("ops", "objective"):
        # A whole sentence, which names the op, the list or the objective.
        return shorten(detail["msg"], 400)
    message = re.sub("^(Value error, |Input |String )", "", detail["msg"])
    value = detail["input"]
    text = f"{key} {message}, got {_show(value)}"
    if detail["type"] not in _SELF_EXPLAINED:
        return f"{text}; allowed: {allowed(key)}"
    near = nearest_name(str(value).lower(), choices(key))
    return f"{text}; did you mean {near!r}?" if near else text


class _ShortRepr(reprlib.Repr):
    """Values as YAML writes them, cut to a part of a line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = self.maxdict = self.maxlist = 3
        self.maxstring = self.maxother = 60

    def repr1(self, x: Any, level: int) -> str:
        if x is None or isinstance(x, bool):
            return {None: "null", True: "true", False: "false"}[x]
        return super().repr1(str(x) if isinstance(x, Path) else x, level)


def _show(value: object) -> str:
    return shorten(_ShortRepr().repr(value), 200)
