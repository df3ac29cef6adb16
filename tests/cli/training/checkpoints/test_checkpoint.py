"""Checkpoints: when one is written, which are kept, what they hold, and what damages them."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from accelerate import DistributedType
from run_files import assert_same, metrics, names, stopped_copy

from liger_cli.report import TrainProgress
from liger_cli.training import evaluate as evaluation
from liger_cli.training.checkpoints import files as checkpoint_files
from liger_cli.training.checkpoints import saver
from liger_cli.training.checkpoints.files import find_checkpoints, find_damage, written_aside
from liger_cli.training.checkpoints.random_state import random_state, set_random_state
from liger_cli.training.eval_result import EvalResult
from liger_cli.training.runtime import launch, stop_signals
from liger_cli.training.runtime.stop_signals import StopRequest

STEPS = ("--max-steps", 4, "--save-steps", 2, "--logging-steps", 1)


@pytest.fixture
def after_step(monkeypatch):
    """Calls a function with the number of each step that a run has done."""
    reported = TrainProgress.update

    def use(function):
        def update(progress, step, **values):
            reported(progress, step, **values)
            function(step)

        monkeypatch.setattr(TrainProgress, "update", update)

    return use


@pytest.fixture
def eval_losses(monkeypatch):
    """Lets the evaluations of a run find these losses, one after the other."""

    def use(*losses):
        results = iter(losses)
        monkeypatch.setattr(
            evaluation,
            "evaluate",
            lambda *args, **options: EvalResult(next(results), 2, 0.5, 1, 10),
        )

    return use


def test_every_n_steps_and_at_the_end(train, run_dir):
    assert train("--max-steps", 5, "--save-steps", 2).code == 0
    assert names(run_dir) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_every_n_minutes(train, run_dir, after_step, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock[0])
    after_step(lambda step: clock.__setitem__(0, 25.0 * step))
    done = train("--max-steps", 8, "--save-minutes", 1, "--save-steps", 0, "--logging-steps", 1)
    assert done.code == 0, done.err
    assert names(run_dir) == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_on_a_signal(train, run_dir, after_step, number):
    after_step(lambda step: step == 3 and signal.raise_signal(number))
    done = train("--max-steps", 9, "--save-steps", 0, "--logging-steps", 1)
    assert done.code == 130
    assert names(run_dir) == ["checkpoint-3"]
    assert f"interrupted after step 3; its checkpoint is {run_dir / 'checkpoint-3'}" in done.err


@pytest.fixture
def sigint_raises() -> Iterator[None]:
    """Have SIGINT raise KeyboardInterrupt, also where a shell started the tests without it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("sigint_raises")
def test_later_signal_acts_at_once_but_not_an_echo(monkeypatch):
    """A wrapper hands on the Ctrl-C that the terminal has sent to the run as well."""
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        later = time.monotonic() + 5
        monkeypatch.setattr(stop_signals.time, "monotonic", lambda: later)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_launch_of_sharded_processes_is_refused(train, run_dir, monkeypatch, kind):
    monkeypatch.setattr(
        launch.Accelerator, "distributed_type", property(lambda _: DistributedType(kind))
    )
    done = train()
    assert done.code == 3
    assert f"the launch asks for {kind}; this version trains on one process or with" in done.err
    assert not run_dir.exists()


def test_limit_keeps_the_best_and_the_newest(train, run_dir, eval_losses):
    eval_losses(1.0, 3.0, 2.0, 4.0, 5.0)
    words = ("--eval-fraction", 0.2, "--eval-steps", 1, "--save-steps", 1)
    done = train(*words, "--max-steps", 5, "--save-total-limit", 2, "--json")
    assert done.code == 0, done.err
    assert names(run_dir) == ["checkpoint-1", "checkpoint-5"]
    assert (run_dir / "best").resolve() == run_dir / "checkpoint-1"
    assert done.json()["best"]["checkpoint"] == str(run_dir / "checkpoint-1")
    assert not list(run_dir.glob(".*"))


def test_best_is_saved_though_no_checkpoint_is_due(train, run_dir, eval_losses):
    eval_losses(3.0, 1.0, 2.0, 4.0)
    words = ("--eval-fraction", 0.2, "--eval-steps", 1, "--load-best-model-at-end")
    done = train(*words, "--max-steps", 4, "--save-steps", 0, "--save-total-limit", 1)
    assert done.code == 0, done.err
    assert names(run_dir) == ["checkpoint-2", "checkpoint-4"]
    assert (run_dir / "best").resolve() == run_dir / "checkpoint-2"


