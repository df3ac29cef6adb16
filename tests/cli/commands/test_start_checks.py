"""The start of a run: ops are checked on its device, what is wrong falls back, and says so."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import liger_cli.training.model.loading as loading
import liger_kernels.ops.glu as glu
import liger_kernels.transformers.patching.self_check as trials
from liger_cli.config import RunConfig
from liger_cli.training.model.source import resolve_model
from liger_kernels.transformers.api import apply_liger_kernel


@pytest.fixture
def wrong_swiglu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A gradient that is a tenth too large, and no memory of what was tried before."""
    right = glu._glu_bwd
    monkeypatch.setattr(glu, "_glu_bwd", lambda dy, *rest, **more: right(dy * 1.1, *rest, **more))
    trials._try.cache_clear()
    yield
    trials._try.cache_clear()


def test_a_wrong_op_falls_back_and_the_report_says_why(
    train: Callable[..., Any], run_dir: Path, wrong_swiglu: None
) -> None:
    ran = train()
    assert ran.code == 0, ran.err
    assert "swiglu runs as it was, its check fails here: swiglu[33x" in ran.err
    report = json.loads((run_dir / "report.json").read_text())
    assert report["coverage"]["swiglu"]["patched"] == 0
    assert report["coverage"]["rope"]["patched"] == report["coverage"]["rope"]["candidates"]
    rows = [row for row in report["modules"] if row["op"] == "swiglu"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert all("its check fails on cpu: swiglu[33x" in row["reason"] for row in rows)
    assert "swiglu 0/" in ran.out


def test_an_op_that_is_required_must_not_fall_back(
    train: Callable[..., Any], run_dir: Path, wrong_swiglu: None
) -> None:
    ran = train("--require", "swiglu")
    assert ran.code == 7
    assert "its check fails on cpu" in ran.err
    assert not (run_dir / "metrics.jsonl").exists(), "before anything is trained"


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_long_check_is_announced_and_a_short_one_is_not(
    is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    is_told = threading.Event()

    def notify(text: str) -> None:
        said.append(text)
        is_told.set()

    def slow(*given: Any, **more: Any) -> Any:
        assert is_told.wait(60)
        return apply_liger_kernel(*given, **more)

    if is_slow:
        monkeypatch.setattr(loading, "_NOTICE_AFTER_S", 0.01)
        monkeypatch.setattr(loading, "apply_liger_kernel", slow)
    config = RunConfig(model="mistral", use_cpu=True)
    loading.load_patched(config, resolve_model("mistral"), torch.device("cpu"), notify)
    assert said == ["checking the ops of the model on this device ..."] * is_slow
