"""async_save: the same checkpoints, written while training goes on."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from run_files import assert_same, metrics, names, stopped_copy, weights
from torch.utils._pytree import tree_flatten

from liger_cli.errors import EnvironmentProblem, OutOfMemory
from liger_cli.training.checkpoints import background, saver
from liger_cli.training.checkpoints.files import find_damage
from liger_cli.training.session import TrainSession

LORA = ("--adapter", "lora", "--learning-rate", 1e-2)
FORMS = {
    "full": (),
    "bfloat16": ("--dtype", "bfloat16", "--master-weights"),
    "lora": LORA,
}


def state(checkpoint):
    return torch.load(checkpoint / "trainer_state.pt", weights_only=True)


def assert_equal(one, other):
    """Both checkpoints have the same values, to the bit."""
    assert find_damage(one) is find_damage(other) is None
    assert sorted(path.name for path in one.iterdir()) == sorted(p.name for p in other.iterdir())
    (found, form), (wanted, its_form) = (
        tree_flatten((weights(path), state(path))) for path in (one, other)
    )
    assert form == its_form
    for value, its_value in zip(found, wanted, strict=True):
        if isinstance(value, torch.Tensor):
            assert value.dtype == its_value.dtype
            assert torch.equal(value, its_value)
        else:
            assert value == its_value


@pytest.fixture
def patch_write(monkeypatch):
    """Puts a function of (write, run_dir, staged) in the place of the one that writes."""

    def patch(replacement):
        write = saver.write_checkpoint
        monkeypatch.setattr(
            saver,
            "write_checkpoint",
            lambda place, staged, writers: replacement(
                lambda: write(place, staged, writers), place, staged
            ),
        )

    return patch


def write_late(write, run_dir, staged):
    """Write no checkpoint but the last before the step after it is logged."""
    deadline = time.monotonic() + 60
    while staged.step < 3 and len(metrics(run_dir)) <= staged.step:
        if time.monotonic() > deadline:
            raise EnvironmentProblem("training waits")
        time.sleep(0.01)
    write()


@pytest.mark.parametrize("form", FORMS)
def test_training_goes_on_and_changes_nothing_that_is_written(
    train, run_dir, tmp_path, patch_write, form
):
    words, waited = ("--save-steps", 1, *FORMS[form]), tmp_path / "waited"
    done = train(*words, "--output-dir", waited)
    assert done.code == 0, done.err
    patch_write(write_late)
    words += ("--async-save", "true")
    done = train(*words)
    assert done.code == 0, done.err
    assert names(run_dir) == names(waited) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert_same(waited, run_dir)
    for name in names(run_dir):
        assert_equal(run_dir / name, waited / name)
    if form == "full":
        again = stopped_copy(run_dir, tmp_path / "again", 1)
        done = train(*words, "--output-dir", again, "--resume", "auto")
        assert done.code == 0, done.err
        assert_same(waited, again)


def test_failed_write_ends_the_run_at_the_next_step(train, run_dir, patch_write):
    failed = []

    def fail(write, place, staged):
        if staged.step == 1:
            return write()
        failed.append(staged.step)
        raise EnvironmentProblem(f"checkpoint-{staged.step} cannot be written: no space")

    patch_write(fail)
    done = train("--save-steps", 1, "--max-steps", 9, "--async-save", "true")
    assert done.code == 3
    assert "error: checkpoint-2 cannot be written: no space\n" in done.err
    assert failed == [2]
    assert len(metrics(run_dir)) == 3
    assert names(run_dir) == ["checkpoint-1"]


@pytest.mark.parametrize("error", [OutOfMemory("full"), KeyboardInterrupt()])
def test_an_error_of_a_step_waits_and_a_second_signal_does_not(
    train, run_dir, patch_write, monkeypatch, error
):
    steps, step, ends = iter(range(2)), TrainSession.step, threading.Event()

    def fail_third(self):
        if next(steps, None) is None:
            raise error
        return step(self)

    def write_slowly(write, place, staged):
        ends.wait(1)
        write()

    monkeypatch.setattr(TrainSession, "step", fail_third)
    patch_write(write_slowly)
    done = train("--save-steps", 2, "--async-save", "true")
    is_signal = isinstance(error, KeyboardInterrupt)
    assert done.code == (130 if is_signal else 5)
    assert names(run_dir) == ([] if is_signal else ["checkpoint-2"])
    # No later test has this thread beside it.
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


def test_limit_and_best_follow_when_a_write_is_done(train, run_dir, patch_write):
    patch_write(write_late)
    words = ("--save-steps", 1, "--save-total-limit", 1, "--async-save", "true")
    words += ("--eval-fraction", 0.2, "--eval-steps", 1, "--load-best-model-at-end")
    done = train(*words, "--learning-rate", 1e-2)
    assert done.code == 0, done.err
    # The second was the best when the third was whole, and is deleted by no later one.
    assert names(run_dir) == ["checkpoint-2", "checkpoint-3"]
    assert (run_dir / "best").resolve() == run_dir / "checkpoint-3"


def test_host_without_room_is_named_and_training_waits(
    train, run_dir, monkeypatch, patch_write, caplog
):
    threads = []
    patch_write(lambda write, *more: (threads.append(threading.current_thread()), write()))
    monkeypatch.setattr(background, "free_host_memory", lambda: 1000)
    done = train("--save-steps", 1, "--async-save", "true")
    assert done.code == 0, done.err
    assert [record.getMessage() for record in caplog.records if "waits" in record.message] == [
        "training waits for checkpoints: the copies of async_save take 5 MB, and the host has 1 kB "
        "free"
    ]
    assert set(threads) == {threading.main_thread()}
    assert find_damage(run_dir / "checkpoint-3") is None
