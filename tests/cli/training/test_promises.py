"""Promises of comments and pages that no test held: what reaches the disk, clipping, warm-up."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from run_files import metrics, weights
from torch import nn

from liger_cli.config import load_config
from liger_cli.config.conflicts import METRIC_SCHEDULES
from liger_cli.config.describe import choices
from liger_cli.training.checkpoints.files import written_aside
from liger_cli.training.model.source import load_model, resolve_model
from liger_cli.training.optim.optimizers import Schedule

NEEDED = {
    "cosine_with_min_lr": "min_lr_rate=0.1",
    "cosine_warmup_with_min_lr": "min_lr_rate=0.1,warmup_lr_rate=0.1",
    "warmup_stable_decay": "num_decay_steps=2",
}


@pytest.fixture
def disk(monkeypatch):
    """The paths that real calls of os.fsync and rename get, in their order; fsync with content."""
    events = []
    sync, rename = os.fsync, Path.rename

    def fsync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(("fsync", path, path.read_text() if path.suffix == ".jsonl" else None))
        sync(descriptor)

    def record_rename(path, target):
        events.append(("rename", path, target))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    return events


def test_case_265_files_and_directories_are_on_the_disk_before_the_name(tmp_path, disk):
    target = tmp_path / "checkpoint-1"
    with written_aside(target) as directory:
        (directory / "part").mkdir()
        files = [directory / "a", directory / "part" / "b"]
        for file in files:
            file.write_text("content")
        assert disk == []
    names = [(kind, path) for kind, path, _ in disk]
    renamed = names.index(("rename", directory))
    before = {path for kind, path in names[:renamed] if kind == "fsync"}
    assert before == {*files, directory / "part", directory}
    # The name itself is a part of the directory above it.
    assert names[renamed + 1 :] == [("fsync", tmp_path)]


def test_case_266_logs_are_on_the_disk_before_the_checkpoint(train, run_dir, disk):
    words = ("--max-steps", 4, "--save-steps", 2, "--eval-fraction", 0.2, "--eval-steps", 1)
    done = train(*words)
    assert done.code == 0, done.err
    for step, num_evals in ((2, 1), (4, 3)):
        renamed = next(
            number
            for number, (kind, _, target) in enumerate(disk)
            if kind == "rename" and target == run_dir / f"checkpoint-{step}"
        )
        for name, lines in (("metrics.jsonl", step), ("eval.jsonl", num_evals)):
            synced = [
                content.count("\n")
                for kind, path, content in disk[:renamed]
                if kind == "fsync" and path == run_dir / name
            ]
            assert synced[-1:] == [lines], f"{name} before checkpoint-{step}"


def test_case_267_gradient_is_clipped(train, tmp_path):
    """A step of SGD moves the weights by the gradient, so the norm can be read off."""
    words = ("--max-steps", 1, "--optim", "sgd", "--learning-rate", 1.0, "--dtype", "float32")
    started = dict(load_model(resolve_model("qwen3"), dtype=torch.float32, seed=42).state_dict())
    moved, norms = {}, {}
    for limit in (0, 0.5, 1e6):
        run_dir = tmp_path / f"run-{limit}"
        done = train(*words, "--output-dir", run_dir, "--max-grad-norm", limit)
        assert done.code == 0, done.err
        ended = weights(run_dir / "checkpoint-1")
        moved[limit] = torch.cat([(started[key] - ended[key]).flatten() for key in sorted(ended)])
        [(norms[limit],)] = metrics(run_dir, "grad_norm")
    gradient, norm = moved[0], norms[0]
    assert norm > 1
    torch.testing.assert_close(float(gradient.norm()), norm, rtol=1e-4, atol=0)
    # The norm in the log is that before clipping.
    assert norms[0.5] == norms[1e6] == norm
    assert torch.equal(moved[1e6], gradient)
    parameter = nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    nn.utils.clip_grad_norm_([parameter], 0.5)
    torch.testing.assert_close(float(moved[0.5].norm()), 0.5, rtol=1e-4, atol=0)
    torch.testing.assert_close(moved[0.5], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in choices("lr_scheduler_type") if n not in METRIC_SCHEDULES]
)
def test_case_268_part_of_a_step_of_warm_up_is_a_step(name):
    """As transformers rounds warmup_ratio: up."""
    for num_steps in (7, 10, 33):
        for ratio in (0.05, 0.25, 0.31, 0.5):
            flags = {"learning_rate": 1.0, "lr_scheduler_type": name, "warmup_ratio": ratio}
            by_ratio, by_steps = (
                _rates({**flags, **more}, num_steps)
                for more in (
                    {},
                    {"warmup_ratio": 0.0, "warmup_steps": math.ceil(ratio * num_steps)},
                )
            )
            assert by_ratio == by_steps


def test_case_268_rates_of_the_warm_up():
    flags = {"learning_rate": 1.0, "lr_scheduler_type": "linear", "warmup_ratio": 0.25}
    # 2.5 of 10 steps are 3.
    assert _rates(flags, 10)[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def _rates(flags, num_steps):
    name = flags["lr_scheduler_type"]
    config = load_config(flags={"model": "qwen3", "lr_scheduler_kwargs": NEEDED.get(name), **flags})
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=1.0)
    schedule = Schedule(config, optimizer, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(schedule.learning_rate)
        optimizer.step()
        schedule.step()
    return found
