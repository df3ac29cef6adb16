"""case_231: a directory has one run at a time; the second is refused and changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.checkpoints import run_lock
from liger_cli.training.checkpoints.run_lock import LOCK, locked

SPAWN = multiprocessing.get_context("spawn")


def hold(file, ready, release):
    """Hold the lock in another process until it may end."""
    with locked(file, "output_dir run", print):
        ready.set()
        release.wait(60)


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a directory; the directory is new."""
    file = tmp_path / "new" / "run" / LOCK
    ready, release = SPAWN.Event(), SPAWN.Event()
    process = SPAWN.Process(target=hold, args=(file, ready, release))
    process.start()
    assert ready.wait(60)
    yield file, process, release
    process.kill()
    process.join()


def take(file):
    notes = []
    with locked(file, "output_dir run", notes.append):
        return notes


def values_of(**changes):
    this = {"host": socket.gethostname(), "pid": os.getpid()}
    return json.dumps({**this, "started": run_lock._start_of(os.getpid()), **changes})


def test_case_231_held_by_another_process(holder):
    file, process, release = holder
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=rf"in use by a run, process {process.pid} on "):
        take(file)
    assert file.read_bytes() == before
    release.set()
    process.join()
    # Directories that were made for the lock alone are gone with it.
    assert not file.parents[1].exists()
    assert take(file) == []


def test_case_231_killed_holder_is_recognised_and_said(holder):
    file, process, _ = holder
    process.kill()
    process.join()
    assert file.exists()
    [note] = take(file)
    assert f"was left by process {process.pid} on {socket.gethostname()} that has ended" in note
    assert not file.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (values_of(started="1"), "has ended"),
        (values_of(pid=2**22 + 1), "has ended"),
        ("", None),
        ("{", "has ended"),
        ("[]", "has ended"),
    ],
    ids=["id used again", "no such process", "empty", "half", "another kind"],
)
def test_case_231_stale_locks(tmp_path, content, words):
    (tmp_path / LOCK).write_text(content)
    notes = take(tmp_path / LOCK)
    assert len(notes) == (words is not None)
    assert words is None or words in notes[0]
    assert not (tmp_path / LOCK).exists()


def test_case_231_process_that_is_not_reaped_has_ended(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    started = run_lock._start_of(child.pid)
    deadline = time.monotonic() + 30
    while run_lock._start_of(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    (tmp_path / LOCK).write_text(values_of(pid=child.pid, started=started))
    assert len(take(tmp_path / LOCK)) == 1
    child.wait()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (values_of(host="elsewhere"), "locked by process .* on elsewhere"),
        (values_of(host="elsewhere", pid=2**22 + 1), "whether that run has ended cannot be found"),
        # Where the file system has no locks, the content alone decides.
        (values_of(), "in use by a run"),
    ],
    ids=["host", "process of another host", "content"],
)
def test_case_231_locks_that_hold(tmp_path, content, message):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        take(tmp_path / LOCK)
    if "elsewhere" in content:
        assert f"delete {tmp_path / LOCK}" in caught.value.hint
    assert (tmp_path / LOCK).read_text() == content


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_case_231_released_after_errors(tmp_path, error):
    with pytest.raises(error), locked(tmp_path / LOCK, "output_dir", print):
        raise error
    assert not (tmp_path / LOCK).exists()


def test_case_231_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentProblem, match="cannot be written: Not a directory"):
        take(tmp_path / "file" / "run" / LOCK)


def contend(file, barrier, results):
    barrier.wait(60)
    try:
        with locked(file, "output_dir", lambda note: None):
            held = file.read_text()
            time.sleep(0.05)
            results.put(held == file.read_text() and json.loads(held)["pid"] == os.getpid())
    except ConfigError:
        results.put(None)


def test_case_231_one_of_many_takes_a_stale_lock(tmp_path):
    """Judging a lock and taking it over are one step."""
    context = multiprocessing.get_context("fork")
    for _ in range(10):
        (tmp_path / LOCK).write_text(values_of(started="1"))
        barrier, results = context.Barrier(4), context.SimpleQueue()
        contenders = [
            context.Process(target=contend, args=(tmp_path / LOCK, barrier, results))
            for _ in range(4)
        ]
        for process in contenders:
            process.start()
        found = [results.get() for _ in contenders]
        for process in contenders:
            process.join()
        assert False not in found
        assert True in found
        assert not (tmp_path / LOCK).exists()


def files(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("words", [(), ("--resume", "auto"), ("--baseline", 1)], ids=str)
def test_case_231_second_run_is_refused_at_its_start(train, run_dir, monkeypatch, words):
    monkeypatch.setattr(
        "liger_cli.commands.train.prepare.load_inputs", lambda *args, **more: pytest.fail("began")
    )
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text("mine")
    (run_dir / LOCK).write_text(
        values_of(pid=os.getppid(), started=run_lock._start_of(os.getppid()))
    )
    before = files(run_dir)
    done = train(*words)
    assert done.code == 2
    assert f"output_dir {run_dir} is in use by a run, process {os.getppid()} on" in done.err
    assert files(run_dir) == before


def test_case_231_killed_run_is_gone_on_with(train, run_dir):
    run_dir.mkdir()
    (run_dir / LOCK).write_text(values_of(started="1"))
    (run_dir / ".config.7.unfinished.yaml").write_text("ha")
    done = train("--max-steps", 1, "--resume", "auto", "--json")
    assert done.code == 0, done.err
    assert f"{run_dir / LOCK} was left by process {os.getpid()}" in done.err
    left = {path.name for path in run_dir.iterdir()}
    assert left == {"checkpoint-1", "config.yaml", "metrics.jsonl", "report.json"}
    # A dry run writes nothing, so it asks for no lock.
    (run_dir / LOCK).write_text(values_of(host="elsewhere"))
    assert train("--max-steps", 2, "--resume", "auto", "--dry-run").code == 0
    assert train("--max-steps", 2, "--resume", "auto").code == 2


def test_case_231_merge_into_one_directory(liger, tmp_path):
    from dataclasses import replace

    from liger_cli.commands.merge.merge import merge
    from liger_cli.training.model.presets import list_presets

    output = tmp_path / "merged"
    source = replace(next(iter(list_presets())), adapter=tmp_path)
    (tmp_path / ".merged.lock").write_text(values_of())
    with pytest.raises(ConfigError, match=f"output {output} is in use by a run"):
        merge(source, output)
