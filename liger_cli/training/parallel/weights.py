"""The weights of a model in safetensors, of which a process reads the parts that it holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from liger_cli.common.readers import read_json
from liger_cli.errors import ConfigError
from liger_cli.training.model.presets import ModelSource

__all__ = ["WeightFiles", "Weights", "find_files"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def find_files(source: ModelSource, folder: Path) -> list[Path] | None:
    """Return the safetensors of a model's folder; None where its weights are in other files.

    Raises:
        ConfigError: The index cannot be read, or names a file that is missing.
    """
    if not (folder / _INDEX).is_file():
        return [folder / _ONE] if (folder / _ONE).is_file() else None
    try:
        names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / _INDEX} cannot be read: {error!r}") from error
    for name in names:
        if not (folder / str(name)).is_file():
            raise ConfigError(f"the model {source.name} lacks the file {folder / str(name)}")
    return [folder / str(name) for name in names]


class WeightFiles:
    """Open safetensors; a context manager.

    Attributes:
        num_bytes: Bytes read so far, in the dtype of the files.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._stack = ExitStack()
        self._slices: dict[str, Any] = {}
        self.num_bytes = 0

    def __enter__(self) -> WeightFiles:
        for file in self._files:
            try:
                opened = self._stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            # safetensors raises its own kind of error for a damaged file.
            except Exception as error:
                raise ConfigError(f"{file} is no file of safetensors: {error}") from error
        return self

    def __exit__(self, *error: Any) -> None:
        self._slices = {}
        self._stack.close()

    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> list[int]:
        return list(self._slices[name].get_shape())

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some rows of it."""
        part = self._slices[name]
        found: Tensor = part[:] if rows is None or not part.get_shape() else part[rows]
        self.num_bytes += found.numel() * found.element_size()
        return found


@dataclass(frozen=True)
class _Conversion:
    """Tensors of the files that transformers turns into others.

    Attributes:
        converter: Of transformers.
        first_target: The name that transformers calls the conversion by.
        sources: Names in the files, each with the pattern that it matched.
    """

    converter: Any
    first_target: str
    sources: list[tuple[str, str]]


@dataclass(frozen=True)
class Weights:
    """Where the files have the parameters of a model.

    Attributes:
        direct: Names in the files by that in the model.
        conversions: What else the files hold.
        missing: Parameters that no file has.
    """

    direct: Mapping[str, str]
    conversions: list[_Conversion]
    missing: list[str]

    @classmethod
    def of(cls, model: Any, files: WeightFiles) -> Weights:
        """Find the parameters and saved buffers of a model in its files.

        Args:
            model: A transformers model without an adapter; it may be without weights.
        """
        state = model.state_dict(keep_vars=True)
        rename, converters = _renaming(model, state)
        direct: dict[str, str] = {}
        conversions: dict[str, _Conversion] = {}
        for name in sorted(files.names(), key=_natural):
            target, pattern = rename(name)
            if target not in state and name in state:
                target, pattern = name, None
            if target not in state:
                continue
            if pattern is None:
                direct[target] = name
                continue
            made = _Conversion(copy.deepcopy(converters.get(pattern)), target, [])
            conversions.setdefault(target, made).sources.append((name, pattern))
        found = set(direct)
        for conversion in conversions.values():
            found |= set(_targets(conversion, state))
        by_id = {id(state[name]) for name in found}
        missing = [name for name, value in state.items() if id(value) not in by_id]
        return cls(direct, list(conversions.values()), missing)

    def converted(self, model: Any, files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
        """Yield the name in the model and the whole value of each tensor that is converted."""
        for conversion in self.conversions:
            converter = copy.deepcopy(conversion.converter)
            for name, pattern in conversion.sources:
                read = _later(files, name)
                converter.add_tensor(conversion.first_target, name, pattern, read)
            found = converter.convert(conversion.first_target, model=model, config=model.config)
            for target, value in found.items():
                yield target, value[0] if isinstance(value, list) else value


def _later(files: WeightFiles, name: str) -> Callable[[], Tensor]:
    return lambda: files.read(name)


def _targets(conversion: _Conversion, state: Mapping[str, Any]) -> list[str]:
    """Return the parameters that a conversion makes: its first and those of the other patterns."""
    patterns = [str(pattern) for pattern in conversion.converter.target_patterns]
    first = conversion.first_target
    others = [first.replace(patterns[0], pattern) for pattern in patterns]
    return [name for name in others if name in state]


_Rename = Callable[[str], tuple[str, str | None]]


def _renaming(model: Any, state: Mapping[str, Any]) -> tuple[_Rename, dict[str, Any]]:
    """Return how names in files become those of a model, and the conversions by their pattern."""
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError:
        # Before transformers 5 there are patterns of names alone.
        patterns = getattr(type(model), "_checkpoint_conversion_mapping", None) or {}

        def by_patterns(name: str) -> tuple[str, str | None]:
            for pattern, new in patterns.items():
                name = re.sub(pattern, new, name)
            if name not in state and f"{prefix}.{name}" in state:
                name = f"{prefix}.{name}"
            elif name not in state and name.removeprefix(f"{prefix}.") in state:
                name = name.removeprefix(f"{prefix}.")
            return name, None

        return by_patterns, {}
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    def by_rules(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, prefix, state
        )
        return found

    return by_rules, {key: rule for rule in converters for key in rule.source_patterns}


def _natural(name: str) -> list[Any]:
    """Sort numbers in names as numbers: experts are stacked in their order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
