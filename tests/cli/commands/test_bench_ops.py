"""liger bench ops: what is measured and refused, in which order, and what is said about it."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from liger_cli.commands.bench import targets as op_targets
from liger_cli.commands.bench.ops import arms as op_arms
from liger_cli.commands.bench.ops import rounds as op_bench
from liger_cli.commands.bench.ops.arms import check
from liger_cli.commands.bench.ops.rounds import judge, measure
from liger_cli.commands.bench.ops.tables import (
    ArmPart,
    CheckPart,
    OpRow,
    OpsReport,
    Spread,
    TargetPart,
    TimePart,
    markdown,
    op_tables,
    targets_table,
)
from liger_cli.commands.bench.targets import MIB, Target, Workload, select
from liger_cli.commands.bench.timing import Arm, Stopwatch, Times
from liger_cli.common.measure import transient_bytes
from liger_cli.errors import ConfigError
from liger_kernels.ops.registry import OPS

SCRIPT = Path(__file__).parents[3] / "scripts" / "performance_page.py"
CPU = torch.device("cpu")
TINY = (
    ("rms_norm", (4, 16)),
    ("swiglu", (4, 16)),
    ("fused_linear_cross_entropy", (8, 8, 32)),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of milliseconds, and few calls."""
    monkeypatch.setattr(op_targets, "_SMALL", TINY)
    monkeypatch.setattr("liger_cli.commands.bench.timing._HOST_CALLS", 2)
    monkeypatch.setattr("liger_cli.commands.bench.ops.rounds._BUDGET_MS", 0.0)


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
    # The limit of products is read anew beside what it limits.
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


def test_every_shape_of_the_targets_is_measured_on_a_gpu() -> None:
    workloads = select(None, None, is_gpu=True)
    # An op without a line in the table is measured all the same, on one of its own cases.
    assert {workload.op for workload in workloads} == set(OPS)
    shapes = {(workload.op, workload.shape_text, workload.variant) for workload in workloads}
    assert len(shapes) == len(workloads)
    by_key = {(work.op, work.shape_text, work.variant): work for work in workloads}
    fused = "fused_linear_cross_entropy"
    full = by_key[fused, "16384x2048x128256", ""]
    assert [(t.measure, t.against, t.limit) for t in full.targets] == [
        ("share", "", 0.86),
        ("memory", "", 2 * 128256 * 2048 + 600 * MIB),
        ("speed", "liger-kernel", 1.2),
        ("speed", "torch.compile", 1.0),
        ("memory share", "torch.compile", 0.55),
    ]
    assert by_key[fused, "8192x2304x256000", ""].targets[1].limit == 2 * 256000 * 2304 + 1024 * MIB
    flops = 6 * 8192 * 4096 * 128256
    assert by_key[fused, "8192x4096x128256", ""].num_flops() == flops
    assert by_key[fused, "8192x4096x128256", "frozen head"].num_flops() == flops * 2 / 3
    assert by_key[fused, "8192x4096x128256", "40 % of labels"].num_flops() == flops * 0.4
    loss = by_key["cross_entropy", "4096x262144", ""]
    assert loss.least_bytes(torch.bfloat16) == (2 * 2 * 4096 * 262144,) * 2
    norm = by_key["rms_norm", "8192x8192", ""]
    assert norm.least_bytes(torch.bfloat16) == (2 * 2 * 8192**2, 5 * 2 * 8192**2)
    assert ("rope", "4x4096x32/8x128", "") in shapes
    assert [w.shape_text for w in select("rope", "8x2048x32/8x64", is_gpu=True)] == [
        "8x2048x32/8x64"
    ]


def test_quick_is_the_first_shape_of_each_op() -> None:
    quick = select(None, None, is_gpu=True, is_quick=True)
    assert [workload.op for workload in quick] == list(OPS)
    assert quick[list(OPS).index("rms_norm")].shape_text == "16384x2048"
    with pytest.raises(
        ConfigError, match="--shapes: none of these ops is measured on '4096x262144'"
    ):
        select("rms_norm", "4096x262144", is_gpu=True)


def test_sample_of_a_variant() -> None:
    fused = Workload("fused_linear_cross_entropy", (4000, 8, 32), {"ignored": 0.0})
    target = fused.sample(torch.float32, CPU).args[2]
    assert (target != -100).all()
    part = replace(fused, variant="40 % of labels").sample(torch.float32, CPU).args[2]
    assert (part != -100).float().mean().item() == pytest.approx(0.4, abs=0.03)
    hidden, weight, _ = replace(fused, variant="frozen head").sample(torch.float32, CPU).args
    assert (hidden.requires_grad, weight.requires_grad) == (True, False)


def side(name: str, full_ms: float, **more: Any) -> ArmPart:
    def part(wall: float, share: float) -> TimePart:
        spread = Spread(median_ms=wall, p20_ms=wall, p80_ms=wall)
        return TimePart(wall=spread, gpu=spread, share=share)

    return ArmPart(name=name, forward=part(full_ms / 2, 0.98), full=part(full_ms, 0.84), **more)


ROW = OpRow(
    op="fused_linear_cross_entropy",
    shape="8x8x32",
    variant="40 % of labels",
    check=CheckPart(ok=True, truth="fp64"),
    arms=[
        side("ours", 2.0, transient_bytes=100 * MIB, host_us=50.0),
        side("torch.compile", 3.0, transient_bytes=150 * MIB),
        side("liger-kernel", 2.5, host_us=90.0),
        ArmPart(name="torch", error="OutOfMemoryError: it is full"),
    ],
)
WHOLE = OpRow(op=ROW.op, shape=ROW.shape, check=CheckPart(ok=True), arms=[side("ours", 4.0)])


