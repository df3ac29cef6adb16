"""liger bench ops: what is measured and refused, in which order, and what is said about it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_rows import CPU

from liger_cli.commands.bench.ops import arms as op_arms
from liger_cli.commands.bench.ops import rounds as op_bench
from liger_cli.commands.bench.ops.arms import check
from liger_cli.commands.bench.ops.rounds import measure
from liger_cli.commands.bench.ops.tables import (
    OpRow,
    OpsReport,
)
from liger_cli.commands.bench.targets import MIB, Workload
from liger_cli.commands.bench.timing import Stopwatch, Times
from liger_cli.common.measure import transient_bytes
from liger_kernels.ops.registry import OPS

pytestmark = pytest.mark.usefixtures("tiny_bench")


def break_op(monkeypatch: pytest.MonkeyPatch, name: str, width: int | None = None) -> None:
    """Make an op wrong by a thousandth, on inputs of one width or on all."""
    good = OPS[name]

    def function(x: torch.Tensor, *rest: Any, **options: Any) -> Any:
        y = good.function(x, *rest, **options)
        return y * 1.001 if width in (None, x.shape[-1]) else y

    monkeypatch.setitem(OPS, name, replace(good, function=function))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ops", "rms_norn"], "did you mean 'rms_norm'?"),
        (["--ops", "rms_norm", "--shapes", "4x17"], "did you mean 4x16?"),
        (["--quik"], "--quick"),
        (["--peer-python", "/nowhere/python"], "--peer-python /nowhere/python"),
        (["--peer-path", "/nowhere"], "--peer-path /nowhere"),
    ],
    ids=["op", "shape", "flag", "peer-python", "peer-path"],
)
def test_wrong_words_measure_nothing_case_99(
    words: list[str], message: str, liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("liger_cli.commands.bench.ops.rounds.measure", pytest.fail)
    ran = liger("bench", "ops", *words, "--json")
    assert (ran.code, list(ran.json())) == (2, ["error"])
    assert message in ran.err


def test_json_has_every_figure(liger: Callable[..., Any], tmp_path: Path) -> None:
    saved, page = tmp_path / "new" / "ops.json", tmp_path / "ops.md"
    words = ["--ops", "rmsnorm,flce", "--no-compile", "--save", saved, "--markdown", page]
    ran = liger("bench", "ops", *words, "--json")
    assert ran.code == 0, ran.err
    result = ran.json()
    assert json.loads(saved.read_text()) == result
    assert result["arguments"] == ["--ops", "rmsnorm,flce", "--no-compile"]
    assert (result["command"], result["device_type"], result["dtype"]) == (
        "bench ops",
        "cpu",
        "float32",
    )
    assert result["copy_bytes_per_s"] > 0 < result["matmul_flops_per_s"]
    rows = {(row["op"], row["shape"], row["variant"]): row for row in result["rows"]}
    fused = "fused_linear_cross_entropy"
    assert list(rows) == [
        ("rms_norm", "4x16", ""),
        ("rms_norm", "64x1024", "host time"),
        (fused, "8x8x32", ""),
        (fused, "8x8x32", "40 % of labels"),
        (fused, "8x8x32", "frozen head"),
    ]
    norm = rows["rms_norm", "4x16", ""]
    assert norm["check"]["ok"]
    assert norm["check"]["truth"] == "fp64"
    names = [error["name"] for error in norm["check"]["errors"]]
    assert names == ["output 0", "gradient of x", "gradient of weight"]
    assert [arm["name"] for arm in norm["arms"]] == ["eager", "torch", "ours"]
    for arm in norm["arms"]:
        for part in ("forward", "full"):
            spread = arm[part]["wall"]
            assert 0 < spread["p20_ms"] <= spread["median_ms"] <= spread["p80_ms"]
            assert arm[part]["gpu"] is None
            assert arm[part]["share"] > 0
        assert (arm["host_us"], arm["transient_bytes"], arm["error"]) == (None, None, None)
    assert all(arm["host_us"] > 0 for arm in rows["rms_norm", "64x1024", "host time"]["arms"])
    # The limit of products is measured again beside what it limits.
    assert norm["matmul_flops_per_s"] is None
    assert all(row["matmul_flops_per_s"] > 0 for row in rows.values() if row["op"] == fused)
    frozen = rows[fused, "8x8x32", "frozen head"]
    (ours,) = frozen["arms"]
    assert (ours["name"], ours["forward"], ours["host_us"]) == ("ours", None, None)
    assert ours["full"]["wall"]["median_ms"] > 0
    assert [error["name"] for error in frozen["check"]["errors"]] == [
        "output 0",
        "gradient of hidden",
    ]
    assert "On a CPU the shapes are small" in ran.err
    assert "| 4x16 | ours |" in page.read_text()


def test_torch_compile_takes_part(liger: Callable[..., Any]) -> None:
    ran = liger("bench", "ops", "--ops", "swiglu", "--quick", "--json")
    (row,) = ran.json()["rows"]
    assert [arm["name"] for arm in row["arms"]] == ["eager", "torch.compile", "ours"]
    compiled = row["arms"][1]
    # Where there is no C++ compiler the row says so; a figure is one of the reference, compiled.
    assert (compiled["full"] is None) == (compiled["error"] is not None)


@pytest.mark.parametrize("width", [None, 16], ids=["everywhere", "on-this-shape-only"])
def test_wrong_op_gets_no_figures(
    width: int | None, liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_op(monkeypatch, "rms_norm", width)
    ran = liger(
        "bench", "ops", "--ops", "rms_norm,swiglu", "--shapes", "4x16", "--no-compile", "--json"
    )
    assert ran.code == 7
    norm, glu = ran.json()["rows"]
    assert not norm["check"]["ok"]
    assert norm["arms"] == []
    assert [arm["name"] for arm in glu["arms"]] == ["eager", "ours"]
    assert "error: no figures for an op whose check fails:\nrms_norm 4x16" in ran.err
    assert "output 0 is off by" in ran.err
    assert "no figures: the check failed" in ran.err


def test_wrong_op_is_found_where_the_truth_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest shapes do not fit the card in fp64."""
    good, tried = OPS["swiglu"], []

    def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        tried.append(gate.dtype)
        if gate.dtype == torch.float64 and gate.shape[-1] == 16:
            raise torch.OutOfMemoryError("no room for fp64")
        return good.reference(gate, up)

    monkeypatch.setattr(op_arms, "check_op", lambda *_: SimpleNamespace(ok=True))
    monkeypatch.setitem(OPS, "swiglu", replace(good, reference=reference))
    workload, stopwatch = Workload("swiglu", (4, 16)), Stopwatch(CPU)
    sample = workload.sample(torch.bfloat16, CPU)
    found = check(workload, sample, stopwatch, torch.bfloat16)
    assert (found.ok, found.truth) == (True, "fp32")
    assert tried == [torch.float64, torch.float32, torch.bfloat16]
    monkeypatch.setitem(
        OPS, "swiglu", replace(OPS["swiglu"], function=lambda g, u: 1.1 * good.function(g, u))
    )
    assert not check(workload, sample, stopwatch, torch.bfloat16).ok


