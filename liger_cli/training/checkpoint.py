"""Checkpoints: the model as safetensors with its tokenizer, and what an exact resume needs.

A checkpoint is written beside its place and moved there whole, so a directory called checkpoint-N
is never half-written. It holds what save_pretrained writes, trainer_state.pt (optimizer, schedule,
loss scale, step and configuration) and rng-RANK.pt (random generators of each process).
"""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError
from liger_cli.training.feed import Feed

__all__ = [
    "JsonLines",
    "StepMetrics",
    "TrainState",
    "check_same_run",
    "find_checkpoints",
    "load_state",
    "save_checkpoint",
]

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "trainer_state.pt"
# With another value of these, step N of the resumed run would not be step N of the one it resumes.
_FIXED_KEYS = (
    "model",
    "dataset",
    "eval_fraction",
    "max_length",
    "completion_only_loss",
    "assistant_only_loss",
    "packing",
    "packing_strategy",
    "streaming",
    "shuffle_buffer_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
)


@dataclass(frozen=True)
class StepMetrics:
    """A line of metrics.jsonl. grad_norm is None where float16 overflowed: the step was skipped."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens: int
    trained_tokens: int
    step_ms: float
    tokens_per_s: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class TrainState:
    """The parts of a run that change step by step, apart from the model."""

    accelerator: Any
    optimizer: Any
    scheduler: Any
    feed: Feed

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data": self.feed.state_dict(),
            "num_processes": self.accelerator.num_processes,
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(values["optimizer"])
        self.scheduler.load_state_dict(values["scheduler"])
        self.feed.load_state_dict(values["data"])
        if values["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, the oldest first."""
    paths = run_dir.iterdir() if run_dir.is_dir() else ()
    whole = [path for path in paths if _step_of(path) and (path / _STATE).is_file()]
    return sorted(whole, key=_step_of)


def _step_of(path: Path) -> int:
    """The step in a checkpoint's name; 0 for another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def save_checkpoint(
    run_dir: Path, step: int, model: Any, tokenizer: Any, state: TrainState, config: RunConfig
) -> Path:
    """Writes checkpoint-STEP and returns it; deletes older ones beyond save_total_limit.

    Every process calls it. The model is the prepared one.
    """
    accelerator = state.accelerator
    target = run_dir / f"checkpoint-{step}"
    unfinished = run_dir / f".checkpoint-{step}.unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        accelerator.unwrap_model(model).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        values = {"step": step, "config": config.model_dump(mode="json"), **state.state_dict()}
        torch.save(values, unfinished / _STATE)
    accelerator.wait_for_everyone()
    torch.save(_random_state(), unfinished / f"rng-{accelerator.process_index}.pt")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
        if config.save_total_limit is not None:
            _delete_old(run_dir, step, config.save_total_limit)
    accelerator.wait_for_everyone()
    return target


def _delete_old(run_dir: Path, step: int, num_kept: int) -> None:
    # Later ones are left of a run that was resumed from before them; they are not this run's.
    older = [path for path in find_checkpoints(run_dir) if _step_of(path) < step]
    for path in older[: len(older) - (num_kept - 1)]:
        shutil.rmtree(path)


def check_same_run(checkpoint: Path, config: RunConfig) -> int:
    """Returns the step of a checkpoint.

    Raises:
        ConfigError: The configuration is of another model or would feed other data at the same
            step, or the checkpoint is damaged.
    """
    values = _read_state(checkpoint)
    for key in _FIXED_KEYS:
        was, wanted = values["config"].get(key), getattr(config, key)
        if was != wanted:
            raise ConfigError(
                f"{key} is {wanted!r}, but {checkpoint} was trained with {was!r}; "
                "a resumed run keeps its model and the order of its data"
            )
    return int(values["step"])


def load_state(checkpoint: Path, state: TrainState) -> int:
    """Restores optimizer, schedule, loss scale and random generators; returns the step.

    Raises:
        ConfigError: The checkpoint was written by another number of processes, or is damaged.
    """
    values = _read_state(checkpoint)
    accelerator = state.accelerator
    if values["num_processes"] != accelerator.num_processes:
        raise ConfigError(
            f"{checkpoint} was written by {values['num_processes']} processes, "
            f"this run has {accelerator.num_processes}"
        )
    state.load_state_dict(values)
    _set_random_state(_load(checkpoint / f"rng-{accelerator.process_index}.pt"))
    return int(values["step"])


def _read_state(checkpoint: Path) -> dict[str, Any]:
    return _load(checkpoint / _STATE)


def _load(path: Path) -> dict[str, Any]:
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    # A damaged file fails in as many ways as the unpickler has.
    except Exception as error:
        raise ConfigError(
            f"the checkpoint file {path} cannot be read: {type(error).__name__}: {error}",
            hint="--resume PATH goes on from an older checkpoint.",
        ) from error


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_random_state(values: dict[str, Any]) -> None:
    random.setstate(values["python"])
    np.random.set_state(values["numpy"])
    torch.set_rng_state(values["torch"])
    if values["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(values["cuda"])


class JsonLines:
    """A file of one JSON object a line, each flushed as it is written.

    Args:
        path: The file; created with its directory.
        last_step: Lines of later steps are cut off first: a resumed run appends to its past.
        write: False keeps the rows without a file, on processes that are not the main one.
    """

    def __init__(self, path: Path, *, last_step: int = 0, write: bool = True) -> None:
        self.rows = [row for row in _read_lines(path) if row["step"] <= last_step]
        self._file: TextIO | None = None
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.unfinished")
            unfinished.write_text("".join(map(_line, self.rows)), encoding="utf-8")
            unfinished.replace(path)
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row."""
        self.rows.append(row)
        if self._file is not None:
            self._file.write(_line(row))
            self._file.flush()


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN or infinity.
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # The process was killed while it wrote this line; the checkpoint is older than it.
            return
