"""Log-probabilities of the reference, computed once a row before the first step.

They are computed by the code, in the dtype and in the layout of batches that the run has, of the
rows that its steps take. A file holds them under a hash of the weights, the data and the settings:
in the cache, where the next run finds them, and in the directory of the run, where a resumed one
does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from liger_cli.common.environment import cache_directory, package_version
from liger_cli.data.batches import load_windows
from liger_cli.data.feed import identity, pair_figures
from liger_cli.data.packing import PackedRows
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.objective import Setting
from liger_cli.training.objectives.reference import (
    Scorer,
    WeightsReference,
    original_weights,
)
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["RowsWithValues", "has_values", "with_values"]

_log = logging.getLogger(__name__)

_NAMES = ("ref_chosen_logps", "ref_rejected_logps")
_FILE = "reference.safetensors"
# Of load_windows: a process without a row takes part in the forward passes of the others.
_NO_ROW = -1

_SETTINGS = (
    *("ops", "attn_implementation", "save_memory", "dtype", "bf16", "fp16", "packing"),
    *("packing_strategy", "padding_free", "max_length", "per_device_train_batch_size", "ld_alpha"),
    *("load_in_4bit", "load_in_8bit", "adapter"),
)
# Of an adapter's configuration.
_SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def has_values(inputs: Inputs) -> bool:
    """Return whether the rows of a run have log-probabilities of a reference already."""
    rows = [inputs.train, *inputs.eval.values()]
    return all(_NAMES[0] in pair_figures(row) for row in rows if row is not None)


@dataclass(frozen=True)
class RowsWithValues:
    """Rows with the reference's log-probabilities of their answers.

    Args:
        rows: Pairs, or labelled answers, by number.
        values: (len(rows), len(names)) float64.
        names: Of the columns of values.
    """

    rows: Any
    values: np.ndarray[Any, Any]
    names: tuple[str, ...] = _NAMES

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {
            **self.rows[number],
            **dict(zip(self.names, self.values[number].tolist(), strict=True)),
        }


def with_values(score: Scorer, setting: Setting, names: tuple[str, ...] = _NAMES) -> Inputs:
    """Return the data of a run with the values of its reference in every row that it takes.

    Args:
        score: Scores the answers of a batch with a model.
        names: The columns that rows get: the answers of each, in the order of their scores.
    """
    inputs = setting.inputs
    sets = {f"eval {name}": rows for name, rows in inputs.eval.items()}
    if inputs.train is not None:
        sets["train"] = inputs.train
    store = _Store(score, setting, names)
    found = {name: _joined(rows, store.values(name, rows), names) for name, rows in sets.items()}
    store.save()
    return replace(
        inputs,
        train=found.get("train"),
        eval={name: found[f"eval {name}"] for name in inputs.eval},
    )


def _joined(rows: Any, values: np.ndarray[Any, Any], names: tuple[str, ...]) -> Any:
    if isinstance(rows, PackedRows):
        return replace(rows, rows=RowsWithValues(rows.rows, values, names))
    return RowsWithValues(rows, values, names)


class _Store:
    """The values of all sets of a run, from its directory, from the cache, or computed."""

    def __init__(self, score: Scorer, setting: Setting, names: tuple[str, ...]) -> None:
        self._score, self._setting, self._columns = score, setting, names
        self._kept: dict[str, np.ndarray[Any, Any]] = {}
        self._names: dict[str, str] = {}
        self._weights: str | None = None
        self._reference: WeightsReference | None = None

    def values(self, name: str, rows: Any) -> np.ndarray[Any, Any]:
        """Return the values of a set, (rows, names) float64; NaN of rows that no step takes."""
        pairs = rows.rows if isinstance(rows, PackedRows) else rows
        data = json.dumps(identity(rows), sort_keys=True)
        needed = self._needed(name, rows)
        own = self._read_own(name, data, len(pairs))
        values = own if own is not None else self._read_cache(name, data, len(pairs))
        wanted = [row for row in needed if np.isnan(values[_numbers(rows, row)]).any()]
        if wanted:
            self._compute(name, rows, wanted, values)
        self._kept[name], self._names[name] = values, data
        return values

    def _needed(self, name: str, rows: Any) -> list[int]:
        """Return the rows that the run takes."""
        setting = self._setting
        if name != "train" or setting.batches is None:
            return list(range(len(rows)))
        if setting.num_steps >= setting.batches.steps_per_epoch:
            return list(range(len(rows)))
        first = replace(
            setting.batches,
            rank=0,
            num_processes=1,
            batch_size=setting.batches.rows_per_step,
            accumulation=1,
        )
        windows = first.windows(1, setting.num_steps)
        return sorted({row for window in windows for batch in window for row in batch})

    def _read_own(self, name: str, data: str, count: int) -> np.ndarray[Any, Any] | None:
        """Return the values that the resumed run has kept, whatever its settings are now."""
        checkpoint = self._setting.checkpoint
        if checkpoint is None:
            return None
        values, metadata = _read(checkpoint.parent / _FILE, name)
        is_same = metadata.get(name) == data and values is not None
        return values if is_same and self._fits(values, count) else None

    def _fits(self, values: np.ndarray[Any, Any] | None, count: int) -> bool:
        return values is not None and values.shape == (count, len(self._columns))

    def _read_cache(self, name: str, data: str, count: int) -> np.ndarray[Any, Any]:
        values, _ = _read(self._place(data), "values")
        if values is not None and self._fits(values, count):
            return values
        return np.full((count, len(self._columns)), np.nan)

    def _place(self, data: str) -> Path:
        """Return the file of the cache for a set."""
        config, setting = self._setting.config, self._setting
        if self._weights is None:
            with self._original().exchanged():
                model = setting.accelerator.unwrap_model(setting.model)
                self._weights = _hash_of(model)
        key = {
            "weights": self._weights,
            "formula": _formula_of(setting.accelerator.unwrap_model(setting.model)),
            "data": data,
            "columns": self._columns,
            "settings": {key: getattr(config, key) for key in _SETTINGS},
            "layout": repr(setting.inputs.collator),
            "device": str(setting.accelerator.device),
            "processes": setting.accelerator.num_processes,
            "versions": [package_version(n) for n in ("torch", "transformers", "liger-kernels")],
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[
            :32
        ]
        return cache_directory() / "reference" / f"{name}.safetensors"

    def _original(self) -> WeightsReference:
        if self._reference is None:
            model = self._setting.accelerator.unwrap_model(self._setting.model)
            # A run that starts has the weights of its reference.
            resumed = self._setting.checkpoint is not None
            values = original_weights(self._setting) if resumed else _themselves(model)
            self._reference = WeightsReference(model, values)
        return self._reference

    def _compute(
        self, name: str, rows: Any, wanted: Sequence[int], values: np.ndarray[Any, Any]
    ) -> None:
        setting = self._setting
        accelerator, size = setting.accelerator, setting.config.per_device_train_batch_size
        setting.notify(f"reference: log-probabilities of {len(wanted)} rows ({name.strip()}) ...")
        together = size * accelerator.num_processes
        chunks = [wanted[i : i + together] for i in range(0, len(wanted), together)]
        mine = [chunk[accelerator.process_index :: accelerator.num_processes] for chunk in chunks]
        found: list[tuple[list[int], list[list[float]]]] = []
        reference = self._original()
        for batch, own in zip(self._batches(rows, mine), mine, strict=True):
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                sums = reference.sums(self._score, setting.model, batch)
            numbers = [number for row in own for number in _numbers(rows, row)]
            found.append((numbers, sums.view(-1, len(self._columns)).tolist()))
        for numbers, scored in gather_object(found):
            if numbers:
                values[numbers] = scored
        self._write(name, rows, values)

    def _batches(self, rows: Any, mine: Sequence[Sequence[int]]) -> Iterator[Any]:
        windows = iter([[list(own) or [_NO_ROW]] for own in mine])
        for [batch] in load_windows(rows, windows, self._setting.inputs.collator):
            yield batch

    def _write(self, name: str, rows: Any, values: np.ndarray[Any, Any]) -> None:
        place = self._place(json.dumps(identity(rows), sort_keys=True))
        if not self._setting.accelerator.is_main_process:
            return
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            _save(place, {"values": values}, {})
        except OSError as error:
            _log.warning("the cache %s cannot be written: %s", place.parent, error)

    def save(self) -> None:
        """Keep the values in the directory of the run, for a resume."""
        setting = self._setting
        if setting.run_dir is not None and setting.accelerator.is_main_process:
            setting.run_dir.mkdir(parents=True, exist_ok=True)
            _save(setting.run_dir / _FILE, self._kept, self._names)


def _numbers(rows: Any, row: int) -> list[int]:
    """Return the numbers of a row: its own, or those of the rows that are packed into it."""
    if isinstance(rows, PackedRows):
        return [int(n) for n in rows.order[rows.starts[row] : rows.starts[row + 1]]]
    return [row]


def _themselves(model: Any) -> dict[str, torch.Tensor]:
    """Return the trained parameters themselves: exchanging them changes nothing."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def _hash_of(model: Any) -> str:
    """Return a hash of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _formula_of(model: Any) -> dict[str, Any]:
    """Return the configuration of a model and the scales of its adapters, which no weight has."""
    settings = inner_model(model).config.to_dict()
    settings.pop("_name_or_path", None)
    adapters = getattr(model, "peft_config", {})
    scales = {
        name: {key: getattr(one, key, None) for key in _SCALES} for name, one in adapters.items()
    }
    return {"model": settings, "adapters": scales}


def _read(path: Path, name: str) -> tuple[np.ndarray[Any, Any] | None, dict[str, str]]:
    """Return a tensor of a file and the file's metadata; nothing where it cannot be read."""
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            return (file.get_tensor(name) if name in file.keys() else None), metadata  # noqa: SIM118
    except (OSError, SafetensorError):
        return None, {}


def _save(path: Path, values: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str]) -> None:
    tensors = {name: torch.from_numpy(array.copy()) for name, array in values.items()}
    aside = path.with_name(f".{path.name}")
    save_file(tensors, aside, metadata)
    aside.replace(path)
