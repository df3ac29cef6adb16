"""case_240: a disk that is full names the file, and leaves the old one or none."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from liger_cli.common.outputs import replacing, write_file
from liger_cli.errors import EnvironmentProblem
from liger_cli.report import TrainProgress
from liger_cli.training.checkpoints.run_log import JsonLines, read_lines
from liger_cli.training.model.adapters import base_place
from liger_cli.training.model.presets import list_presets

ROOT = Path(__file__).parents[4]
BENCH = ROOT / "docs" / "results" / "bench-llama-1b-h100.json"


@pytest.fixture
def full_disk():
    """Lets no file grow beyond a size, as a full disk does in the middle of one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("old", [None, "old"])
def test_case_240_a_file_is_whole_or_as_it_was(tmp_path, full_disk, old):
    path = tmp_path / "page.html"
    if old is not None:
        path.write_text(old)
        path.chmod(0o640)
    full_disk(1000)
    with pytest.raises(EnvironmentProblem, match=rf"^{path} cannot be written: File too large"):
        write_file(path, "x" * 2000)
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if old else [])
    assert old is None or path.read_text() == old
    full_disk(10_000)
    write_file(path, "x" * 2000)
    assert path.read_text() == "x" * 2000
    assert old is None or path.stat().st_mode & 0o777 == 0o640


def test_case_240_file_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), sync(fd)))
    monkeypatch.setattr(Path, "replace", lambda *to: (events.append("rename"), replace(*to)))
    write_file(tmp_path / "a", "text")
    assert events == ["fsync", "rename"]


def test_case_240_error_in_the_block_leaves_nothing(tmp_path):
    def write_half():
        with replacing(tmp_path / "a.png") as unfinished:
            unfinished.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert not list(tmp_path.iterdir())


def test_case_240_links_and_devices_stay_what_they_are(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    write_file(Path("/dev/null"), "gone")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("report", BENCH, "--html"), "page.html"),
        (("report", BENCH, "--markdown"), "page.md"),
        (("report", BENCH, "--png"), "bars.png"),
        (("config", "init"), "run.yaml"),
    ],
)
def test_case_240_commands_name_their_file(liger, tmp_path, full_disk, words, name):
    path = tmp_path / "new" / name
    full_disk(100)
    done = liger(*words, path)
    full_disk(10**9)
    assert done.code == 3, done.err
    assert f"error: {path} cannot be written: File too large" in done.err
    assert not list(path.parent.iterdir())


def test_case_240_no_file_is_written_but_by_the_helper():
    """Every other write is into a directory that gets its name when it is whole."""
    allowed = {
        "outputs.py": 2,  # the helper, and check_writable
        "files.py": 1,  # the manifest, in a directory that is written aside
        "cache.py": 1,  # the same
        "checkpoint.py": 1,  # the same
        "merge.py": 1,  # the same
        "tensor_files.py": 1,  # the same
        "demo_model.py": 1,  # the same
        "new_tokens.py": 1,  # the same
        "kernels.py": 4,  # the same
        "process.py": 1,  # the log of a process, in a temporary directory
        "ops.py": 1,  # a pipe
        "launcher.py": 1,  # the log of a rank, in a temporary directory
        "faults.py": 1,  # the fault of a rank, in the same
        "ranks.py": 2,  # where the run is, in the same, and the null device
        "agreement.py": 1,  # a file that other hosts look for, deleted at once
        "run_log.py": 1,  # a line at a time, after the helper has written the file
    }
    words = (
        ".write_text(",
        ".write_bytes(",
        'open("w',
        'open("a',
        'open("r+',
        ', "w"',
        ".savefig(",
    )
    found = {}
    for path in (ROOT / "liger_cli").rglob("*.py"):
        lines = path.read_text().splitlines()
        writes = [line for line in lines if any(word in line for word in words)]
        if writes := [line for line in writes if "savefig(unfinished" not in line]:
            found[path.name] = len(writes)
    assert found == allowed


def rows(path):
    return [row["step"] for row in read_lines(path, (), on_bad=pytest.fail)]


def test_case_240_lines_are_kept_until_they_can_be_written(tmp_path, full_disk, caplog):
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    line = len(json.dumps({"step": 1})) + 1
    log.write({"step": 1})
    # Room for one line and a half.
    full_disk(2 * line + line // 2)
    for step in (2, 3, 4):
        log.write({"step": step})
    assert rows(path) == [1, 2]
    assert [record.message for record in caplog.records] == [
        f"{path} cannot be written: File too large; its lines are kept until they can be"
    ]
    with pytest.raises(EnvironmentProblem, match=rf"^{path} cannot be written: File too large"):
        log.sync()
    full_disk(10**6)
    log.write({"step": 5})
    log.sync()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in range(1, 6))


def test_case_240_base_model_is_whole_or_not_there(tmp_path):
    class Model:
        def save_pretrained(self, directory):
            (Path(directory) / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    source = next(source for source in list_presets() if source.kind == "random")
    with pytest.raises(EnvironmentProblem, match=rf"{tmp_path / 'base'} cannot be written: No sp"):
        base_place(source, Model(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_case_240_append_that_fails_loses_no_checkpoint(train, run_dir, monkeypatch):
    """From the second step on metrics.jsonl takes no line; the run ends at its next checkpoint."""
    write, steps = os.pwrite, []
    shown = TrainProgress.update

    def full(descriptor, *given):
        if steps and steps[-1] > 1:
            raise OSError(28, "No space left on device")
        return write(descriptor, *given)

    def update(progress, step, **values):
        steps.append(step)
        shown(progress, step, **values)

    monkeypatch.setattr("liger_cli.training.checkpoints.run_log.os.pwrite", full)
    monkeypatch.setattr(TrainProgress, "update", update)
    words = ("--max-steps", 6, "--save-steps", 4, "--logging-steps", 1)
    done = train(*words, "--json")
    assert done.code == 3, done.err
    log = run_dir / "metrics.jsonl"
    assert f"error: {log} cannot be written: No space left on device" in done.err
    assert "checkpoint-4 was written, and --resume auto continues from it" in done.err
    assert rows(log) == [1, 2]
    monkeypatch.undo()
    done = train(*words, "--resume", "auto")
    assert done.code == 0, done.err
    assert rows(log) == [1, 2, 5, 6]
