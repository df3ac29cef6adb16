"""What a run left in its directory, and taking it back to an earlier moment."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from liger_cli.training.checkpoints.files import find_checkpoints, step_of

# Everything in a line of metrics.jsonl that is not a measurement of time or memory.
EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")


def metrics(run_dir: Path, *keys: str) -> list[tuple]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[key] for key in keys or EXACT) for row in rows]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    [path] = checkpoint.glob("*model.safetensors")
    return load_file(path)


def names(run_dir: Path) -> list[str]:
    return [path.name for path in find_checkpoints(run_dir)]


def stopped_copy(run_dir: Path, target: Path, step: int) -> Path:
    """A run as it was when the process died after the checkpoint of a step."""
    shutil.copytree(run_dir, target, symlinks=True)
    (target / "report.json").unlink(missing_ok=True)
    for path in find_checkpoints(target):
        if step_of(path) > step:
            shutil.rmtree(path)
    return target


def assert_same(run_dir: Path, other: Path) -> None:
    """Both runs had the same numbers in every step and have the same model, to the bit."""
    assert metrics(other) == metrics(run_dir)
    one, two = (weights(find_checkpoints(path)[-1]) for path in (run_dir, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
