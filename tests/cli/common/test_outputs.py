"""What cannot be written is told before anything is measured or trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from liger_cli.common.outputs import check_writable
from liger_cli.errors import ConfigError, EnvironmentProblem

RESULTS = Path(__file__).parents[3] / "docs" / "results"
BENCH = RESULTS / "bench-llama-1b-h100.json"


@pytest.fixture
def nowhere(tmp_path):
    """A place below a file, where nobody can write, root included."""
    file = tmp_path / "file"
    file.write_text("mine")
    return file / "new" / "x.png"


def test_what_can_be_written_is_left_as_it_was(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    check_writable(file, "--save")
    check_writable(tmp_path / "a" / "b", "--save")
    check_writable(tmp_path / "a" / "b", "output_dir", is_directory=True)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a directory, and should be a file"):
        check_writable(tmp_path, "--save")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, and should be a directory"):
        check_writable(tmp_path / "file", "output_dir", is_directory=True)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def full(**_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("liger_cli.common.outputs.tempfile.TemporaryFile", full)
    with pytest.raises(EnvironmentProblem, match=r"--save .* cannot be written: No space left"):
        check_writable(tmp_path / "x", "--save")


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (("bench", "--model", "qwen3", "--html"), "--html"),
        (("bench", "ops", "--quick", "--save"), "--save"),
        (("bench", "ops", "--quick", "--markdown"), "--markdown"),
        (("report", BENCH, "--html"), "--html"),
        (("report", BENCH, "--markdown"), "--markdown"),
        (("report", BENCH, "--png"), "--png"),
        (("config", "init"), "file"),
        (
            ("train", "-m", "qwen3", "-d", "synthetic", "--max-steps", 1, "--output-dir"),
            "output_dir",
        ),
    ],
)
def test_refused_before_the_work(liger, nowhere, monkeypatch, words, flag):
    def no_work(*_words, **_options):
        raise AssertionError("the work began")

    for name in (
        "commands.bench.models.comparison.run_bench",
        "commands.bench.ops.rounds.run_ops",
        "commands.train.prepare.load_inputs",
    ):
        monkeypatch.setattr(f"liger_cli.{name}", no_work)
    done = liger(*words, nowhere)
    assert done.code == 3, done.err
    assert f"{flag} {nowhere} cannot be written: Not a directory" in done.err
    assert (nowhere.parents[1]).read_text() == "mine"


def test_files_in_new_directories_are_written(liger, tmp_path):
    for number, option in enumerate(("--html", "--markdown")):
        file = tmp_path / f"new-{number}" / "page"
        assert liger("report", BENCH, option, file).code == 0
        assert "llama-1b" in file.read_text()
    assert liger("config", "init", tmp_path / "new" / "mine.yaml").code == 0
    assert (tmp_path / "new" / "mine.yaml").is_file()


@pytest.mark.parametrize("words", [("--html",), ("--png", "charts", "--html")])
def test_run_after_an_option_that_needs_no_file(liger, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "bench.json"
    run.write_text(json.dumps(json.loads(BENCH.read_text())))
    done = liger("report", *words, run)
    assert done.code == 0, done.err
    assert "llama-1b" in (tmp_path / "bench.html").read_text()
