"""Checkpoints: the model, its preprocessing, and the state for an exact resume.

A checkpoint holds what save_pretrained writes, trainer_state.pt (optimizer, schedule, loss scale
and position in the data), rng-RANK.pt (random generators of each process) and manifest.json (step,
configuration, and sizes and hashes of the files: see files.py).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object

from liger_cli.config import RunConfig
from liger_cli.data.feed import Feed
from liger_cli.errors import DataError, EnvironmentProblem, LigerError
from liger_cli.training.checkpoints.files import (
    checkpoint_path,
    find_checkpoints,
    read_manifest,
    write_failure,
    write_manifest,
    written_aside,
)
from liger_cli.training.checkpoints.random_state import random_state, set_random_state

__all__ = ["ResumePoint", "TrainState", "load_state", "raise_everywhere", "save_checkpoint"]

_STATE = "trainer_state.pt"


@dataclass(frozen=True)
class TrainState:
    """The state of a run that a checkpoint holds beside its configuration.

    Attributes:
        data: The identity of the training data, as JSON has it.
        save_model: Writes the model and its preprocessing into a directory; the main process
            calls it.
    """

    accelerator: Any
    optimizer: Any
    scheduler: Any
    feed: Feed
    data: dict[str, Any]
    save_model: Callable[[Path], None]

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data": self.feed.state_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(values["optimizer"])
        self.scheduler.load_state_dict(values["scheduler"])
        self.feed.load_state_dict(values["data"])
        if values["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])


class ResumePoint(NamedTuple):
    """The last step of a checkpoint, and whether its state includes the evaluation of that step."""

    step: int
    is_evaluated: bool


def save_checkpoint(
    run_dir: Path,
    step: int,
    state: TrainState,
    config: RunConfig,
    *,
    is_evaluated: bool = False,
) -> Path:
    """Write checkpoint-STEP and return its path. Every process calls it, and the main one writes.

    Args:
        is_evaluated: Whether the state includes the evaluation of this step.

    Raises:
        EnvironmentProblem: It cannot be written, on any process; earlier ones are as they were.
    """
    accelerator = state.accelerator
    target = checkpoint_path(run_dir, step)
    random_states = gather_object([random_state(accelerator.device)])
    manifest = {
        "step": step,
        "is_evaluated": is_evaluated,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "data": state.data,
        "config": config.model_dump(mode="json"),
    }
    problem: EnvironmentProblem | None = None
    if accelerator.is_main_process:
        for leftover in run_dir.glob(".checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with written_aside(target) as directory:
                state.save_model(directory)
                torch.save(state.state_dict(), directory / _STATE)
                for rank, values in enumerate(random_states):
                    torch.save(values, directory / _random_file(rank))
                write_manifest(directory, manifest)
        except Exception as error:
            problem = write_failure(error, target, hint=_kept_line(run_dir))
            problem.__cause__ = error
    raise_everywhere(problem)
    return target


def raise_everywhere(problem: EnvironmentProblem | None) -> None:
    """Raise the main process's error on every process: the others would wait for it for ever.

    Args:
        problem: The error, on the main process; None where there is none.

    Raises:
        EnvironmentProblem: There is one.
    """
    words: list[Any] = [None if problem is None else (problem.message, problem.hint)]
    broadcast_object_list(words)
    if problem is not None:
        raise problem
    if words[0] is not None:
        raise EnvironmentProblem(words[0][0], hint=words[0][1])


def _kept_line(run_dir: Path) -> str:
    checkpoints = find_checkpoints(run_dir)
    if not checkpoints:
        return "There is no earlier checkpoint."
    return f"The earlier {checkpoints[-1].name} is as it was: --resume auto continues from it."


def load_state(checkpoint: Path, state: TrainState) -> ResumePoint:
    """Restore optimizer, schedule, loss scale, position in the data and random generators.

    Raises:
        DataError: The data are others, or a file cannot be read.
    """
    manifest = read_manifest(checkpoint)
    accelerator = state.accelerator
    if manifest["data"] != state.data:
        raise DataError(
            f"the dataset has changed since {checkpoint} was written, so the rows to come would "
            f"be others: {_difference(manifest['data'], state.data)}",
            hint=f"--model {checkpoint} without --resume starts a new run from its weights.",
        )
    with _restoring(path := checkpoint / _STATE):
        state.load_state_dict(_load(path))
    with _restoring(path := checkpoint / _random_file(accelerator.process_index)):
        set_random_state(_load(path), accelerator.device)
    return ResumePoint(int(manifest["step"]), bool(manifest["is_evaluated"]))


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for unit in ("rows", "bytes"):
        if old.get(unit) != new.get(unit):
            return f"it has {new.get(unit)} {unit} and had {old.get(unit)}"
    return "its rows have another content"


def _random_file(rank: int) -> str:
    return f"rng-{rank}.pt"


def _load(path: Path) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True))


@contextlib.contextmanager
def _restoring(path: Path) -> Iterator[None]:
    """Turn what a file of a checkpoint makes its readers raise into an error that names it."""
    try:
        yield
    except (LigerError, torch.OutOfMemoryError):
        raise
    # What is whole and cannot be read fails in as many ways as the unpickler, the optimizer, the
    # schedule and the generators have.
    except Exception as error:
        raise DataError(
            f"the checkpoint file {path} cannot be read: {type(error).__name__}: {error}",
            hint="--resume PATH continues from an older checkpoint.",
        ) from error
