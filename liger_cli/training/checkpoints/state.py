"""Checkpoints: the model, its preprocessing, and the state for an exact resume.

A checkpoint holds what save_pretrained writes, trainer_state.pt (optimizer, schedule, loss scale
and position in the data), rng-RANK.pt (random generators of each process) and manifest.json (step,
configuration, and sizes and hashes of the files: see files.py). Of a sharded model the weights and
the optimizer are in dcp/ (see sharded_state.py).
"""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import nn

from liger_cli.config import RunConfig
from liger_cli.data.feed import Feed
from liger_cli.errors import DataError, EnvironmentProblem, LigerError
from liger_cli.training.checkpoints.files import (
    checkpoint_path,
    file_entries,
    find_checkpoints,
    glob_names,
    read_manifest,
    unfinished_path,
    write_failure,
    write_manifest,
    written_aside,
)
from liger_cli.training.checkpoints.random_state import random_state, set_random_state
from liger_cli.training.checkpoints.sharded_state import (
    is_sharded,
    place_optimizer_state,
    read_optimizer,
)
from liger_cli.training.checkpoints.shards import file_pattern, has_shards

__all__ = ["ResumePoint", "TrainState", "load_state", "raise_everywhere", "save_checkpoint"]

_STATE = "trainer_state.pt"


@dataclass(frozen=True)
class TrainState:
    """The state of a run that a checkpoint holds beside its configuration.

    Attributes:
        model: Without the wrapper of several processes.
        data: The identity of the training data, as JSON has it.
        save_model: Writes the model and its preprocessing into a directory, of a sharded model its
            optimizer too; every process calls it.
        write_whole: Writes this process's part of the files that put a sharded model together
            again, after save_model, and returns their names.
        objective: Of the run; has a state as well.
    """

    accelerator: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any
    feed: Feed
    data: dict[str, Any]
    save_model: Callable[[Path], None]
    write_whole: Callable[[Path], list[str]]
    objective: Any

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)

    def state_dict(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        optimizer = {} if self.is_sharded else {"optimizer": self.optimizer.state_dict()}
        return {
            **optimizer,
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "data": self.feed.state_dict(),
            "objective": self.objective.state_dict(),
        }

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore everything but the optimizer, which comes first."""
        self.scheduler.load_state_dict(values["scheduler"])
        self.feed.load_state_dict(values["data"])
        self.objective.load_state_dict(values.get("objective", {}))
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
    is_final: bool = False,
) -> Path:
    """Write checkpoint-STEP and return its path. Every process calls it.

    Args:
        is_evaluated: Whether the state includes the evaluation of this step.
        is_final: Whether the run ends with it.

    Raises:
        EnvironmentProblem: It cannot be written, on any process; the same on all. Earlier ones are
            as they were.
    """
    accelerator = state.accelerator
    is_main = accelerator.is_main_process
    target = checkpoint_path(run_dir, step)
    in_step = functools.partial(_raised_on_all, target, _kept_line(run_dir))
    random_states = gather_object([random_state(accelerator.device)])
    manifest = {
        "step": step,
        "is_evaluated": is_evaluated,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "data": state.data,
        "config": config.model_dump(mode="json"),
    }
    with contextlib.ExitStack() as writing:
        directory = unfinished_path(target)
        with in_step():
            if is_main:
                for leftover in run_dir.glob(".checkpoint-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                writing.enter_context(written_aside(target))
        with in_step():
            state.save_model(directory)
            if is_main:
                torch.save(state.state_dict(), directory / _STATE)
                for rank, values in enumerate(random_states):
                    torch.save(values, directory / _random_file(rank))
        entries: dict[str, Any] = {}
        with in_step():
            if state.is_sharded:
                keeps = config.save_consolidated
                is_whole = keeps == "every" or (keeps == "final" and is_final)
                names = state.write_whole(directory) if is_whole else []
                names += glob_names(directory, file_pattern(accelerator.process_index))
                entries = file_entries(directory, names)
        entries = dict(pair for found in gather_object([entries]) for pair in found.items())
        with in_step():
            if is_main:
                write_manifest(directory, manifest, entries)
                writing.close()
    return target


@contextlib.contextmanager
def _raised_on_all(target: Path, hint: str) -> Iterator[None]:
    """Raise what a process raises in the block on all of them: the others would wait for ever.

    Each process leaves the block before any goes on. Collective calls in it come first, or raise on
    all processes themselves.

    Raises:
        EnvironmentProblem: The first process's that failed, the same on all.
        Exception: Of another kind than of writing, where it was raised.
    """
    problem: EnvironmentProblem | None = None
    unexpected: Exception | None = None
    try:
        yield
    except Exception as error:
        try:
            problem = write_failure(error, target, hint)
            problem.__cause__ = error
        except Exception:
            unexpected = error
            text = f"{target} cannot be written: {type(error).__name__}: {error}"
            problem = EnvironmentProblem(text, hint=hint)
    with contextlib.nullcontext() if unexpected is None else contextlib.suppress(LigerError):
        raise_everywhere(problem)
    if unexpected is not None:
        raise unexpected


def raise_everywhere(problem: EnvironmentProblem | None) -> None:
    """Raise a process's error on every process; each calls it.

    Args:
        problem: The error of this process; None where there is none.

    Raises:
        EnvironmentProblem: There is one; that of the first process that has one.
    """
    found = gather_object([None if problem is None else (problem.message, problem.hint)])
    words = next(filter(None, found), None)
    if problem is not None and words == (problem.message, problem.hint):
        raise problem
    if words is not None:
        raise EnvironmentProblem(words[0], hint=words[1])


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
        # Of the whole state a process of a sharded model reads the parts that it has.
        values = _load(path, mapped=state.is_sharded)
        if "optimizer" in values:
            whole = place_optimizer_state(state.optimizer, values.pop("optimizer"))
            state.optimizer.load_state_dict(whole)
    if has_shards(checkpoint):
        read_optimizer(checkpoint, state.model, state.optimizer)
    with _restoring(path):
        state.load_state_dict(values)
    with _restoring(path := checkpoint / _random_file(accelerator.process_index)):
        # Of more processes than there were, the others keep the generators that their seeds give.
        if accelerator.process_index < manifest["num_processes"]:
            set_random_state(_load(path), accelerator.device)
    return ResumePoint(int(manifest["step"]), bool(manifest["is_evaluated"]))


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    for unit in ("rows", "bytes"):
        if old.get(unit) != new.get(unit):
            return f"it has {new.get(unit)} {unit} and had {old.get(unit)}"
    return "its rows have another content"


def _random_file(rank: int) -> str:
    return f"rng-{rank}.pt"


def _load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))


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
