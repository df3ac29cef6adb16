"""Several processes train what one does, and the fp16 loss scale survives a checkpoint."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch
from forked_runs import start
from run_files import assert_same, metrics, stopped_copy, weights

from liger_cli.commands.train import prepare


def words_of(data, run_dir, *more):
    words = ("train", "-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu", "--max-length", 64)
    # An optimizer that feels a factor in the gradient, which Adam and clipping would hide.
    words += ("--optim", "sgd", "--learning-rate", 0.5, "--max-grad-norm", 0)
    return (*words, "--lr-scheduler-type", "constant", "--max-steps", 3, "--save-steps", 1, *more)


def launch(num_processes, words):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        start(*words, rank=rank, num_processes=num_processes, port=port)
        for rank in range(num_processes)
    ]
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * num_processes


def distance(some, others):
    return max(float((some[name] - other).abs().max()) for name, other in others.items())


# Of one process, and of two: rows that are padded by one are laid end to end by the two.
@pytest.mark.parametrize(
    ("alone", "shared"),
    [((), ()), ((), ("--padding-free",)), (("--packing",), ("--packing",))],
    ids=["padded", "padding-free", "packing"],
)
def test_case_271_two_processes_train_the_weights_of_one(data, tmp_path, alone, shared):
    """Eight rows a step, of different label counts; the last step has seven."""
    one, two = tmp_path / "one", tmp_path / "two"
    rows = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps")
    launch(1, words_of(data, one, *rows, 4, *alone))
    launch(2, words_of(data, two, *rows, 2, *shared))
    counts = ("step", "tokens", "trained_tokens")
    assert metrics(two, *counts) == metrics(one, *counts)
    for of_two, of_one in zip(
        metrics(two, "loss", "grad_norm"), metrics(one, "loss", "grad_norm"), strict=True
    ):
        assert of_two == pytest.approx(of_one, rel=1e-5)
    final = weights(one / "checkpoint-3")
    assert distance(weights(two / "checkpoint-3"), final) <= 1e-6
    assert distance(weights(one / "checkpoint-1"), final) >= 1e-3


def test_two_processes_train_by_the_weights_of_rows_what_one_does(data, tmp_path):
    """Some batches have weights and others none; their sum is over both processes."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [{**row, "loss_weight": 0.1 + i} if i % 3 == 0 else row for i, row in enumerate(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = tmp_path / "one", tmp_path / "two"
    size = ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps")
    launch(1, words_of(data, one, *size, 4))
    launch(2, words_of(data, two, *size, 2, "--padding-free"))
    for of_two, of_one in zip(
        metrics(two, "loss", "grad_norm"), metrics(one, "loss", "grad_norm"), strict=True
    ):
        assert of_two == pytest.approx(of_one, rel=1e-5)
    final = weights(one / "checkpoint-3")
    assert distance(weights(two / "checkpoint-3"), final) <= 1e-6
    assert distance(weights(one / "checkpoint-1"), final) >= 1e-3


def test_case_271_the_loss_scale_is_saved_and_restored(data, run_dir, tmp_path, liger, monkeypatch):
    make = prepare.make_accelerator

    def make_scaled(*args: Any, **options: Any) -> Any:
        accelerator = make(*args, **options)
        # The scale doubles after three steps that did not overflow.
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
        return accelerator

    monkeypatch.setattr(prepare, "make_accelerator", make_scaled)

    def scaler_of(directory, step):
        path = directory / f"checkpoint-{step}" / "trainer_state.pt"
        return torch.load(path, weights_only=True)["scaler"]

    words = ("--max-steps", 4, "--per-device-train-batch-size", 2)
    assert liger(*words_of(data, run_dir, *words)).code == 0
    found = [(s["scale"], s["_growth_tracker"]) for s in (scaler_of(run_dir, i) for i in (2, 4))]
    assert found == [(256.0, 2), (512.0, 1)]
    again = stopped_copy(run_dir, tmp_path / "again", 2)
    assert liger(*words_of(data, again, *words, "--resume", "auto")).code == 0
    assert scaler_of(again, 4) == scaler_of(run_dir, 4)
    assert_same(run_dir, again)
