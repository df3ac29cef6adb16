"""Rows of bench ops judged by their targets, shown in tables and on the page."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_rows import CPU, side

from liger_cli.commands.bench.ops.rounds import judge
from liger_cli.commands.bench.ops.tables import (
    ArmPart,
    CheckPart,
    OpRow,
    OpsReport,
    TargetPart,
    markdown,
    op_tables,
    targets_table,
)
from liger_cli.commands.bench.targets import MIB, Target, Workload, select
from liger_cli.errors import ConfigError
from liger_kernels.ops.registry import OPS

pytestmark = pytest.mark.usefixtures("tiny_bench")


SCRIPT = Path(__file__).parents[3] / "scripts" / "performance_page.py"


# Products of log-probabilities: with the weight's gradient, without, and forward alone.
PARTS = ("", "frozen head", "no gradient")


def test_every_shape_of_the_targets_is_measured_on_a_gpu() -> None:
    workloads = select(None, None, is_gpu=True)
    # An op without a line in the table is measured all the same, on one of the cases of its row.
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
    logprobs = [by_key["fused_linear_logprobs", "8192x4096x128256", variant] for variant in PARTS]
    assert [work.num_flops() for work in logprobs] == [
        units * 8192 * 4096 * 128256 for units in (8, 6, 2)
    ]
    assert [(t.measure, t.against, t.limit) for t in logprobs[0].targets] == [
        ("share", "", 0.88),
        ("memory", "", 2 * 128256 * 4096 + 600 * MIB),
        ("speed", "trl", 1.2),
        ("speed", "torch.compile", 1.0),
    ]
    assert [work.targets[1].limit for work in logprobs[1:]] == [600 * MIB] * 2
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
    logprobs = Workload("fused_linear_logprobs", (4, 8, 32), {"outputs": ("logprob",)})
    sample = replace(logprobs, variant="no gradient").sample(torch.float32, CPU)
    assert not any(x.requires_grad for x in sample.args)
    assert sample.kwargs == {"outputs": ("logprob",)}


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
