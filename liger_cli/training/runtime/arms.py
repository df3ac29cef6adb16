"""A measuring run in a separate process, with its own memory and kernels."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.common.measure import median_after_warm_up
from liger_cli.common.outputs import write_file
from liger_cli.common.readers import parse_json, read_file_bytes
from liger_cli.config import RunConfig
from liger_cli.errors import LigerError, OutOfMemory, error_of
from liger_cli.training.runtime.peer_interpreter import PeerInterpreter
from liger_kernels.transformers.replacements.tiles import TILED_OPS

__all__ = ["ArmRanks", "ArmResult", "ArmSpec", "run_arm"]

# Run by name: it stands above this package.
_PROCESS = "liger_cli.commands.train.arm"


@dataclass(frozen=True)
class ArmSpec:
    """One side of a comparison: what is patched, by whom, and whether torch.compile runs too."""

    name: str
    ops: str
    torch_compile: bool = False
    # Where a peer is installed that patches the model instead of ours.
    peer: PeerInterpreter | None = None


@dataclass(frozen=True)
class ArmRanks:
    """The processes of a run, and whether its last step is traced."""

    nproc: int
    is_traced: bool = False


@dataclass(frozen=True)
class ArmResult:
    """The measurements of a run in a separate process, or in several.

    Attributes:
        steps: The lines of metrics.jsonl.
        peer: The `peer` part of its report, if a peer patched it.
        trace: What torch's profiler recorded of the last step on rank 0.
    """

    name: str
    steps: Sequence[dict[str, Any]]
    coverage: dict[str, dict[str, int]]
    modules: list[dict[str, str | None]]
    peer: dict[str, Any] | None = None
    trace: dict[str, Any] | None = None

    @property
    def tokens_per_s(self) -> float:
        return median_after_warm_up(self._values("tokens_per_s"))

    @property
    def step_ms(self) -> float:
        return median_after_warm_up(self.steps_ms)

    @property
    def steps_ms(self) -> list[float]:
        return self._values("step_ms")

    @property
    def peak_memory_bytes(self) -> int:
        return int(max(self._values("peak_memory_bytes")))

    @property
    def losses(self) -> list[float | None]:
        return [step["loss"] for step in self.steps]

    @property
    def grad_norms(self) -> list[float | None]:
        return [step["grad_norm"] for step in self.steps]

    def _values(self, key: str) -> list[float]:
        return [step[key] for step in self.steps]


def run_arm(
    config: RunConfig,
    *,
    name: str,
    ops: str,
    steps: int,
    torch_compile: bool = False,
    peer: PeerInterpreter | None = None,
    ranks: ArmRanks | None = None,
) -> ArmResult:
    """Train `steps` steps with `ops` in a separate process and return the measurements.

    The arm writes no checkpoint and evaluates nothing; its directory is deleted. Whatever ends this
    process meanwhile ends the other with all that it started.

    Args:
        config: The run; its seeds, batches and data are the arm's, its resume and output are not.
        name: Name of the arm, also in the message of its failure.
        ops: The arm's `--ops`.
        steps: Optimizer steps.
        torch_compile: Whether the model is compiled, whatever config says.
        peer: Where the peer is installed whose patch is applied after `ops`.
        ranks: Its processes.

    Raises:
        LigerError: The process failed; with its message and its exit code.
        KeyboardInterrupt: Ctrl-C or SIGTERM came.
    """
    with tempfile.TemporaryDirectory(prefix="liger-arm-") as folder:
        run_dir = Path(folder) / "run"
        config_file = Path(folder) / "config.yaml"
        traced = str(steps) if ranks and ranks.is_traced else None
        arm = {"ops": ops, "max_steps": steps, "torch_compile": torch_compile}
        arm |= _long_rows(config, ops, is_compiled=torch_compile)
        arm |= {"profile_steps": traced, "output_dir": run_dir}
        config = config.model_copy(update=arm)
        write_file(config_file, config.to_yaml())
        command = [peer.executable if peer else sys.executable, "-m", _PROCESS, str(config_file)]
        command += ["--peer-patch"] * (peer is not None)
        command += [] if ranks is None else ["--nproc", str(ranks.nproc)]
        done = _run(command, peer.environment if peer else None)
        if done.returncode:
            raise _failure(name, done)
        report: dict[str, Any] = parse_json(done.stdout)
        lines = read_file_bytes(run_dir / "metrics.jsonl").splitlines()
        trace = _trace(run_dir / f"profile-{traced}.json")
    return ArmResult(
        name=name,
        steps=[parse_json(line) for line in lines],
        coverage=report["coverage"],
        modules=report["modules"],
        peer=report.get("peer"),
        trace=trace,
    )


def _long_rows(config: RunConfig, ops: str, *, is_compiled: bool) -> dict[str, Any]:
    """Return keys of long rows, off, that an arm of other ops, or compiled, cannot have."""
    if is_compiled:
        return {"tile_tokens": "none", "activation_offloading": False}
    is_same = ops in ("auto", "all", config.ops)
    has_tiles = is_same or not TILED_OPS.isdisjoint(ops.split(","))
    return {} if has_tiles else {"tile_tokens": "none"}


def _trace(file: Path) -> dict[str, Any] | None:
    """Return the trace of a file; None where there is none."""
    return parse_json(read_file_bytes(file)) if file.is_file() else None


def _run(
    command: Sequence[str], environment: dict[str, str] | None
) -> subprocess.CompletedProcess[str]:
    """Run a command as subprocess.run does, and leave no process behind."""
    with _open_pipe() as reads:
        # A new session: all its processes end together, and Ctrl-C comes to us alone.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=reads,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


@contextlib.contextmanager
def _open_pipe() -> Iterator[int]:
    """Yield the read end of a pipe whose write end is open as long as this process lives."""
    reads, writes = os.pipe()
    try:
        yield reads
    finally:
        os.close(reads)
        os.close(writes)


def _failure(name: str, done: subprocess.CompletedProcess[str]) -> LigerError:
    """Return the error of the child process, under its exit code."""
    if done.returncode == -signal.SIGKILL:
        return OutOfMemory(
            f"the {name} run was killed (signal 9), as Linux does to a process for which there is "
            "no memory left"
        )
    lines = done.stderr.strip().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), -1)
    message = "\n".join(lines[start:]).removeprefix("error: ") if lines else "no message"
    # A process ended by another signal has a negative code, which is no kind of error.
    return error_of(done.returncode)(
        f"the {name} run failed (exit code {done.returncode}): {message}"
    )
