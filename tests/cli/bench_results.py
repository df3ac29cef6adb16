"""Results of arms that were not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liger_cli.config import RunConfig
from liger_cli.training.runtime.arms import ArmResult

COVERAGE = {"rope": {"patched": 2, "candidates": 2}, "rms_norm": {"patched": 5, "candidates": 5}}


def result(
    name: str,
    speed: float,
    *,
    peak: int = 10**9,
    losses: tuple[float, ...] = (4.0, 3.0),
    norms: tuple[float, ...] | None = None,
    coverage: dict[str, dict[str, int]] = COVERAGE,
    peer: dict[str, Any] | None = None,
) -> ArmResult:
    """An arm of equal steps behind a first one that took a second."""
    steps = [
        {
            "loss": loss,
            "grad_norm": (norms or (1.0,) * len(losses))[i],
            "tokens_per_s": speed if i else speed / 10,
            "step_ms": 1e5 / speed if i else 1000.0,
            "peak_memory_bytes": peak,
        }
        for i, loss in enumerate(losses)
    ]
    return ArmResult(name, steps, coverage, [], peer)


Run = Callable[[RunConfig, str], ArmResult]
