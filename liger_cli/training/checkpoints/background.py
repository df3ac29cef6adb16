"""Checkpoints that are written while training goes on, from a copy in the memory of the host."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.utils._pytree import tree_map_only

from liger_cli.common.environment import free_host_memory
from liger_cli.training.checkpoints.writers import Writers

__all__ = ["BackgroundWrite", "HostCopies", "fits_hosts", "make_writers"]

# Of the free memory of a host what the copies may take: batches are made there too.
_USABLE = 0.8


class BackgroundWrite:
    """A function that runs in a thread, which does not outlive a process that must end at once.

    Args:
        write: It takes nothing that training changes.
    """

    def __init__(self, write: Callable[[], None]) -> None:
        self._write = write
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:
            self._error = error

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def has_failed(self) -> bool:
        return self.is_done and self._error is not None

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait for the end, whatever it is."""
        self._thread.join(timeout_s)

    def result(self) -> None:
        """Wait for the end.

        Raises:
            BaseException: What the function raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error


class HostCopies:
    """Copies of tensors on the host, in memory that the next copies of the same tensors reuse.

    Args:
        device: Of the tensors; those of a GPU are copied into pinned memory.
    """

    def __init__(self, device: torch.device) -> None:
        is_gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=is_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=is_gpu,
            )
        )

    def __call__(self, tree: Any) -> Any:
        """Return a copy of nested lists and dictionaries; tensors that share memory still do."""
        # Attributes of parameters would be copied too, and lead to modules.
        plain = tree_map_only(Tensor, Tensor.detach, tree)
        return self._stager.stage(plain)


def make_writers(num_processes: int, timeout_s: float) -> Writers:
    """Return writers whose messages do not meet those of training. Every process calls it."""
    if num_processes == 1:
        return Writers()
    return Writers(dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))


def fits_hosts(num_bytes: int) -> tuple[bool, int, int]:
    """Return whether the copies of all processes fit into their hosts. Every process calls it.

    Args:
        num_bytes: Of the copy of this process.

    Returns:
        That, with the bytes that are needed and free on the host that lacks most.
    """
    found = Writers().gather((socket.gethostname(), num_bytes, free_host_memory()))
    hosts = {
        host: (sum(size for name, size, _ in found if name == host), free)
        for host, _, free in found
    }
    needed, free = max(hosts.values(), key=lambda pair: pair[0] - pair[1])
    return needed <= _USABLE * free, needed, free
