"""The plan of `liger bench ops`: workloads, rounds, and where the peer is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from liger_cli.commands.bench.peer.process import PeerProcess
from liger_cli.commands.bench.targets import Workload, select

__all__ = ["OpsPlan", "OpsRequest", "plan_ops"]

_ROUNDS = 3


@dataclass(frozen=True)
class OpsRequest:
    """The flags of `liger bench ops`, as they were written.

    Attributes:
        ops, shapes: Names with commas between; None is all.
        is_quick: The first shape of each op, in one round.
        rounds: None takes the default.
    """

    ops: str | None = None
    shapes: str | None = None
    is_quick: bool = False
    with_compile: bool = True
    rounds: int | None = None
    peer_python: Path | None = None
    peer_path: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """The words that repeat the run, without the paths of this machine."""
        words = ["--ops", self.ops] if self.ops else []
        words += ["--shapes", self.shapes] if self.shapes else []
        words += ["--quick"] * self.is_quick + ["--no-compile"] * (not self.with_compile)
        words += ["--rounds", str(self.rounds)] if self.rounds else []
        words += ["--peer-python", "PYTHON"] if self.peer_python else []
        words += ["--peer-path", "DIR"] if self.peer_path else []
        return words


@dataclass(frozen=True)
class OpsPlan:
    """A run: workloads, rounds, and where the peer is."""

    workloads: Sequence[Workload]
    device: torch.device
    rounds: int
    with_compile: bool
    peer_python: Path | None
    peer_path: Path | None
    # The words after `liger bench ops` that repeat the run, without the paths of this machine.
    arguments: Sequence[str]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    def peer(self) -> AbstractContextManager[PeerProcess | None]:
        if self.peer_python is None and self.peer_path is None:
            return nullcontext()
        return PeerProcess(self.peer_python, self.peer_path)


def plan_ops(request: OpsRequest, device: torch.device) -> OpsPlan:
    """Return the plan of a run on a device.

    Raises:
        ConfigError: An op or a shape is unknown.
    """
    return OpsPlan(
        workloads=select(
            request.ops, request.shapes, is_gpu=device.type != "cpu", is_quick=request.is_quick
        ),
        device=device,
        rounds=request.rounds or (1 if request.is_quick else _ROUNDS),
        with_compile=request.with_compile,
        peer_python=request.peer_python,
        peer_path=request.peer_path,
        arguments=request.arguments,
    )
