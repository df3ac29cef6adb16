"""Runs with tiles and offloading: every objective and layout of rows trains as without them."""

from __future__ import annotations

import pytest
from run_files import metrics

LONG = ("--gradient-checkpointing", "--activation-offloading", "true", "--tile-tokens", 64)
SYNTHETIC = ("--dataset", "synthetic", "--max-length", 96)
RUNS = {
    "packing-eval": (*SYNTHETIC, "--packing", "--eval-fraction", 0.1, "--eval-steps", 2),
    "padding-free": ("--padding-free", "true", "--max-length", 128),
    "experts": (*SYNTHETIC, "--model", "qwen3-moe"),
    "bf16": (*SYNTHETIC, "--bf16"),
    "dpo-lora": (*SYNTHETIC, "--objective", "dpo", "--adapter", "lora"),
    "kto": (*SYNTHETIC, "--objective", "kto"),
    "classify": (*SYNTHETIC, "--objective", "classify", "--num-labels", 3),
    "orpo": (*SYNTHETIC, "--objective", "orpo"),
    "no-checkpoints": (
        *SYNTHETIC,
        "--no-gradient-checkpointing",
        "--activation-offloading",
        "auto",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_as_without(train, run_dir, tmp_path, name):
    if "lora" in name:
        pytest.importorskip("peft")
    other = tmp_path / "other"
    for words in ((), (*LONG, "--output-dir", other)):
        done = train(*words, *RUNS[name])
        assert done.code == 0, done.err
    wanted, got = metrics(run_dir), metrics(other)
    assert len(wanted) == len(got)
    tolerance = 2e-2 if name == "bf16" else 2e-4
    for one, two in zip(wanted, got, strict=True):
        assert two == pytest.approx(one, rel=tolerance, abs=tolerance)


def test_a_resumed_run_may_have_other_values(train, run_dir, tmp_path):
    words = (*SYNTHETIC, *LONG, "--save-steps", 1)
    assert train(*words).code == 0
    whole = metrics(run_dir)
    other = tmp_path / "other"
    assert train(*words, "--max-steps", 1, "--output-dir", other).code == 0
    more = ("--activation-offloading", "false", "--tile-tokens", "none", "--resume", "auto")
    done = train(*SYNTHETIC, "--gradient-checkpointing", *more, "--output-dir", other)
    assert done.code == 0, done.err
    assert "tile_tokens" in done.err + done.out
    for one, two in zip(whole, metrics(other), strict=True):
        assert two == pytest.approx(one, rel=2e-4)
