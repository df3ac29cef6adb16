"""case_93: kill -9 at any moment, two processes, Ctrl-C in a terminal: the unbroken run again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from forked_runs import start, words_of
from run_files import assert_same, metrics, names, stopped_copy

from liger_cli.training.checkpoints.files import find_checkpoints, step_of


def kill_until_done(words, run_dir, draw, num_kills):
    """Starts a run and kills it, so many times, and lets it end; every other time in a save."""
    num_killed = 0
    while num_killed < num_kills:
        is_saving = num_killed % 2
        process = start(*words, dies_at=draw.randrange(40) if is_saving else None)
        if not is_saving:
            process.join(draw.uniform(0.2, 2.5))
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        num_killed += process.exitcode != 0
        if process.exitcode == 0:
            # It came to its end first, so it is taken back to a step it had come through.
            step = draw.randrange(8)
            for path in find_checkpoints(run_dir):
                if step_of(path) > step:
                    shutil.rmtree(path)
    process = start(*words)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "num_kills",
    # Every other kill is in a save. 20 kills are 20 starts of a run.
    [2, pytest.param(20, marks=pytest.mark.slow)],
)
def test_case_93_killed_at_random_moments(data, tmp_path, num_kills):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    evals = ("--eval-fraction", 0.2, "--eval-steps", 3)
    process = start(*words_of(data, whole, *evals))
    process.join()
    assert process.exitcode == 0
    words = words_of(data, killed, *evals, "--resume", "auto")
    kill_until_done(words, killed, random.Random(93), num_kills)
    assert_same(whole, killed)
    ours, theirs = (json.loads((path / "report.json").read_text()) for path in (killed, whole))
    for key in ("steps", "tokens", "trained_tokens", "first_loss", "final_loss"):
        assert ours["train"][key] == theirs["train"][key]
    assert ours["eval"] == theirs["eval"]
    assert not list(killed.glob(".*"))


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_case_93_two_processes(data, tmp_path, port):
    """Dropout differs by process, so each must find its own random numbers again."""
    words = ("--adapter", "lora", "--lora-dropout", 0.3, "--save-steps", 5)

    def launch(run_dir, *more):
        ranks = [
            start(*words_of(data, run_dir, *words, *more), rank=rank, num_processes=2, port=port)
            for rank in (0, 1)
        ]
        for process in ranks:
            process.join()
        return [process.exitcode for process in ranks]

    whole = tmp_path / "whole"
    assert launch(whole) == [0, 0]
    again = stopped_copy(whole, tmp_path / "again", 5)
    assert launch(again, "--resume", "auto") == [0, 0]
    assert_same(whole, again)
    # One process would feed other rows in a step.
    alone = stopped_copy(whole, tmp_path / "alone", 5)
    process = start(*words_of(data, alone, *words, "--resume", "auto"))
    process.join()
    assert process.exitcode == 2


def test_ctrl_c_of_a_launcher_stops_all_after_the_same_step(data, tmp_path):
    run_dir = tmp_path / "run"
    words = words_of(data, run_dir, "--max-steps", 100000, "--save-steps", 0)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "-m", "liger_cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    [(last,)] = metrics(run_dir, "step")[-1:]
    assert names(run_dir) == [f"checkpoint-{last}"]
    assert f"interrupted after step {last}; its checkpoint is " in err
    assert len(list((run_dir / f"checkpoint-{last}").glob("rng-*.pt"))) == 2
