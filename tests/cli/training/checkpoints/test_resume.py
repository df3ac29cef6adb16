"""case_93: a run that is stopped and resumed is the unbroken run, in numbers and in rows."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from accelerate import tracking
from run_files import assert_same, metrics, names, stopped_copy

from liger_cli.config import RunConfig
from liger_cli.data.collate import Collator
from liger_cli.training.checkpoints.resume import _FREE_KEYS

# 23 rows are 6 steps of 4, the last of 3 rows in two micro-batches: 8 steps are more than an epoch.
STEPS = ("--max-steps", 8, "--save-steps", 3, "--learning-rate", 1e-3)
ACCUMULATED = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2)
STREAMED = (*ACCUMULATED, "--streaming", "--shuffle-buffer-size", 9)
EVAL = ("--eval-fraction", 0.2, "--eval-steps", 2)


@pytest.fixture
def fed(monkeypatch):
    """The rows that were collated, in their order, as their ids."""
    rows = []
    collate = Collator.__call__

    def call(collator, batch):
        rows.extend(tuple(row["input_ids"]) for row in batch)
        return collate(collator, batch)

    monkeypatch.setattr(Collator, "__call__", call)
    return rows


PATHS = {
    # Also after the first step, within the last window of an epoch, and in the next epoch.
    "accumulation": (*ACCUMULATED, "--save-steps", 1),
    "whole-batches": ("--per-device-train-batch-size", 5),
    "packing": (*ACCUMULATED, "--packing", "--max-length", 96),
    "stream": STREAMED,
    "packed-stream": (*STREAMED, "--packing"),
    "data-seed": ("--data-seed", 7),
    "dropout": ("--adapter", "lora", "--lora-dropout", 0.3),
    "autocast": ("--bf16", "--gradient-checkpointing"),
    "cosine": ("--lr-scheduler-type", "cosine", "--warmup-ratio", 0.3),
    "workers": (*ACCUMULATED, "--dataloader-num-workers", 1),
}


@pytest.mark.parametrize("path", PATHS)
def test_case_93_stopped_and_resumed(train, run_dir, tmp_path, fed, path):
    words = (*STEPS, *PATHS[path])
    done = train(*words)
    assert done.code == 0, done.err
    unbroken = list(fed)
    stops = (1, 5, 6, 7) if path == "accumulation" else (3, 6)
    for step in stops:
        fed.clear()
        again = stopped_copy(run_dir, tmp_path / f"at-{step}", step)
        done = train(*words, "--output-dir", again, "--resume", "auto")
        assert done.code == 0, done.err
        assert f"resume: {again / f'checkpoint-{step}'}, after step {step}" in done.err
        # With workers other processes collate.
        if path != "workers":
            assert 0 < len(fed) < len(unbroken)
            assert fed == unbroken[-len(fed) :]
        assert_same(run_dir, again)


def test_case_93_rows_of_64_samples(train, run_dir, tmp_path, data, fed):
    """The row's own numbers: 64 samples, batch 2, accumulation 4, saved at step 3, resumed to 8."""
    rows = [{"prompt": f"say {i} ", "completion": f"{i} " * (1 + i % 3)} for i in range(64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 4)
    assert train(*words, "--max-steps", 8).code == 0
    unbroken = list(fed)
    assert len(set(unbroken)) == len(unbroken) == 64
    fed.clear()
    stopped = ("--output-dir", tmp_path / "stopped")
    assert train(*words, *stopped, "--max-steps", 3).code == 0
    assert train(*words, *stopped, "--max-steps", 8, "--resume", "auto").code == 0
    assert fed == unbroken


class Tracker:
    """Stands for a tracker of accelerate, and draws random numbers as some do for a run's name."""

    def __init__(self, **options):
        pass

    def start(self):
        import random

        import torch

        random.random()
        torch.rand(3)

    store_init_configuration = finish = lambda self, *values: None

    def log(self, values, step=None):
        self.start()


@pytest.mark.parametrize("step", [2, 4])
def test_case_93_with_evaluations_and_trackers(train, run_dir, tmp_path, monkeypatch, step):
    """The checkpoint of a step is written before its evaluation, which a kill may undo."""
    monkeypatch.setitem(sys.modules, "wandb", sys)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    words = (*STEPS, *EVAL, "--adapter", "lora", "--lora-dropout", 0.3, "--report-to", "wandb")
    words += ("--save-steps", 2)
    done = train(*words, "--json")
    assert done.code == 0, done.err
    evals = (run_dir / "eval.jsonl").read_text()
    assert [json.loads(line)["step"] for line in evals.splitlines()] == [2, 4, 6, 8]
    again = stopped_copy(run_dir, tmp_path / "again", step)
    kept = evals.splitlines(keepends=True)[: step // 2 - 1]
    (again / "eval.jsonl").write_text("".join(kept) + f'{{"step": {step}, "lo')
    second = train(*words, "--json", "--output-dir", again, "--resume", "auto")
    assert second.code == 0, second.err
    assert_same(run_dir, again)
    assert (again / "eval.jsonl").read_text() == evals
    assert second.json()["best"]["step"] == done.json()["best"]["step"]


def test_log_is_cut_back_to_the_checkpoint(train, run_dir):
    assert train("--max-steps", 4, "--save-steps", 2).code == 0
    before = metrics(run_dir)
    shutil.rmtree(run_dir / "checkpoint-4")
    with (run_dir / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "loss": 9.0}\n{"step": 6, "lo')
    assert train("--max-steps", 4, "--resume", "auto").code == 0
    assert metrics(run_dir) == before


def test_report_of_a_shorter_run_is_not_that_of_a_longer_one(train, run_dir):
    """A run that was made longer, and killed when it had its last checkpoint and no report yet."""
    assert train("--max-steps", 2).code == 0
    short = (run_dir / "report.json").read_text()
    assert train("--max-steps", 4, "--resume", "auto").code == 0
    whole = json.loads((run_dir / "report.json").read_text())
    (run_dir / "report.json").write_text(short)
    shutil.rmtree(run_dir / "checkpoint-4")
    done = train("--max-steps", 4, "--resume", "auto", "--learning-rate", "5e-5")
    assert done.code == 0, done.err
    again = json.loads((run_dir / "report.json").read_text())
    for key in ("steps", "tokens", "final_loss"):
        assert again["train"][key] == whole["train"][key]


def test_run_goes_on_in_another_directory_with_its_past(train, run_dir, tmp_path):
    words = (*STEPS, *EVAL)
    assert train(*words).code == 0
    other = tmp_path / "other"
    done = train(*words, "--resume", run_dir / "checkpoint-3", "--output-dir", other, "--json")
    assert done.code == 0, done.err
    assert_same(run_dir, other)
    assert done.json()["train"]["steps"] == 8
    assert (other / "eval.jsonl").read_text() == (run_dir / "eval.jsonl").read_text()
    assert names(other) == ["checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "mistral"), "model is 'mistral', but {} was trained with 'qwen3'"),
        (("--seed", 1), "seed is 1, but {} was trained with 42"),
        (("--data-seed", 1), "data_seed is 1, but {} was trained with None"),
        (("--per-device-train-batch-size", 2), "per_device_train_batch_size is 2, but {} was"),
        (("--gradient-accumulation-steps", 2), "gradient_accumulation_steps is 2, but {} was"),
        (("--dataset", "chitchat"), "dataset is 'chitchat', but {} was trained with "),
        (("--max-length", 32), "max_length is 32, but {} was trained with 64"),
        (("--learning-rate", 1), "learning_rate is 1.0, but {} was trained with 5e-05"),
        (("--optim", "sgd"), "optim is 'sgd', but {} was trained with 'adamw_torch_fused'"),
        (("--adapter", "lora"), "adapter is 'lora', but {} was trained with 'none'"),
        (("--bf16",), "bf16 is True, but {} was trained with False"),
        (("--eval-fraction", 0.2), "eval_fraction is 0.2, but {} was trained with 0.0"),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, tuple) else "",
)
def test_resume_of_another_run_is_refused(train, run_dir, words, message):
    assert train("--max-steps", 1).code == 0
    left = sorted(path.name for path in run_dir.iterdir())
    done = train(*words, "--max-steps", 2, "--resume", "auto")
    assert done.code == 2
    assert "error: " + message.format(run_dir / "checkpoint-1") in done.err
    assert "without --resume starts a new run from its weights" in done.err
    assert sorted(path.name for path in run_dir.iterdir()) == left


def test_every_key_that_differs_is_named(train, run_dir):
    assert train("--max-steps", 1).code == 0
    done = train("--seed", 1, "--weight-decay", 0.1, "--max-steps", 2, "--resume", "auto")
    assert done.code == 2
    assert "weight_decay is 0.1, but " in done.err
    assert "\nseed is 1, but " in done.err


def test_what_may_change_is_said(train, run_dir):
    assert train("--max-steps", 1).code == 0
    words = ("--save-steps", 1, "--logging-steps", 1, "--ops", "none")
    done = train("--max-steps", 2, *words, "--resume", "auto")
    assert done.code == 0, done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("resume: ")]
    assert line == (
        f"resume: {run_dir / 'checkpoint-1'}, after step 1; ops is 'none' (was 'auto'); "
        "max_steps is 2 (was 1); logging_steps is 1 (was 10); save_steps is 1 (was 500)"
    )


def test_keys_that_may_change_are_keys():
    assert set(RunConfig.model_fields) > _FREE_KEYS


def test_checkpoint_older_than_a_key(train, run_dir):
    """A key that it does not know had the effect of its default."""
    from liger_cli.training.checkpoints.files import read_manifest, write_manifest

    assert train("--max-steps", 1).code == 0
    path = run_dir / "checkpoint-1"
    manifest = read_manifest(path)
    del manifest["config"]["max_grad_norm"], manifest["files"]
    (path / "manifest.json").unlink()
    write_manifest(path, manifest)
    done = train("--max-steps", 2, "--max-grad-norm", 0.5, "--resume", "auto")
    assert done.code == 2
    assert "max_grad_norm is 0.5, but" in done.err
    assert train("--max-steps", 2, "--resume", "auto").code == 0


@pytest.mark.parametrize(
    ("words", "number", "message"),
    [
        ((), 24, "it has 24 rows and had 23"),
        ((), 23, "its rows have another content"),
        (("--packing",), 23, "its rows have another content"),
        (("--streaming",), 24, "bytes and had"),
    ],
    ids=["more", "edited", "packed", "stream"],
)
def test_data_that_have_changed_are_refused(train, data, words, number, message):
    assert train(*words, "--max-steps", 1).code == 0
    rows = data.read_text().splitlines()
    rows[5] = rows[5].replace("say", "sag")
    data.write_text("\n".join([*rows, *rows][:number]) + "\n")
    done = train(*words, "--max-steps", 2, "--resume", "auto")
    assert done.code == 4
    assert "the dataset has changed since " in done.err
    assert message in done.err
