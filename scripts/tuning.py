"""Helpers of the tuning scripts: the limits of this card, timers, and lines of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench


def time_ms(function: Callable[[], Any], *, rep: int = 40) -> float:
    """Return the median GPU time, each run after the L2 cache was flushed."""
    return float(do_bench(function, warmup=max(5, rep // 4), rep=rep, return_mode="median"))


def copy_gb_per_s() -> float:
    """Return the rate of a device copy, read and write, in GB/s."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / time_ms(lambda: y.copy_(x)) / 1e6


def matmul_tflop_per_s() -> float:
    """Return the rate of a bf16 product of two 8192 x 8192 matrices, in TFLOP/s."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    b = torch.randn_like(a)
    return 2 * 8192**3 / time_ms(lambda: a @ b, rep=100) / 1e9


def transient_mib(function: Callable[[], Any]) -> float:
    """Return the most memory allocated at once beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def rms_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the norm of the deviation, as a share of the truth's."""
    difference = (value.float() - truth.float()).norm()
    return float(difference / truth.float().norm())


class Results:
    """Print each result and append it to a file of JSON lines."""

    def __init__(self, output: Path, name: str) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._path = output / f"{name}.jsonl"
        self._path.write_text("")
        self.copy_gb_per_s, self.matmul_tflop_per_s = copy_gb_per_s(), matmul_tflop_per_s()
        self.add(
            "limits",
            card=torch.cuda.get_device_name(),
            torch=torch.__version__,
            copy_gb_per_s=self.copy_gb_per_s,
            matmul_tflop_per_s=self.matmul_tflop_per_s,
        )

    def add(self, op: str, **values: Any) -> None:
        line = {"op": op} | {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in values.items()
        }
        text = json.dumps(line)
        print(text, flush=True)
        with self._path.open("a") as file:
            file.write(text + "\n")

    def copy_share(self, num_bytes: int, ms: float) -> float:
        return num_bytes / ms / 1e6 / self.copy_gb_per_s

    def matmul_share(self, num_flops: int, ms: float) -> float:
        return num_flops / ms / 1e9 / self.matmul_tflop_per_s
