"""Runs of `liger train` on several ranks, in forked processes, each with shards of the model."""

from __future__ import annotations

import os
import signal
import socket
import time

import forked_runs


def run_rank(words, fault=None, error_file=None, **options):
    """`liger WORDS` as one of several ranks.

    fault: "kill" or "full", and the number of the save in whose write it happens.
    error_file: Where the rank writes the error that ends it, as torchrun asks it to.
    """
    if fault is not None:
        fail_in_write(*fault)
    if error_file is not None:
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(error_file)
    forked_runs.run(words, **options)


def fail_in_write(kind, number):
    """Let this process be killed, or find the disk full, when it has written its shards."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, times = FileSystemWriter.write_data, iter(range(number))

    def fail(self, *args):
        done = write(self, *args)
        if next(times, None) is None:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return done

    FileSystemWriter.write_data = fail


def launch(num_processes, *words, faulty=None, logs=None):
    """Run `liger WORDS` on so many ranks and return their exit codes; None of one that hangs.

    faulty: A rank and its fault.
    logs: A directory for the error of each rank.
    """
    if num_processes == 1:
        process = forked_runs.start(*words)
        process.join()
        return [process.exitcode]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (*words, "--dp-shard-size", -1)
    ranks = []
    for rank in range(num_processes):
        options = {"rank": rank, "num_processes": num_processes, "port": port}
        if faulty is not None and faulty[0] == rank:
            options["fault"] = faulty[1:]
        if logs is not None:
            options["error_file"] = logs / f"rank-{rank}.json"
        ranks.append(forked_runs._FORKS.Process(target=run_rank, args=(words,), kwargs=options))
    for process in ranks:
        process.start()
    # A run takes some seconds, on a busy machine a minute.
    deadline = time.monotonic() + 180
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes
