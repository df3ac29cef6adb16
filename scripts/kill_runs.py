"""Kill a run at random moments, and start pairs of runs on one directory: nothing may be lost.

    python scripts/kill_runs.py > docs/results/kill-runs.log

A small model is trained to its end once. A second run is killed by SIGKILL again and again, every
third time inside a save, and resumed; then pairs of runs begin together on one directory. Each must
end with the weights and the steps of the first, to the bit. Exit code 1 if one does not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from liger_cli.app import main as liger
from liger_cli.training.checkpoints import files as checkpoint_files
from liger_cli.training.checkpoints.files import find_checkpoints, find_damage, step_of

# Forked from a process that has imported everything and computed nothing: a run starts at once.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["liger_cli.commands.train.run", __name__])
STEPS = 8
EXACT = ("step", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens")


def run(words: Sequence[str], dies_at: int | None, barrier: Any) -> None:
    """Run `liger WORDS`, which kills itself before this one of the waits for the disk in saves."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    if dies_at is not None:
        sync, times = checkpoint_files._sync, iter(range(dies_at))

        def die_or_sync(path: Path) -> None:
            if next(times, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        checkpoint_files._sync = die_or_sync
    if barrier is not None:
        barrier.wait()
    liger(list(words))


def start(words: Sequence[str], dies_at: int | None = None, barrier: Any = None) -> Any:
    process = FORKS.Process(target=run, args=(words, dies_at, barrier))
    process.start()
    return process


def words_of(folder: Path, run_dir: Path, *more: str) -> list[str]:
    words = ["train", "-m", "qwen3", "-d", str(folder / "data.jsonl"), "-o", str(run_dir)]
    words += ["--use-cpu", "--max-length", "64", "--per-device-train-batch-size", "2"]
    words += ["--max-steps", str(STEPS), "--save-steps", "2", "--learning-rate", "1e-3"]
    return [*words, "--eval-fraction", "0.2", "--eval-steps", "3", *more]


def content(run_dir: Path) -> tuple[list[tuple[Any, ...]], str, dict[str, torch.Tensor]]:
    """Return the steps, evaluations and last weights of a run, which two runs must share."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [tuple(json.loads(line)[key] for key in EXACT) for line in lines]
    last = run_dir / f"checkpoint-{STEPS}"
    return steps, (run_dir / "eval.jsonl").read_text(), load_file(last / "model.safetensors")


def check_whole(run_dir: Path, wanted: Any) -> None:
    """Check a finished run against the first: nothing is missing and nothing is left over."""
    found = content(run_dir)
    assert found[:2] == wanted[:2], "steps or evaluations differ"
    assert all(torch.equal(found[2][name], tensor) for name, tensor in wanted[2].items())
    names = {path.name for path in run_dir.iterdir()}
    saved = {f"checkpoint-{step}" for step in range(2, STEPS + 1, 2)}
    extra = {"best", "config.yaml", "eval.jsonl", "metrics.jsonl", "report.json"}
    assert names == saved | extra, f"files: {sorted(names)}"


def check_killed(run_dir: Path, least: int) -> int:
    """Check what a killed run left, and return the step of its newest checkpoint."""
    checkpoints = find_checkpoints(run_dir)
    for path in checkpoints:
        assert (damage := find_damage(path)) is None, f"{path.name}: {damage}"
    newest = step_of(checkpoints[-1]) if checkpoints else 0
    assert newest >= least, f"checkpoint-{least} is lost"
    if newest:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        assert len(lines) >= newest, "the checkpoint is ahead of the log"
    return newest


def kill(folder: Path, num_kills: int, draw: random.Random, whole_s: float, wanted: Any) -> None:
    run_dir, words = folder / "killed", words_of(folder, folder / "killed", "--resume", "auto")
    number = newest = 0
    while number < num_kills:
        dies_at = draw.randrange(30) if number % 3 == 2 else None
        process = start(words, dies_at)
        if dies_at is None:
            process.join(draw.uniform(0.1, 1.0) * whole_s)
            process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), f"exit code {process.exitcode}"
        newest = check_killed(run_dir, newest)
        if process.exitcode:
            number += 1
            where = "at a random moment" if dies_at is None else f"in a save, at wait {dies_at}"
            print(f"kill {number}: {where}; the newest checkpoint is {newest}", flush=True)
        if newest == STEPS:
            # At its end: taken back to where it had come through.
            newest = 2 * draw.randrange(3)
            for path in find_checkpoints(run_dir):
                if step_of(path) > newest:
                    shutil.rmtree(path)
    process = start(words)
    process.join()
    assert process.exitcode == 0, f"exit code {process.exitcode}"
    check_whole(run_dir, wanted)


def pairs(folder: Path, num_pairs: int, draw: random.Random, wanted: Any) -> None:
    for number in range(1, num_pairs + 1):
        run_dir = folder / f"pair-{number}"
        resumes = number % 2 == 0
        if resumes:
            # A run that was killed, with its lock.
            process = start(words_of(folder, run_dir), dies_at=draw.randrange(10, 30))
            process.join()
            assert (run_dir / "run.lock").exists()
        words = words_of(folder, run_dir, *(("--resume", "auto") if resumes else ()))
        barrier = FORKS.Barrier(2)
        both = [start(words, barrier=barrier) for _ in range(2)]
        for process in both:
            process.join()
        codes = sorted(process.exitcode for process in both)
        print(f"pair {number}: {'a killed run' if resumes else 'a new run'}, exit codes {codes}")
        sys.stdout.flush()
        assert codes == [0, 2]
        check_whole(run_dir, wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=231)
    options = parser.parse_args()
    draw, began = random.Random(options.seed), time.monotonic()
    packages = ("torch", "transformers", "accelerate", "safetensors")
    print(f"python {' '.join(sys.argv)}")
    print(datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"))
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(", ".join(f"{name} {version(name)}" for name in packages), flush=True)
    with tempfile.TemporaryDirectory(prefix="liger-kill-") as name:
        folder = Path(name)
        rows = [
            {"prompt": f"say {i} ", "completion": "word " * (1 + 3 * (i % 5) + i % 2)}
            for i in range(23)
        ]
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        # Twice: the first waits for the imports of the process that all are forked from.
        for run_dir in (folder / "warm", folder / "whole"):
            since = time.monotonic()
            process = start(words_of(folder, run_dir))
            process.join()
            assert process.exitcode == 0, f"exit code {process.exitcode}"
        wanted = content(folder / "whole")
        kill(folder, options.kills, draw, time.monotonic() - since, wanted)
        print(f"{options.kills} kills: the same weights, steps and evaluations, no file lost")
        pairs(folder, options.pairs, draw, wanted)
        print(f"{options.pairs} pairs: one ran to its end, the other was refused, no file lost")
    print(f"ok, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
