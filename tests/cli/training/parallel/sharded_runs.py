"""Runs of `liger train` on several ranks, in forked processes, with a model sharded by hand."""

from __future__ import annotations

import contextlib
import os
import signal
import socket

import forked_runs
import torch


def shard(model, mesh=None):
    """Shard a model in place: layer by layer, and the rest in one group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)


def run_sharded(words, fault=None, **options):
    """`liger WORDS` as one of several ranks, whose model is sharded when it was loaded.

    fault: "kill" or "full", and the number of the save in whose write it happens.
    """
    from accelerate import Accelerator

    from liger_cli.commands.train import run

    load = run.load_patched

    def load_sharded(*args, **more):
        model, record = load(*args, **more)
        shard(model)
        return model, record

    def clip(self, parameters, max_norm):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm).full_tensor()

    run.load_patched = load_sharded
    Accelerator.prepare = lambda self, *parts: parts
    Accelerator.no_sync = lambda self, model: contextlib.nullcontext()
    Accelerator.clip_grad_norm_ = clip
    if fault is not None:
        fail_in_write(*fault)
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
    logs: A directory for what each rank prints.
    """
    if num_processes == 1:
        process = forked_runs.start(*words)
        process.join()
        return [process.exitcode]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_processes):
        options = {"rank": rank, "num_processes": num_processes, "port": port}
        if faulty is not None and faulty[0] == rank:
            options["fault"] = faulty[1:]
        if logs is not None:
            options["log"] = logs / f"rank-{rank}.txt"
        ranks.append(forked_runs._FORKS.Process(target=run_sharded, args=(words,), kwargs=options))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    return codes
