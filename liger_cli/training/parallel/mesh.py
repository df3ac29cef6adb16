"""How the processes of a run share the model: copies of it, shards of each copy, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["REPLICATE", "SHARD", "Layout", "ParallelPlan", "explicit_plan", "refitted"]

# Dimensions of the mesh. Others, as of tensor parallelism, would come after them.
REPLICATE, SHARD = "dp_replicate", "dp_shard"

# dp_shard_size of all processes that dp_replicate_size leaves.
_REST = -1


@dataclass(frozen=True)
class ParallelPlan:
    """The layout of a run: dp_replicate x dp_shard processes.

    Attributes:
        dp_replicate: Copies of the model, each of which sees other rows.
        dp_shard: Processes that share the parameters, gradients and optimizer of a copy.
    """

    dp_replicate: int = 1
    dp_shard: int = 1

    @property
    def num_processes(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def is_sharded(self) -> bool:
        """Whether a process holds only a part of the model."""
        return self.dp_shard > 1

    @property
    def name(self) -> str:
        """The layout in words."""
        if not self.is_sharded:
            return f"DDP on {self.dp_replicate} ranks" if self.dp_replicate > 1 else "one process"
        if self.dp_replicate == 1:
            return f"FSDP2, sharded over {self.dp_shard} ranks"
        return f"HSDP, {self.dp_replicate} copies sharded over {self.dp_shard} ranks each"

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the mesh of all processes; every process calls it.

        It has the dimensions dp_replicate and dp_shard, without the first where it is 1.
        """
        from torch.distributed.device_mesh import init_device_mesh

        sizes = {REPLICATE: self.dp_replicate, SHARD: self.dp_shard}
        if self.dp_replicate == 1:
            del sizes[REPLICATE]
        return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


@dataclass(frozen=True)
class Layout:
    """A plan on a device, with the keys that say how a model is sharded by it."""

    config: RunConfig
    plan: ParallelPlan
    device: torch.device


def explicit_plan(config: RunConfig, num_processes: int) -> ParallelPlan | None:
    """Return the layout that the keys of a run ask for; None where they leave it open.

    Raises:
        EnvironmentProblem: The sizes do not make up the processes of the launch.
    """
    plan = _asked(config, num_processes)
    if plan is not None and plan.num_processes != num_processes:
        raise _misfit(config, plan, num_processes)
    if config.cpu_offload and plan is not None and not plan.is_sharded:
        raise EnvironmentProblem(
            f"cpu_offload keeps shards on the host, and this run has none: {plan.name}",
            hint="Launch it on several ranks, or leave cpu_offload out.",
        )
    return plan


def refitted(config: RunConfig, was: int, now: int) -> RunConfig:
    """Return a configuration whose sizes fit another number of processes, where its own do not.

    Copies stay where processes are left to share each of them; a run of copies alone has as many as
    processes.

    Args:
        was: The number that its sizes were made for.
    """
    old, new = _asked(config, was), _asked(config, now)
    is_fit = new is None or new.num_processes == now
    if is_fit or old is None or old.num_processes != was:
        return config
    copies = config.dp_replicate_size
    if not old.is_sharded:
        sizes = now, 1
    else:
        sizes = copies if now % copies == 0 and now > copies else 1, _REST
    return config.model_copy(update={"dp_replicate_size": sizes[0], "dp_shard_size": sizes[1]})


def _asked(config: RunConfig, num_processes: int) -> ParallelPlan | None:
    """Return the sizes that keys ask for, whether or not they fit; None where they ask for none."""
    copies, shards = config.dp_replicate_size, config.dp_shard_size
    if shards is None and copies == 1:
        return None if num_processes > 1 else ParallelPlan()
    rest = max(num_processes // copies, 1)
    return ParallelPlan(copies, rest if shards is None or shards == _REST else shards)


def _misfit(config: RunConfig, plan: ParallelPlan, num_processes: int) -> EnvironmentProblem:
    asked = f"dp_replicate_size {config.dp_replicate_size}"
    if config.dp_shard_size is not None:
        asked += f" x dp_shard_size {plan.dp_shard}"
    ranks = f"{num_processes} rank{'s' if num_processes > 1 else ''}"
    fits = [
        f"--dp-replicate-size {copies} --dp-shard-size {num_processes // copies}"
        for copies in range(1, num_processes + 1)
        if num_processes % copies == 0
    ]
    return EnvironmentProblem(
        f"{asked} make {plan.num_processes}, and this launch has {ranks}",
        hint=f"These fit: {'; '.join(fits)}. --dp-shard-size -1 takes all that are left.",
    )