def test_early_end_is_saved_and_not_resumed(train, run_dir, eval_losses):
    eval_losses(1.0, 2.0)
    words = ("--eval-fraction", 0.2, "--eval-steps", 1, "--early-stopping-patience", 1)
    words += ("--max-steps", 9, "--save-steps", 0, "--json")
    report = train(*words).json()
    assert report["stop"]["step"] == 2
    assert names(run_dir) == ["checkpoint-2"]
    # Where its report is lost, too, it has nothing left to do.
    for name in (None, "report.json"):
        if name:
            (run_dir / name).unlink()
        done = train(*words, "--resume", "auto")
        assert done.code == 0, done.err
        assert done.json()["stop"] == report["stop"]
        assert len(metrics(run_dir)) == 2


def test_limit_deletes_the_damaged_first(train, run_dir):
    assert train("--max-steps", 3, "--save-steps", 1).code == 0
    (run_dir / "checkpoint-2" / "trainer_state.pt").write_text("junk")
    words = ("--max-steps", 4, "--save-steps", 1, "--save-total-limit", 3)
    assert train(*words, "--resume", "auto").code == 0
    assert names(run_dir) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_old_checkpoint_that_cannot_be_deleted(train, run_dir, monkeypatch, caplog):
    delete = checkpoint_files.shutil.rmtree

    def fail(path, **options):
        if path.name == ".checkpoint-1.replaced" and not options:
            raise PermissionError(13, "Permission denied", str(path))
        delete(path, **options)

    monkeypatch.setattr(checkpoint_files.shutil, "rmtree", fail)
    done = train("--max-steps", 2, "--save-steps", 1, "--save-total-limit", 1)
    assert done.code == 0, done.err
    assert f"the old {run_dir / 'checkpoint-1'} cannot be deleted: [Errno 13]" in caplog.text


def test_manifest_lists_every_file(train, run_dir):
    assert train(*STEPS, "--eval-fraction", 0.2, "--eval-steps", 2).code == 0
    path = run_dir / "checkpoint-2"
    manifest = checkpoint_files.read_manifest(path)
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {"manifest.json", *manifest["files"]}
    assert {"model.safetensors", "trainer_state.pt", "rng-0.pt"} <= set(manifest["files"])
    for name, entry in manifest["files"].items():
        assert entry["bytes"] == (path / name).stat().st_size
        assert entry["sha256"] == checkpoint_files._hash(path / name)
    assert (manifest["step"], manifest["num_processes"]) == (2, 1)
    assert manifest["config"] == json.loads(json.dumps(manifest["config"]))
    state = torch.load(path / "trainer_state.pt", weights_only=True)
    assert set(state) == {"optimizer", "scheduler", "scaler", "data", "objective"}
    assert find_damage(path) is None


def test_random_generators_of_all_kinds_are_restored(device):
    def draw():
        numbers = [random.random(), np.random.rand(), torch.rand(()).item()]
        return [*numbers, torch.rand((), device=device).item()]

    saved = random_state(device)
    first = draw()
    assert draw() != first
    set_random_state(saved, device)
    assert draw() == first


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS = {"cut": cut, "flipped": flip, "gone": lambda path: path.unlink()}


@pytest.mark.parametrize("harm", HARMS)
def test_damage_of_any_file_is_found(train, run_dir, tmp_path, harm):
    assert train("--max-steps", 1).code == 0
    for file in (run_dir / "checkpoint-1").iterdir():
        harmed = tmp_path / file.name / "checkpoint-1"
        shutil.copytree(run_dir / "checkpoint-1", harmed)
        HARMS[harm](harmed / file.name)
        said = find_damage(harmed)
        assert said is not None
        assert said.startswith(f"{file.name} "), said


@pytest.mark.parametrize(
    ("harm", "name", "message"),
    [
        ("cut", "model.safetensors", "bytes, not"),
        ("flipped", "trainer_state.pt", "has changed since it was written"),
        ("gone", "rng-0.pt", "is missing"),
        ("flipped", "manifest.json", "has changed since it was written"),
    ],
)
def test_damaged_checkpoint_gives_way_to_the_one_before(
    train, run_dir, tmp_path, harm, name, message
):
    assert train(*STEPS).code == 0
    run = stopped_copy(run_dir, tmp_path / "stopped", 4)
    newest = run / "checkpoint-4"
    HARMS[harm](newest / name)
    done = train(*STEPS, "--output-dir", run, "--resume", "auto")
    assert done.code == 0, done.err
    [said] = [line for line in done.err.splitlines() if " is damaged: " in line]
    assert said.startswith(f"{newest} is damaged: {name} ")
    assert message in said
    assert said.endswith("; resuming from checkpoint-2 instead")
    assert_same(run_dir, run)
    assert find_damage(newest) is None


