"""Ranks that stay: each trains a list of runs in one process group, rank 0 keeps the results."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from liger_cli.commands.train import run as train_run
from liger_cli.commands.train.prepare import RunOptions
from liger_cli.config import RunConfig
from liger_cli.errors import LigerError
from liger_cli.training.session import TrainSession

# Forked from a process that has imported everything and computed nothing: a rank starts at once.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["liger_cli.training.parallel.loading", "liger_cli.commands.train.run", "peft", __name__]
)


def train_cases(num_ranks: int, cases: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    """Train runs one after the other on several ranks.

    Args:
        cases: By name, the keys of a run; it writes no checkpoint.
        out: A file for the results.

    Returns:
        By name, `steps` (loss and gradient norm of each) and `weights` after the last step, whole;
        or `error`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _FORKS.Process(target=_rank, args=(rank, num_ranks, port, cases, out))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * num_ranks
    return dict(torch.load(out, weights_only=True))


def _rank(rank: int, num_ranks: int, port: int, cases: dict[str, Any], out: Path) -> None:
    if not os.environ.get("SHOW_RANKS"):
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as it lives)
    torch.set_num_threads(1)
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    values |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if num_ranks > 1:
        os.environ.update({name: str(value) for name, value in values.items()})
    # A run ends with its process group; here the next run needs it.
    destroy, PartialState.destroy_process_group = PartialState.destroy_process_group, _ignore
    found = {}
    for name, keys in cases.items():
        try:
            found[name] = _trained(RunConfig(use_cpu=True, torch_compile=False, **keys))
        except LigerError as error:
            found[name] = {"error": f"{error.message}\n{error.hint or ''}"}
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        AcceleratorState._reset_state()
        GradientState._reset_state()
    if rank == 0:
        torch.save(found, out)
    if torch.distributed.is_initialized():
        destroy(PartialState())


def _ignore(state: Any, group: Any = None) -> None:
    pass


def _trained(config: RunConfig) -> dict[str, Any]:
    finish, kept = TrainSession.finish, {}

    def kept_finish(session: TrainSession) -> Any:
        result = finish(session)
        kept["steps"] = [(step.loss, step.grad_norm) for step in result.history]
        kept["weights"] = whole_weights(session._model)
        return result

    TrainSession.finish = kept_finish
    try:
        train_run.run_train(config, RunOptions(measure_only=True))
    finally:
        TrainSession.finish = finish
    return kept


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the trained parameters, gathered; every rank calls it."""
    return {
        name.removeprefix("module."): _whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _whole(x: torch.Tensor) -> torch.Tensor:
    gathered: torch.Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered
