"""case_232: stdout and stderr that cannot be written end no command."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys

import pytest

from liger_cli.app import main
from liger_cli.common.streams import SafeStreams
from liger_cli.report import TrainProgress, show_json, show_lines

SHOW = ("config", "show", "--model", "qwen3")


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w")


def full_disk():
    return open("/dev/full", "w")  # noqa: SIM115 (the test closes it)


@contextlib.contextmanager
def broken_streams(make):
    """Both streams of this process are broken, as Python opens them."""
    # In the body of a test: pytest sets its own between a fixture and its test.
    streams = make(), make()
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        yield
    for stream in streams:
        # Nothing may be left in a buffer: the interpreter would fail to write it at its end.
        stream.close()


breaks = pytest.mark.parametrize("make", [closed_pipe, full_disk])


def write_all_ways():
    show_lines("a line", stderr=True)
    show_lines("a line")
    show_json({"key": "x" * 100_000})
    with TrainProgress(3) as progress:
        progress.update(1, loss=1.0)
        progress.note("a note")
    print("a library", file=sys.stderr, flush=True)
    print("a library", flush=True)
    sys.stdout.buffer.write(b"bytes")
    logging.getLogger("test").warning("a warning")


@breaks
def test_case_232_every_way_to_write_goes_on(make):
    with broken_streams(make), SafeStreams() as streams:
        write_all_ways()
        assert isinstance(streams.stdout_failure(), OSError)


def test_case_232_a_stream_that_breaks_on_the_way():
    reads, writes = os.pipe()
    stdout = os.fdopen(writes, "w")
    with contextlib.redirect_stdout(stdout), SafeStreams() as streams:
        print("first", flush=True)
        assert streams.stdout_failure() is None
        assert os.read(reads, 100) == b"first\n"
        os.close(reads)
        for _ in range(3):
            print("second", flush=True)
        assert isinstance(streams.stdout_failure(), BrokenPipeError)
    stdout.close()


def test_case_232_whole_output_reaches_a_slow_pipe(tmp_path):
    """A pipe that does not block takes a part at a time."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    with (tmp_path / "read").open("wb") as file:
        reader = subprocess.Popen(["cat"], stdin=reads, stdout=file)
    os.close(reads)
    stdout = os.fdopen(writes, "w")
    with contextlib.redirect_stdout(stdout), SafeStreams() as streams:
        print("x" * 500_000)
        assert streams.stdout_failure() is None
    stdout.close()
    assert reader.wait(60) == 0
    assert (tmp_path / "read").read_bytes() == b"x" * 500_000 + b"\n"


def test_case_232_streams_of_a_test_stay():
    ours = io.StringIO()
    with contextlib.redirect_stdout(ours), SafeStreams() as streams:
        print("text")
        assert streams.stdout_failure() is None
    assert ours.getvalue() == "text\n"


@pytest.mark.parametrize(("words", "code"), [(SHOW, 0), ((*SHOW, "--json"), 3)])
@breaks
def test_case_232_exit_code(make, words, code):
    """Text that nobody reads is no failure; a document that is lost is."""
    with pytest.raises(SystemExit) as end, broken_streams(make):
        main(words)
    assert (end.value.code or 0) == code


@breaks
def test_case_232_error_keeps_its_exit_code(make):
    with pytest.raises(SystemExit) as end, broken_streams(make):
        main(["config", "show", "--model", "qwen3", "--lora-r", "-3", "--json"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("redirect", "code", "err"),
    [
        ("2>&1 >/dev/full | cat", 3, "error: stdout cannot be written: No space left on device\n"),
        ("2>&1 >&- | cat", 3, "error: stdout cannot be written: Bad file descriptor\n"),
        ("2>&- | cat >/dev/null", 0, ""),
    ],
)
def test_case_232_whole_process(redirect, code, err):
    """The interpreter's last flush is a part of it, and streams closed before the start."""
    command = f'"{sys.executable}" -m liger_cli {" ".join(SHOW)} --json {redirect}'
    done = subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, err, "")


def test_case_232_run_goes_on(train, run_dir):
    words = ("--max-steps", 4, "--logging-steps", 1, "--save-steps", 2, "--eval-fraction", 0.2)
    with broken_streams(closed_pipe):
        assert train(*words).code == 0
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 4
    assert {path.name for path in run_dir.iterdir()} >= {"checkpoint-2", "checkpoint-4"}
    assert json.loads((run_dir / "report.json").read_text())["train"]["steps"] == 4
