"""What a run says before its first step: on how many modules each op is, and where that is none."""

from __future__ import annotations

import json
import re

import pytest
import torch

from liger_cli.commands.train.announce import announce_kernels
from liger_cli.config import load_config
from liger_cli.report import RunReport
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import list_presets, resolve_model
from liger_kernels.compare import CheckResult
from liger_kernels.transformers.patching import plan

# Small random models, one of each family.
FAMILIES = sorted(
    preset.name
    for preset in list_presets()
    if preset.kind == "random" and (preset.num_parameters or 0) < 2_000_000
)


def patched(name: str, ops: str):
    config = load_config(flags={"model": name, "ops": ops})
    return load_patched(config, resolve_model(name), torch.device("cpu"), print)[1]


def announce(record):
    report = RunReport(command="train", coverage=record.coverage, modules=record.modules)
    announce_kernels(report, record)


@pytest.mark.parametrize("family", FAMILIES)
def test_case_107_start_up_counts_the_modules_of_each_op(family, capsys):
    record = patched(family, "all")
    capsys.readouterr()
    announce(record)
    header, *rows = capsys.readouterr().err.strip().splitlines()
    assert header.split()[:2] == ["op", "patched"]
    said = dict(row.split()[:2] for row in rows)
    assert said == {
        op: f"{counts['patched']}/{counts['candidates']}" for op, counts in record.coverage.items()
    }
    assert {"rms_norm", "fused_linear_cross_entropy"} <= said.keys()


def test_case_107_no_module_is_a_warning(train, run_dir, monkeypatch):
    """Of an op that auto leaves out; the line comes before the first step, and stays on record."""
    original = plan.try_op

    def try_op(op, *rest):
        return CheckResult(op, False, "no compiler") if op == "rope" else original(op, *rest)

    monkeypatch.setattr(plan, "try_op", try_op)
    done = train("--logging-steps", 1)
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    [start] = [i for i, line in enumerate(lines) if re.match(r"rope +\d+/", line)]
    [first_step] = [i for i, line in enumerate(lines) if line.startswith("train 1/3")]
    assert start < first_step
    assert lines[start].split()[1] == "0/2"
    assert lines[start + 1].split()[:2] == ["rms_norm", "9/9"]
    # Once: the end has the results alone.
    assert "rms_norm  " not in done.out
    assert any(
        line.startswith("warning: rope is on none of 2 modules: ") and line.endswith("no compiler")
        for line in lines[:first_step]
    )
    report = json.loads((run_dir / "report.json").read_text())
    assert report["coverage"]["rope"] == {"patched": 0, "candidates": 2}


def test_ops_that_nobody_asked_for_are_no_warning(capsys):
    record = patched("qwen3", "rms_norm")
    capsys.readouterr()
    announce(record)
    text = capsys.readouterr().err
    assert "0/2" in next(line for line in text.splitlines() if line.startswith("rope "))
    assert "warning" not in text
