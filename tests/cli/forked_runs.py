"""Runs of the program in forked processes, which may kill themselves in a save."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys

from liger_cli.app import main
from liger_cli.training.checkpoints import files
from liger_cli.training.memory import limits

# Forked from a process that has imported everything and computed nothing: a run starts at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["liger_cli.commands.train.run", "peft", __name__])

STEPS = ("--max-steps", 12, "--save-steps", 2, "--learning-rate", 1e-3)
STEPS += ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2)


def run(words, rank=None, num_processes=1, port=0, dies_at=None):
    """`liger WORDS` in a separate process, as one of several if it has a rank.

    Its report has no estimate of memory, which takes longer than the steps.

    dies_at: It kills itself before this one of the times that a save waits for the disk.
    """
    limits.estimate_memory = no_estimate
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as it lives)
    if rank is not None:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes}
        values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    if dies_at is not None:
        sync, times = files._sync, iter(range(dies_at))

        def die_or_sync(path):
            if next(times, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)

        files._sync = die_or_sync
    main([str(word) for word in words])


def no_estimate(*args, **keys):
    """Say what the estimate says of a model whose step cannot be followed without data."""
    raise ValueError("no estimate")


def start(*words, **options):
    process = _FORKS.Process(target=run, args=(words,), kwargs=options)
    process.start()
    return process


def words_of(data, run_dir, *more):
    words = ("train", "-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu", "--max-length", 64)
    return (*words, *STEPS, *more)
