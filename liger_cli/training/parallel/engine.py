"""How a step runs on the processes of a run: the one seam between a session and its layout.

`Accelerated` is one process or DDP, by accelerate; `Sharded` is FSDP2, by torch alone. Both average
gradients over processes, and a loss is a sum over them: it is multiplied by their number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from liger_cli.config import RunConfig
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.parallel.mesh import Layout, ParallelPlan
from liger_kernels.transformers.patching.engine import PatchRecord

__all__ = ["Engine", "make_engine"]


class Engine(Protocol):
    """Everything that a session asks of the layout of its run."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    def load(
        self,
        config: RunConfig,
        source: ModelSource,
        notify: Callable[[str], None],
        *,
        trains: bool = True,
        keep_base: Path | None = None,
    ) -> tuple[Any, PatchRecord]:
        """Load the model of a run, with the arguments of load_patched (model/loading.py)."""

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        """Return the model and the optimizer as steps take them."""

    def prepare_evaluated(self, model: Any) -> Any:
        """Return the model of a run that only evaluates."""

    def micro_step(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        """Return the context of a forward and backward; the last ends the gradient of the step."""

    def backward(self, part: Tensor) -> None:
        """Add the gradient of this process's part of a loss, which is a sum over processes."""

    def clip(self, parameters: list[Any], max_norm: float) -> Tensor:
        """Clip the gradient of all processes; return its norm before."""

    def evaluation(self, model: Any) -> AbstractContextManager[Any]:
        """Return a context that yields the model whose forward is called without a backward."""


def make_engine(accelerator: Any, plan: ParallelPlan) -> Engine:
    """Return the engine of a layout."""
    return (Sharded if plan.is_sharded else Accelerated)(accelerator, plan)


class _OfAccelerator:
    def __init__(self, accelerator: Any, plan: ParallelPlan) -> None:
        self._accelerator = accelerator
        self._plan = plan

    @property
    def device(self) -> torch.device:
        device: torch.device = self._accelerator.device
        return device


class Accelerated(_OfAccelerator):
    """One process, or DDP."""

    def load(
        self,
        config: RunConfig,
        source: ModelSource,
        notify: Callable[[str], None],
        *,
        trains: bool = True,
        keep_base: Path | None = None,
    ) -> tuple[Any, PatchRecord]:
        return load_patched(config, source, self.device, notify, trains=trains, keep_base=keep_base)

    def prepare_evaluated(self, model: Any) -> Any:
        return self._accelerator.prepare_model(model, evaluation_mode=True)

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        prepared: tuple[Any, Any] = self._accelerator.prepare(model, optimizer)
        return prepared

    @contextlib.contextmanager
    def micro_step(self, model: Any, *, is_last: bool) -> Iterator[None]:
        with contextlib.nullcontext() if is_last else self._accelerator.no_sync(model):
            yield

    def backward(self, part: Tensor) -> None:
        self._accelerator.backward(part * self._accelerator.num_processes)

    def clip(self, parameters: list[Any], max_norm: float) -> Tensor:
        norm: Tensor = self._accelerator.clip_grad_norm_(parameters, max_norm)
        return norm

    @contextlib.contextmanager
    def evaluation(self, model: Any) -> Iterator[Any]:
        yield self._accelerator.unwrap_model(model)


class Sharded(_OfAccelerator):
    """FSDP2: the model's parameters are DTensors already.

    The modules that import torch's FSDP, which takes a second, are imported here alone.
    """

    def load(
        self,
        config: RunConfig,
        source: ModelSource,
        notify: Callable[[str], None],
        *,
        trains: bool = True,
        keep_base: Path | None = None,
    ) -> tuple[Any, PatchRecord]:
        from liger_cli.training.parallel.loading import load_sharded

        layout = Layout(config, self._plan, self.device)
        return load_sharded(layout, source, notify, trains=trains, keep_base=keep_base)

    def prepare_evaluated(self, model: Any) -> Any:
        return model

    def prepare(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        # accelerate would wrap the model for DDP.
        return model, optimizer

    @contextlib.contextmanager
    def micro_step(self, model: Any, *, is_last: bool) -> Iterator[None]:
        # Gradients are reduced into shards after every micro-batch: whole ones of a model that is
        # sharded may not fit. Copies of the shards are summed once.
        model.set_requires_all_reduce(is_last)
        model.set_is_last_backward(is_last)
        yield

    def backward(self, part: Tensor) -> None:
        (part * self._accelerator.num_processes).backward()

    def clip(self, parameters: list[Any], max_norm: float) -> Tensor:
        from liger_cli.training.parallel.collectives import clip_grad_norm

        return clip_grad_norm(parameters, max_norm, self.device)

    @contextlib.contextmanager
    def evaluation(self, model: Any) -> Iterator[Any]:
        from liger_cli.training.parallel.wrapping import reshard

        try:
            yield model
        finally:
            reshard(model)
