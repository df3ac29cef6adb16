"""The place of this process among the ranks of a launch, from the variables that launchers set."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGKILL
from typing import TextIO

__all__ = ["FAULT_FILE", "RUN_DIR_FILE", "Rank", "adopt_slurm", "find_rank", "first_host"]

# Set by our own launcher: the file that a rank which fails describes its error in. torchrun has one
# too, and shows the message of it.
FAULT_FILE = "LIGER_FAULT_FILE"
_TORCHRUN_FILE = "TORCHELASTIC_ERROR_FILE"
# Beside it: the directory of the run, for the checkpoint to continue from.
RUN_DIR_FILE = "run_dir"


@dataclass(frozen=True)
class Rank:
    """One of several processes that train one model.

    Attributes:
        number: Its rank in the whole launch.
        num_ranks: Ranks of the launch.
        local: Its rank on this host.
        fault_file: The file in which its launcher looks for the error that ends it.
        is_ours: Whether `liger --nproc` started it: that process shows the error then.
    """

    number: int
    num_ranks: int
    local: int
    fault_file: Path | None = None
    is_ours: bool = False
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        return f"rank {self.number} on {self.host}"

    @contextlib.contextmanager
    def output(self, shown: int) -> Iterator[TextIO]:
        """Drop what Python prints on a rank that is not shown; yield the stream for its end.

        Our own launcher writes the output of such ranks into files instead.
        """
        stderr = sys.stderr
        if self.is_ours or self.number in (0, shown):
            yield stderr
            return
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield stderr

    def say_run_dir(self, run_dir: Path) -> None:
        """Leave the directory of the run for our own launcher, once training begins in it."""
        if self.is_ours and self.local == 0 and self.fault_file is not None:
            place = self.fault_file.with_name(RUN_DIR_FILE)
            place.write_text(str(run_dir.absolute()), encoding="utf-8")

    def end_with_launcher(self) -> None:
        """End this process and those it started when the launcher is gone, by SIGKILL too.

        The launcher holds the other end of the pipe that is the standard input, and writes nothing.
        """
        if self.is_ours:
            threading.Thread(target=_wait_and_kill, daemon=True).start()


def _wait_and_kill() -> None:
    os.read(0, 1)
    os.killpg(0, SIGKILL)


def find_rank(environ: Mapping[str, str] = os.environ) -> Rank | None:
    """Return the rank of this process; None where it is alone."""
    try:
        number, num_ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    if num_ranks < 2:
        return None
    local = int(environ.get("LOCAL_RANK") or 0)
    ours, theirs = environ.get(FAULT_FILE), environ.get(_TORCHRUN_FILE)
    file = ours or theirs
    return Rank(number, num_ranks, local, Path(file) if file else None, bool(ours))


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torchrun from those of srun, where a step has several tasks.

    Variables that are set stay. A batch script is no task of a step, and is left alone.
    """
    step = {name: environ.get(f"SLURM_{name}") for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS")}
    if None in step.values() or step["STEP_NUM_TASKS"] == "1" or "RANK" in environ:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "localhost"
    counts = _expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = int(environ.get("SLURM_NODEID", "0"))
    # The same on all hosts of a step, and another one for most steps that share a host.
    job = int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_STEP_ID", "0"))
    found = {
        "RANK": step["PROCID"],
        "WORLD_SIZE": step["STEP_NUM_TASKS"],
        "LOCAL_RANK": step["LOCALID"],
        "LOCAL_WORLD_SIZE": str(counts[node] if node < len(counts) else 1),
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + job % 10000),
    }
    for name, value in found.items():
        environ.setdefault(name, str(value))


def first_host(nodes: str) -> str:
    """Return the first host of a list as slurm writes it: `gpu[03-05,9],login1` is gpu03."""
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    assert match is not None  # every part of the pattern may be empty
    return f"{match[1]}{match[2] or ''}{match[3] or ''}"


def _expand_counts(text: str) -> Sequence[int]:
    """Return the tasks of each host: `2(x3),1` is 2, 2, 2, 1."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(number)] * int(times or 1)
    return counts
