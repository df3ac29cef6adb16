"""The flags of a launch, checked: how many processes on how many hosts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from liger_cli.common.ranks import find_rank
from liger_cli.config.launch_flags import Launch
from liger_cli.errors import ConfigError

__all__ = ["LaunchPlan", "plan_launch"]


@dataclass(frozen=True)
class LaunchPlan:
    """The processes that a launcher starts on this host, and where hosts meet.

    Attributes:
        nproc: Processes on this host.
        nnodes: Hosts.
        node_rank: Number of this host; None: the host that endpoint names is the first, and the
            others are numbered as they come.
        endpoint: (host, port); None with one host.
        log_rank: The rank whose messages are shown.
    """

    nproc: int
    nnodes: int = 1
    node_rank: int | None = None
    endpoint: tuple[str, int] | None = None
    log_rank: int = 0


def plan_launch(
    launch: Launch, *, use_cpu: bool, environ: Mapping[str, str] = os.environ
) -> LaunchPlan | None:
    """Return the plan of a launch, or None where the command runs in this process.

    Args:
        launch: The flags.
        use_cpu: Whether GPUs do not count.

    Raises:
        ConfigError: A flag has no meaning here.
    """
    if not launch.is_asked_for:
        _check_log_rank(launch.log_rank, int(environ.get("WORLD_SIZE") or 1))
        return None
    if (rank := find_rank(environ)) is not None:
        raise ConfigError(
            f"--nproc and --nnodes start processes, and this one is rank {rank.number} of "
            f"{rank.num_ranks} of a launch already",
            hint="Leave the flags away, or start liger without torchrun, accelerate or srun.",
        )
    nnodes = 1 if launch.nnodes is None else launch.nnodes
    if nnodes < 1:
        raise ConfigError(f"--nnodes {nnodes}: should be at least 1")
    endpoint = _parse_endpoint(launch, nnodes)
    plan = LaunchPlan(
        nproc=_count(launch.nproc or "auto", use_cpu),
        nnodes=nnodes,
        node_rank=launch.node_rank,
        endpoint=endpoint,
        log_rank=launch.log_rank,
    )
    if plan.node_rank is not None and not 0 <= plan.node_rank < nnodes:
        raise ConfigError(
            f"--node-rank {plan.node_rank}: the hosts of --nnodes {nnodes} are numbered 0 to "
            f"{nnodes - 1}"
        )
    # Hosts may start other numbers of processes.
    _check_log_rank(launch.log_rank, plan.nproc if nnodes == 1 else None)
    return None if plan.nproc == nnodes == 1 else plan


def _check_log_rank(log_rank: int, num_ranks: int | None) -> None:
    if log_rank < 0 or (num_ranks is not None and log_rank >= num_ranks):
        last = "" if num_ranks is None else f" to {num_ranks - 1}"
        raise ConfigError(f"--log-rank {log_rank}: ranks are numbered 0{last}")


def _count(nproc: str, use_cpu: bool) -> int:
    if nproc != "auto" and not re.fullmatch(r"[1-9]\d{0,3}", nproc, re.ASCII):
        raise ConfigError(
            f"--nproc {nproc}: should be a number of processes from 1 to 9999, or auto",
            hint="auto starts one for each GPU of this host.",
        )
    num_gpus = 0 if use_cpu else _count_gpus()
    if nproc == "auto":
        return num_gpus or 1
    if num_gpus and int(nproc) > num_gpus:
        raise ConfigError(
            f"--nproc {nproc}: this host has {num_gpus} GPU{'s' * (num_gpus > 1)}",
            hint=f"Each process needs a GPU: --nproc {num_gpus} at most, or --use-cpu.",
        )
    return int(nproc)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _parse_endpoint(launch: Launch, nnodes: int) -> tuple[str, int] | None:
    endpoint = launch.rdzv_endpoint
    if nnodes == 1:
        if endpoint is not None or launch.node_rank:
            raise ConfigError("--rdzv-endpoint and --node-rank are for several hosts: add --nnodes")
        return None
    if endpoint is None:
        raise ConfigError(
            f"--nnodes {nnodes}: hosts need a place to meet",
            hint="--rdzv-endpoint HOST:PORT, the same on each of them: the name of host 0, and a "
            "free port of it, such as 29400.",
        )
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([\w.-]+)):(\d{1,5})", endpoint, re.ASCII)
    if match is None or not 0 < int(match[3]) < 2**16:
        raise ConfigError(
            f"--rdzv-endpoint {endpoint}: should be HOST:PORT, such as gpu01:29400 or [::1]:29400"
        )
    return match[1] or match[2], int(match[3])