def test_kernel_that_does_not_run_is_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(op_arms, "check_op", lambda *_: SimpleNamespace(ok=True))
    monkeypatch.setitem(OPS, "swiglu", replace(OPS["swiglu"], function=function))
    workload = Workload("swiglu", (4, 16))
    sample = workload.sample(torch.float32, CPU)
    found = check(workload, sample, Stopwatch(CPU), torch.float32)
    assert (found.ok, found.reason) == (False, "RuntimeError: out of resource: shared memory")


def test_no_memory_for_a_shape_is_a_row_without_figures(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sample(*_: Any) -> Any:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setitem(OPS, "swiglu", replace(OPS["swiglu"], sample=sample))
    words = ["--ops", "rms_norm,swiglu", "--shapes", "4x16", "--no-compile"]
    ran = liger("bench", "ops", *words, "--json")
    norm, glu = ran.json()["rows"]
    assert (ran.code, len(norm["arms"]), glu["arms"]) == (7, 3, [])
    assert glu["check"]["reason"] == "OutOfMemoryError: tried to allocate 2 GiB"


class FakeSide:
    """Notes what it was asked for."""

    def __init__(self, name: str, log: list[str], fails_in: str = "") -> None:
        self.name = name
        self._log = log
        self._fails_in = fails_in

    def _note(self, what: str) -> None:
        self._log.append(f"{what} {self.name}")
        if what == self._fails_in:
            raise RuntimeError(f"{what} went wrong\nand more")

    def warm_up(self) -> bool:
        self._note("warm-up")
        return False

    def times(self, part: str, budget_ms: float) -> Times:
        self._note(part)
        return {"wall": [1.0, 3.0], "gpu": [2.0]}

    def host_us(self) -> float:
        self._note("host")
        return 5.0

    def transient_bytes(self) -> int | None:
        return 7

    def release(self) -> None:
        self._note("release")


def test_sides_take_turns_in_every_round() -> None:
    log: list[str] = []
    sides = [FakeSide(name, log) for name in "abc"]
    found = measure(sides, rounds=2, parts=("forward", "full"), with_host=True)
    one_round = [f"{part} {name}" for part in ("forward", "full", "host") for name in "abc"]
    ready, done = ([f"{what} {name}" for name in "abc"] for what in ("warm-up", "release"))
    assert log == [*ready, *one_round, *one_round, *done]
    assert found["b"].times["full"] == {"wall": [1.0, 3.0] * 2, "gpu": [2.0] * 2}
    assert (found["c"].host_us, found["c"].transient_bytes) == ([5.0, 5.0], 7)


def test_a_side_that_fails_says_so_and_stops_nobody() -> None:
    log: list[str] = []
    sides = [FakeSide("a", log), FakeSide("b", log, fails_in="full"), FakeSide("c", log)]
    found = measure(sides, rounds=2, parts=("forward", "full"), with_host=False)
    assert found["b"].error == "RuntimeError: full went wrong"
    assert log.count("forward b") == log.count("full b") == 1
    assert found["a"].error is None
    assert found["a"].times["full"]["wall"] == found["c"].times["full"]["wall"] == [1.0, 3.0] * 2


class FakeEvent:
    log: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 0.5


@pytest.mark.parametrize(("head_start_ms", "flushes"), [(0.0, 1), (0.9, 4)])
def test_gpu_is_flushed_and_the_host_given_its_head_start(
    head_start_ms: float, flushes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch = Stopwatch(CPU)
    FakeEvent.log = log = []
    stopwatch.is_gpu, stopwatch._runtime = True, SimpleNamespace(Event=FakeEvent)
    stopwatch._flush_ms = 0.3
    monkeypatch.setattr(stopwatch, "_flush", lambda: log.append("flush"))
    times = stopwatch.times(
        lambda: log.append("call"),
        lambda: log.append("before"),
        num_calls=2,
        head_start_ms=head_start_ms,
    )
    assert times == [0.5, 0.5]
    assert log == ["before", *["flush"] * flushes, "event", "call", "event"] * 2


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_keeps_the_rows_it_has(
    liger: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_name: str,
) -> None:
    make_row, made = op_bench._row, list[str]()

    def stopped_in_the_third(workload: Workload, *more: Any) -> OpRow:
        if len(made) == 2:
            signal.raise_signal(getattr(signal, signal_name))
        made.append(workload.op)
        return make_row(workload, *more)

    monkeypatch.setattr(op_bench, "_row", stopped_in_the_third)
    files = ("--save", tmp_path / "ops.json", "--markdown", tmp_path / "ops.md")
    ran = liger("bench", "ops", "--quick", "--no-compile", *files, "--json")
    assert ran.code == 130
    assert "interrupted; the report has what was measured" in ran.err
    assert [row["op"] for row in ran.json()["rows"]] == made
    assert ran.json()["interrupted"] is True
    assert len(OpsReport.from_json((tmp_path / "ops.json").read_text()).rows) == 2
    assert "in all, interrupted" in (tmp_path / "ops.md").read_text()


def test_a_run_stopped_before_the_first_row_has_no_report(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*given: Any) -> OpRow:
        raise KeyboardInterrupt

    monkeypatch.setattr(op_bench, "_row", stopped)
    ran = liger("bench", "ops", "--quick", "--no-compile", "--json")
    assert ran.code == 130
    assert set(ran.json()) == {"error"}


def test_transient_memory_is_unknown_on_a_cpu() -> None:
    assert transient_bytes(lambda: torch.ones(1000), CPU) is None


@pytest.mark.gpu
def test_transient_memory_of_a_gpu_is_what_a_call_adds_at_most() -> None:
    device = torch.device("cuda")
    kept = torch.ones(MIB, device=device)

    def call() -> torch.Tensor:
        torch.ones(8 * MIB, dtype=torch.uint8, device=device)
        return kept + 1

    assert transient_bytes(call, device) == 8 * MIB


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload",
    [
        Workload("fused_linear_logprobs", (16, 32, 1000), {"outputs": ("logprob",)}, ""),
        Workload("fused_linear_logprobs", (16, 32, 1000), {"outputs": ("logprob",)}, "frozen head"),
        Workload("fused_linear_logprobs", (16, 32, 1000), {"outputs": ("logprob",)}, "no gradient"),
        Workload("fused_linear_divergence", (16, 32, 24, 1000), {"reduction": "mean"}),
    ],
    ids=lambda workload: f"{workload.op}-{workload.variant}",
)
def test_trl_takes_part_with_the_same_values(workload: Workload) -> None:
    pytest.importorskip("trl")
    sample, stopwatch = workload.sample(torch.float32, CPU), Stopwatch(CPU)
    arms = op_arms.local_arms(workload, sample, stopwatch, torch.float32, with_compile=False)
    assert [arm.name for arm in arms] == ["eager", "trl", "ours"]
    found = []
    for arm in arms:
        (value,) = arm.full()
        found.append([value.detach(), *(leaf.grad for leaf in arm.leaves)])
        arm.clear()
    for values in found[1:]:
        for value, eager in zip(values, found[0], strict=True):
            torch.testing.assert_close(value, eager, rtol=1e-5, atol=1e-5)
