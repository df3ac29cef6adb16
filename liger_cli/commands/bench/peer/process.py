"""A peer's interpreter, kept alive for a whole run so that its start is not in any time."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from liger_cli.commands.bench.targets import Workload
from liger_cli.commands.bench.timing import Part, Times
from liger_cli.common.readers import parse_json
from liger_cli.training.runtime.peer_interpreter import PeerInterpreter

__all__ = ["PeerArm", "PeerFailed", "PeerProcess"]

# Compiling its kernels for a new shape is the longest a peer takes to answer.
_TIMEOUT_S = 300.0


class PeerFailed(Exception):
    """The peer is missing, or could not do what it was asked; its text is what a row says."""


class PeerProcess:
    """Start liger_cli.commands.bench.peer.ops where the peer is installed; `with` ends it.

    Args:
        python: The interpreter; this one by default.
        path: A folder that holds the peer, for PYTHONPATH.

    Raises:
        ConfigError: The interpreter or the folder does not exist.
    """

    def __init__(self, python: Path | None, path: Path | None) -> None:
        self._interpreter = PeerInterpreter(python, path)
        self._log = self._interpreter.folder / "stderr.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._interpreter.executable, "-m", "liger_cli.commands.bench.peer.ops"],
                cwd=self._interpreter.folder,
                env=self._interpreter.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            # What was not read by a process that has ended is an error to close.
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()
        self._interpreter.close()

    def send(self, **question: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        # A process that has ended is found, with its reason, when the answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the answer to the question sent last.

        Raises:
            PeerFailed: It answered with an error, ended, or took too long.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _TIMEOUT_S)
        if not ready:
            self._process.kill()
            raise PeerFailed(f"no answer within {_TIMEOUT_S:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerFailed(self._last_words())
        answer = dict(parse_json(line))
        if "error" in answer:
            raise PeerFailed(answer["error"])
        return answer

    def ask(self, **question: Any) -> dict[str, Any]:
        """Ask and return the answer."""
        self.send(**question)
        return self.receive()

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return f"its process ended (exit code {code}): {last.strip()}"


class PeerArm:
    """The peer's side of one workload; it is timed as an Arm is."""

    def __init__(self, name: str, process: PeerProcess) -> None:
        self.name = name
        self.version: str | None = None
        self._process = process

    def begin(self, workload: Workload, device: torch.device, dtype: torch.dtype) -> None:
        """Ask the peer to prepare a workload, which it does while this process does the same."""
        self._process.send(
            ask="prepare",
            workload=asdict(replace(workload, targets=())),
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
        )

    def warm_up(self) -> bool:
        """Wait until the peer is ready, and return whether it writes into its inputs."""
        answer = self._process.receive()
        self.version = answer["version"]
        return bool(answer["overwrites"])

    def times(self, part: Part, budget_ms: float) -> Times:
        return dict(self._process.ask(ask="times", part=part, budget_ms=budget_ms)["times"])

    def host_us(self) -> float:
        return float(self._process.ask(ask="host")["value"])

    def transient_bytes(self) -> int | None:
        value = self._process.ask(ask="memory")["value"]
        return None if value is None else int(value)

    def release(self) -> None:
        self._process.ask(ask="release")
