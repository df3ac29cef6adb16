"""Ranks that stay: each trains a list of runs in one process group, rank 0 keeps the results."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from liger_cli.commands.train import run as train_run
from liger_cli.commands.train.prepare import RunOptions
from liger_cli.config import RunConfig
from liger_cli.errors import LigerError
from liger_cli.training.evaluate import evaluate_inputs
from liger_cli.training.parallel.weights import WeightFiles
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
        By name, `steps` (loss and gradient norm of each), `weights` after the last step, whole,
        `evals` (its loss and accuracy by batch size), and of a sharded run how often the head was
        gathered in training and the bytes of weights that this rank read; or `error`.
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
    kept: dict[str, Any] = {"head_gathers": 0, "bytes_read": 0}
    finish, close = TrainSession.finish, WeightFiles.__exit__

    def kept_finish(session: TrainSession) -> Any:
        result = finish(session)
        kept["steps"] = [(step.loss, step.grad_norm) for step in result.history]
        gathers = kept["head_gathers"]
        kept["weights"] = whole_weights(session._model)
        if session._run.inputs.eval:
            kept["evals"] = {size: _evaluated(session, size) for size in (1, 8)}
        kept["head_gathers"] = gathers
        return result

    def kept_close(files: WeightFiles, *error: Any) -> None:
        kept["bytes_read"] += files.num_bytes
        close(files, *error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSession, "finish", kept_finish)
        patch.setattr(WeightFiles, "__exit__", kept_close)
        patch.setattr(_fsdp_param_group, "foreach_all_gather", _counting(kept))
        train_run.run_train(config, RunOptions(measure_only=True))
    return kept


def _evaluated(session: TrainSession, size: int) -> tuple[float, float | None, int]:
    run = session._run
    config = run.config.model_copy(update={"per_device_eval_batch_size": size})
    with run.engine.evaluation(session._model) as model:
        result = evaluate_inputs(config, session._objective, model, run.inputs, run.accelerator)
    return result.loss, result.token_accuracy, result.tokens


def _counting(kept: dict[str, Any]) -> Any:
    """Return torch's function that gathers a group, which counts those of a head."""
    original = _fsdp_param_group.foreach_all_gather

    def counted(params: Any, *args: Any) -> Any:
        kept["head_gathers"] += any(map(_is_of_head, params))
        return original(params, *args)

    return counted


def _is_of_head(param: Any) -> bool:
    """Return whether a parameter is of a layer with as many outputs as there are words."""
    info = param._module_info
    layers = [m for m in (info.module, *info.shared_modules) if isinstance(m, torch.nn.Linear)]
    return any(layer.out_features > 260 for layer in layers)


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