def test_named_checkpoint_that_is_damaged_gives_way_too(train, run_dir):
    assert train(*STEPS, "--save-steps", 1).code == 0
    flip(run_dir / "checkpoint-3" / "model.safetensors")
    done = train(*STEPS, "--resume", run_dir / "checkpoint-3")
    assert done.code == 0, done.err
    # An older one, never the newer that was not asked for.
    assert "resuming from checkpoint-2 instead" in " ".join(done.err.split())


def test_every_checkpoint_damaged(train, run_dir):
    assert train(*STEPS).code == 0
    flip(run_dir / "checkpoint-4" / "rng-0.pt")
    (run_dir / "checkpoint-2" / "config.json").unlink()
    before = (run_dir / "metrics.jsonl").read_text()
    done = train(*STEPS, "--resume", "auto")
    assert done.code == 4
    assert "no checkpoint is whole: " in done.err
    assert f"{run_dir / 'checkpoint-4'} is damaged: rng-0.pt has changed since" in done.err
    assert f"{run_dir / 'checkpoint-2'} is damaged: config.json is missing" in done.err
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_half_written_checkpoint_is_none(train, run_dir):
    """What a process leaves that is killed while it writes, and one killed while it deletes."""
    assert train(*STEPS).code == 0
    (run_dir / "checkpoint-4").rename(run_dir / ".checkpoint-4.unfinished")
    shutil.copytree(run_dir / "checkpoint-2", run_dir / ".checkpoint-1.replaced")
    done = train(*STEPS, "--resume", "auto")
    assert done.code == 0, done.err
    assert "after step 2" in done.err
    assert names(run_dir) == ["checkpoint-2", "checkpoint-4"]
    assert not list(run_dir.glob(".*"))


def test_directory_is_written_in_one_step(tmp_path):
    target = tmp_path / "checkpoint-1"
    for content in ("one", "two"):
        with written_aside(target) as directory:
            (directory / "file").write_text(content)
            assert not target.exists() or (target / "file").read_text() == "one"
        assert (target / "file").read_text() == content

    with pytest.raises(FileExistsError), written_aside(target) as directory:
        directory.mkdir()
    assert (target / "file").read_text() == "two"
    assert list(tmp_path.iterdir()) == [target]


def test_files_and_directory_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(checkpoint_files, "_sync", lambda path: events.append(path.name))
    target = tmp_path / "checkpoint-1"
    with written_aside(target) as directory:
        (directory / "file").touch()
        name = directory.name
    assert events == ["file", name, tmp_path.name]


def fail_from_step_three(after_step, monkeypatch, kind):
    """Lets what a run writes after step 3 fail; returns what undoes it."""
    if kind == "full":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        # The weights have 1.6 MB.
        small = (1_000_000, limits[1])
        after_step(
            lambda step: resource.setrlimit(resource.RLIMIT_FSIZE, small if step > 2 else limits)
        )
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    fails = []
    after_step(lambda step: fails.append(step) if step > 2 else None)
    make = checkpoint_files.Path.mkdir

    def mkdir(path, *args, **options):
        if fails and path.name.endswith(".unfinished"):
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *args, **options)

    monkeypatch.setattr(checkpoint_files.Path, "mkdir", mkdir)
    return fails.clear


@pytest.mark.parametrize(
    ("kind", "message"), [("full", "File too large"), ("unwritable", "Permission denied")]
)
def test_checkpoint_that_cannot_be_written(
    train, tmp_path, run_dir, after_step, monkeypatch, kind, message
):
    assert train(*STEPS, "--output-dir", tmp_path / "whole").code == 0
    undo = fail_from_step_three(after_step, monkeypatch, kind)
    try:
        done = train(*STEPS)
    finally:
        undo()
    monkeypatch.undo()
    assert done.code == 3
    assert f"{run_dir / 'checkpoint-4'} cannot be written: " in done.err
    assert message in done.err
    assert "The earlier checkpoint-2 is as it was: --resume auto continues from it." in done.err
    assert "Traceback" not in done.err
    assert [path.name for path in find_checkpoints(run_dir)] == ["checkpoint-2"]
    assert find_damage(run_dir / "checkpoint-2") is None
    assert not list(run_dir.glob(".*"))
    assert train(*STEPS, "--resume", "auto").code == 0
    assert_same(tmp_path / "whole", run_dir)
