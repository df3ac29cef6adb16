"""A training run in a process of its own, so that its memory and its kernels are its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.errors import LigerError

__all__ = ["ArmResult", "run_arm"]


@dataclass(frozen=True)
class ArmResult:
    """What `liger train` measured in its own process; losses has one number a step."""

    name: str
    tokens_per_s: float
    step_ms: float
    peak_memory_bytes: int
    losses: list[float]
    coverage: dict[str, dict[str, int]]
    modules: list[dict[str, str | None]]


def run_arm(config: RunConfig, *, name: str, ops: str, steps: int) -> ArmResult:
    """Trains `steps` steps with `ops` in a process of its own and returns what it measured.

    The arm writes no checkpoint and evaluates nothing; its directory is deleted.

    Args:
        config: The run; its seeds, batches and data are the arm's, its resume and output are not.
        name: Name of the arm, also in the message of its failure.
        ops: The arm's `--ops`.
        steps: Optimizer steps.

    Raises:
        LigerError: The process failed; with its message and its exit code.
    """
    with tempfile.TemporaryDirectory(prefix="liger-arm-") as folder:
        run_dir = Path(folder) / "run"
        config_file = Path(folder) / "config.yaml"
        config_file.write_text(config.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "liger_cli", "train", "--config", str(config_file)]
        command += ["--ops", ops, "--max-steps", str(steps), "--output-dir", str(run_dir)]
        command += ["--measure-only", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise _failure(name, done)
        report: dict[str, Any] = json.loads(done.stdout)
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = report["train"]
    return ArmResult(
        name=name,
        tokens_per_s=measured["tokens_per_s"],
        step_ms=measured["step_ms"],
        peak_memory_bytes=measured["peak_memory_bytes"],
        losses=[json.loads(line)["loss"] for line in lines],
        coverage=report["coverage"],
        modules=report["modules"],
    )


def _failure(name: str, done: subprocess.CompletedProcess[str]) -> LigerError:
    """The child's own error, under its own exit code."""
    lines = done.stderr.strip().splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("error: ")), -1)
    message = "\n".join(lines[start:]).removeprefix("error: ") if lines else "no message"
    kinds = {kind.exit_code: kind for kind in LigerError.__subclasses__()}
    # A process ended by a signal has a negative code, which is no kind of error.
    return kinds.get(done.returncode, LigerError)(
        f"the {name} run failed (exit code {done.returncode}): {message}"
    )
