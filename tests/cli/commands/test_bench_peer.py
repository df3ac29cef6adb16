"""A peer's ops in a separate process, and inputs that are overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_rows import CPU

from liger_cli.commands.bench.timing import Arm, Stopwatch

pytestmark = pytest.mark.usefixtures("tiny_bench")


# The parts of a peer's public interface that two ops call. It is slow, and it writes the gradient
# of swiglu over its input, as peers do.
PEER_CODE = """
import torch

class Overwrites(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        print("noise between the answers")
        ctx.save_for_backward(gate, up)
        return torch.nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dup = dy * torch.nn.functional.silu(gate)
        s = torch.sigmoid(gate)
        return gate.copy_(dy * up * s * (1 + gate * (1 - s))), dup

liger_swiglu = Overwrites.apply

class LigerRMSNorm:
    def __init__(self, width):
        raise SystemExit("this peer ends here")
"""


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A folder as pip's --target makes it."""
    package = tmp_path / "peer" / "liger_kernel" / "transformers"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(PEER_CODE)
    (package / "functional.py").write_text("from liger_kernel.transformers import liger_swiglu\n")
    metadata = tmp_path / "peer" / "liger_kernel-1.2.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: liger-kernel\nVersion: 1.2.3\n"
    )
    return tmp_path / "peer"


def test_peer_that_ends_gives_rows_that_say_so(liger: Callable[..., Any], peer: Path) -> None:
    words = ["--ops", "swiglu,rms_norm", "--shapes", "4x16", "--no-compile", "--peer-path", peer]
    ran = liger("bench", "ops", *words, "--json")
    assert ran.code == 0, ran.err
    # The norm ends the process; nothing is left of it for the next op.
    for row in ran.json()["rows"]:
        *ours, theirs = row["arms"]
        assert all(arm["full"]["wall"]["median_ms"] > 0 for arm in ours)
        assert theirs["name"] == "liger-kernel"
        assert theirs["error"] == "its process ended (exit code 1): this peer ends here"
    assert str(peer) not in ran.out


def test_peer_needs_only_torch_and_what_is_its_own() -> None:
    """Its interpreter need not have what the program is made of."""
    absent = ("pydantic", "rich", "typer", "yaml", "psutil", "transformers", "accelerate")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "import liger_cli.commands.bench.peer.ops"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_peer_that_overwrites_its_inputs_says_so(liger: Callable[..., Any], peer: Path) -> None:
    python = os.path.relpath(sys.executable)
    words = ["--ops", "swiglu", "--no-compile", "--peer-python", python, "--peer-path", peer]
    ran = liger("bench", "ops", *words, "--json")
    result = ran.json()
    assert result["peers"] == {"liger-kernel": "1.2.3"}
    (row,) = result["rows"]
    side = row["arms"][-1]
    assert side["error"] is None
    assert side["full"]["wall"]["median_ms"] > 0
    assert side["note"] == "overwrites its inputs; they are restored before each turn, untimed"
    assert [arm["note"] for arm in row["arms"][:-1]] == [None, None]
    places = ["--peer-python", "PYTHON", "--peer-path", "DIR"]
    assert result["arguments"] == ["--ops", "swiglu", "--no-compile", *places]


def test_missing_peer_gives_a_row_that_says_so(liger: Callable[..., Any], tmp_path: Path) -> None:
    ran = liger(
        "bench", "ops", "--ops", "swiglu", "--quick", "--no-compile", "--peer-path", tmp_path
    )
    assert ran.code == 0
    assert (
        "liger-kernel: did not run: ModuleNotFoundError: No module named 'liger_kernel'" in ran.out
    )
    (line,) = (line for line in ran.out.splitlines() if line.startswith("4x16   liger-kernel "))
    assert line.split(maxsplit=2)[2] == "ModuleNotFoundError: No module named 'liger_kernel'"


def test_inputs_that_were_overwritten_are_restored_before_each_part() -> None:
    x = torch.ones(3, requires_grad=True)

    class Doubles(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.detach().mul_(2.0).clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy

    arm = Arm("doubles", lambda: Doubles.apply(x), [x], Stopwatch(CPU), torch.float32)
    assert arm.warm_up()
    arm.times("forward", 0.0)
    # Two calls after a fresh start, however many there were before.
    assert x.tolist() == [4.0] * 3
    arm.times("full", 0.0)
    assert x.tolist() == [4.0] * 3