@pytest.mark.parametrize(
    ("target", "found", "met"),
    [
        (Target("share", 0.85), 0.84, False),
        (Target("share", 0.84), 0.84, True),
        (Target("forward share", 0.97), 0.98, True),
        (Target("speed", 1.3, "liger-kernel"), 1.25, False),
        (Target("speed", 1.5, "torch.compile"), 1.5, True),
        (Target("speed", 1.0, "torch"), None, None),
        (Target("speed", 1.0, "nobody"), None, None),
        (Target("memory", 99 * MIB), 100 * MIB, False),
        (Target("memory share", 0.7, "torch.compile"), 2 / 3, True),
        (Target("memory share", 0.7, "liger-kernel"), None, None),
        (Target("time share", 0.45), 0.5, False),
        (Target("host share", 0.6, "liger-kernel"), 5 / 9, True),
    ],
)
def test_targets_are_judged(target: Target, found: float | None, met: bool | None) -> None:
    part = judge(target, ROW, [WHOLE, ROW])
    assert part.found == (None if found is None else pytest.approx(found))
    assert part.met is met


def test_no_target_is_met_without_a_check() -> None:
    failed = ROW.model_copy(update={"check": CheckPart(ok=False, reason="wrong"), "arms": []})
    assert judge(Target("share", 0.0), failed, [failed]).met is None


@pytest.fixture
def report() -> OpsReport:
    targets = [Target("share", 0.8), Target("memory", 99 * MIB), Target("speed", 1.0, "nobody")]
    row = ROW.model_copy(update={"targets": [judge(target, ROW, [ROW]) for target in targets]})
    broken = OpRow(
        op="rope", shape="1x2x3/4x5", check=CheckPart(ok=False, reason="output 0 is off by 0.1")
    )
    return OpsReport(
        arguments=["--quick"],
        date="2026-01-02",
        environment={"torch": "2.13.0", "triton": None},
        device="NVIDIA H100",
        device_type="cuda",
        dtype="bfloat16",
        copy_bytes_per_s=3e12,
        matmul_flops_per_s=7.5e14,
        seconds=61.5,
        rounds=4,
        peers={"liger-kernel": "0.8.5"},
        rows=[row, broken],
    )


def test_report_comes_back_from_its_json(report: OpsReport) -> None:
    report.rows[0].targets.append(TargetPart(measure="share", limit=0.5, found=float("nan")))
    again = OpsReport.from_json(report.to_json())
    assert again == report
    assert again.rows[0].targets[-1].found is None
    with pytest.raises(ValueError, match="schema_version is None"):
        OpsReport.from_json("{}")


def test_tables_hold_figures_reasons_and_targets(report: OpsReport) -> None:
    fused, rope = op_tables(report)
    assert fused.columns == (
        *("shape", "side", "forward ms", "full ms", "p20 - p80", "GPU ms", "share"),
        *("transient MiB", "host us", "note"),
    )
    shape = "8x8x32, 40 % of labels"
    assert fused.rows[0] == (
        *(shape, "ours", "1.000", "2.000", "2.000 - 2.000", "2.000", "0.84", "100", "50", ""),
    )
    assert fused.rows[3] == (shape, "torch", *[""] * 7, "OutOfMemoryError: it is full")
    reason = "no figures: the check failed (output 0 is off by 0.1)"
    assert rope.rows == [("1x2x3/4x5", "ours", reason)]
    targets = targets_table(report)
    assert targets is not None
    assert [row[2:] for row in targets.rows] == [
        ("share >= 0.80", "0.840", "met"),
        ("transient <= 99 MiB", "100 MiB", "MISSED"),
        (">= 1.0x nobody", "not measured", ""),
    ]
    text = markdown(report)
    assert "    $ liger bench ops --quick\n" in text
    assert "copy 3,000 GB/s, bfloat16 matmul 750.0 TFLOP/s" in text
    assert f"| {ROW.op} | {shape} | share >= 0.80 | 0.840 | met |" in text


def test_performance_page_is_up_to_date() -> None:
    script = runpy.run_path(str(SCRIPT))
    assert script["PAGE"].read_text() == script["page"](), f"run python scripts/{SCRIPT.name}"


def test_performance_page_is_made_from_the_results(report: OpsReport, tmp_path: Path) -> None:
    page = runpy.run_path(str(SCRIPT))["page"]
    assert "No run of `liger bench ops` on a GPU is recorded yet." in page(tmp_path)
    (tmp_path / "ops-h100.json").write_text(report.to_json())
    name = "bench-llama-1b-h100.json"
    measured = (SCRIPT.parents[1] / "docs" / "results" / name).read_text()
    (tmp_path / name).write_text(measured)
    arms = {arm["name"]: arm for arm in json.loads(measured)["arms"]}
    gain = arms["patched"]["tokens_per_s"] / arms["eager"]["tokens_per_s"]
    text = page(tmp_path)
    assert "recorded yet" not in text
    assert "## Ops on NVIDIA H100\n" in text
    assert "NVIDIA H100, bfloat16, torch 2.13.0, 2026-01-02\n" in text
    assert "### llama-1b, 8 x 2048 tokens a step" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| patched |")]
    assert f"| {arms['patched']['step_ms']:.1f} |" in row
    assert f"| {gain:.2f}x |" in row
