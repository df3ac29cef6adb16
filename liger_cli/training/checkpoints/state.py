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
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from liger_cli.config import RunConfig
from liger_cli.data.feed import Feed
from liger_cli.errors import DataError, LigerError
from liger_cli.training.checkpoints.files import (
    checkpoint_path,
    file_entries,
    find_checkpoints,
    glob_names,
    read_manifest,
    unfinished_path,
    write_manifest,
    written_aside,
)
from liger_cli.training.checkpoints.random_state import random_state, set_random_state
from liger_cli.training.checkpoints.sharded_state import (
    is_sharded,
    place_optimizer_state,
    read_optimizer,
    saved_tensors,
)
from liger_cli.training.checkpoints.shards import file_pattern, has_shards
from liger_cli.training.checkpoints.writers import Writers

__all__ = [
    "ResumePoint",
    "Stage",
    "StagedCheckpoint",
    "TrainState",
    "WriteModel",
    "kept_line",
    "load_state",
    "stage_checkpoint",
    "write_checkpoint",
]

_STATE = "trainer_state.pt"

# Nested lists and dictionaries -> the same with tensors that training does not change; or as they
# are, where it waits.
Stage = Callable[[Any], Any]
# Writes a model into a directory, with the process group of its messages.
WriteModel = Callable[[Path, dist.ProcessGroup | None], None]


@dataclass(frozen=True)
class TrainState:
    """The state of a run that a checkpoint holds beside its configuration.

    Attributes:
        model: Without the wrapper of several processes.
        data: The identity of the training data, as JSON has it.
        stage_model: Returns the function that writes the model as it is and its preprocessing, of a
            sharded model its optimizer too; every process calls both.
        write_whole: Writes this process's part of the files that put a sharded model together
            again, into a directory that has the model, and returns their names.
        objective: Of the run; has a state as well.
    """

    accelerator: Any
    model: nn.Module
    optimizer: Any
    scheduler: Any
    feed: Feed
    data: dict[str, Any]
    stage_model: Callable[[Stage], WriteModel]
    write_whole: Callable[[Path], list[str]]
    objective: Any

    @property
    def is_sharded(self) -> bool:
        return is_sharded(self.model)

    @property
    def num_bytes(self) -> int:
        """The bytes of tensors that this process stages for a checkpoint."""
        if not (self.is_sharded or self.accelerator.is_main_process):
            return 0
        state = tree_leaves([saved_tensors(self.model), self.optimizer.state_dict()])
        tensors = [x for x in state if isinstance(x, Tensor)]
        return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors)

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


@dataclass(frozen=True)
class StagedCheckpoint:
    """All that a process writes of a checkpoint.

    Attributes:
        manifest: Values of the manifest but for the files.
        files: What torch.save writes, by the name of the file; of the main process.
        random_state: The generators of this process.
        write_model: As stage_model of TrainState returns it.
        write_whole: As in TrainState; None where the whole model is not asked for.
    """

    step: int
    manifest: dict[str, Any]
    files: dict[str, Any]
    random_state: dict[str, Any]
    write_model: WriteModel
    write_whole: Callable[[Path], list[str]] | None


def stage_checkpoint(
    step: int,
    state: TrainState,
    config: RunConfig,
    stage: Stage,
    *,
    is_evaluated: bool = False,
    is_final: bool = False,
) -> StagedCheckpoint:
    """Return the content of checkpoint-STEP. Every process calls it.

    Args:
        stage: Returns what is written of tensors, in nested lists and dictionaries.
        is_evaluated: Whether the state includes the evaluation of this step.
        is_final: Whether the run ends with it.
    """
    accelerator = state.accelerator
    keeps = config.save_consolidated
    is_whole = state.is_sharded and (keeps == "every" or (keeps == "final" and is_final))
    return StagedCheckpoint(
        step=step,
        manifest={
            "step": step,
            "is_evaluated": is_evaluated,
            "num_processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "data": state.data,
            "config": config.model_dump(mode="json"),
        },
        files={_STATE: stage(state.state_dict())} if accelerator.is_main_process else {},
        random_state=random_state(accelerator.device),
        write_model=state.stage_model(stage),
        write_whole=state.write_whole if is_whole else None,
    )


def write_checkpoint(run_dir: Path, staged: StagedCheckpoint, writers: Writers) -> None:
    """Write a checkpoint. Every process calls it.

    Raises:
        EnvironmentProblem: It cannot be written, on any process; the same on all. Earlier ones are
            as they were.
    """
    is_main = writers.rank == 0
    target = checkpoint_path(run_dir, staged.step)
    in_step = functools.partial(writers.together, target, kept_line(run_dir))
    random_states = writers.gather(staged.random_state)
    with contextlib.ExitStack() as writing:
        directory = unfinished_path(target)
        with in_step():
            if is_main:
                for leftover in run_dir.glob(".checkpoint-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
                writing.enter_context(written_aside(target))
        with in_step():
            staged.write_model(directory, writers.group)
            if is_main:
                for name, values in staged.files.items():
                    torch.save(values, directory / name)
                for rank, values in enumerate(random_states):
                    torch.save(values, directory / _random_file(rank))
        entries: dict[str, Any] = {}
        with in_step():
            names = staged.write_whole(directory) if staged.write_whole else []
            # Of a model that is not sharded no file has such a name.
            names += glob_names(directory, file_pattern(writers.rank))
            entries = file_entries(directory, names)
        entries = dict(pair for found in writers.gather(entries) for pair in found.items())
        with in_step():
            if is_main:
                write_manifest(directory, staged.manifest, entries)
                writing.close()


def kept_line(run_dir: Path) -> str:
    """Return a sentence on the checkpoint that a run has whatever becomes of the next."""
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
