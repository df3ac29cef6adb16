"""The files of a model in a checkpoint: weights or adapter, and its preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from liger_cli.training.checkpoints.sharded_state import is_sharded, saved_tensors, with_values
from liger_cli.training.checkpoints.state import Stage, WriteModel
from liger_cli.training.model.adapter_files import save_weights
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.new_tokens import write_tokens
from liger_cli.training.parallel.checkpoint import consolidate, stage_sharded
from liger_cli.training.prepared import PreparedRun

__all__ = ["ModelFiles"]


class ModelFiles:
    """Writes the model of a run.

    Args:
        run: The prepared run.
        model: Without the wrapper of several processes.
        optimizer: Of its parameters; a sharded model is written with it.
    """

    def __init__(self, run: PreparedRun, model: Any, optimizer: Any) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer

    def stage(self, stage: Stage) -> WriteModel:
        """Return the function that writes the model as it is now; all processes call both."""
        is_main = self._run.is_main
        write_model = self._of_all(stage) if is_sharded(self._model) else self._of_main(stage)

        def write(directory: Path, group: ProcessGroup | None) -> None:
            write_model(directory, group)
            if is_main:
                self._write_preprocessing(directory)

        return write

    def _of_all(self, stage: Stage) -> WriteModel:
        return stage_sharded(self._model, self._optimizer, stage, is_main=self._run.is_main)

    def _of_main(self, stage: Stage) -> WriteModel:
        if not self._run.is_main:
            return lambda directory, group: None
        saved = saved_tensors(self._model)
        plain = {name: value.detach() for name, value in saved.items()}
        values = with_values(self._model, saved, stage(plain))
        return lambda directory, group: save_weights(self._model, directory, values)

    def _write_preprocessing(self, directory: Path) -> None:
        inputs = self._run.inputs
        if is_adapted(self._model) and inputs.source.tokens is not None:
            write_tokens(directory, inputs.source.tokens)
        inputs.preprocessing.save_pretrained(directory)

    def write_whole(self, directory: Path) -> list[str]:
        """Write this process's part of a sharded model as safetensors; return their names."""
        if is_adapted(self._model):
            # It is whole already.
            return []
        accelerator = self._run.accelerator
        part = (accelerator.process_index, accelerator.num_processes)
        return list(consolidate(directory, directory, part=part).files)
