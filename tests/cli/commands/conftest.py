"""Fixtures of bench: small shapes, and arms that are not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bench_results import Run, result

import liger_cli.commands.bench.models.comparison as comparison
from liger_cli.commands.bench import targets as op_targets
from liger_cli.config import RunConfig
from liger_cli.training.runtime.arms import ArmResult

TINY = (
    ("rms_norm", (4, 16)),
    ("swiglu", (4, 16)),
    ("fused_linear_cross_entropy", (8, 8, 32)),
)


@pytest.fixture
def tiny_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of milliseconds, and few calls."""
    monkeypatch.setattr(op_targets, "_SMALL", TINY)
    monkeypatch.setattr("liger_cli.commands.bench.timing._HOST_CALLS", 2)
    monkeypatch.setattr("liger_cli.commands.bench.ops.rounds._BUDGET_MS", 0.0)


@pytest.fixture
def fake_arms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the processes and returns what they were asked for."""
    asked: list[dict[str, Any]] = []

    def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
        asked.append({"name": name, "config": config, **more})
        number = len(asked)
        is_patched = name == "patched"
        return result(
            name,
            (2000.0 if is_patched else 1000.0) - number,
            peak=500_000_000 + number if is_patched else 1_000_000_000,
            losses=(4.0 + number * 1e-6, 3.0),
        )

    monkeypatch.setattr(comparison, "run_arm", run_arm)
    return asked


@pytest.fixture
def arms(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run], list[str]]:
    """Replaces the processes by a function of configuration and name; returns the names run."""

    def replace(run: Run) -> list[str]:
        names: list[str] = []

        def run_arm(config: RunConfig, *, name: str, **more: Any) -> ArmResult:
            names.append(name)
            return run(config, name)

        monkeypatch.setattr(comparison, "run_arm", run_arm)
        return names

    return replace
