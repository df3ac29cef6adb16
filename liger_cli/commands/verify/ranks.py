"""`liger verify --nproc N`: the model on several ranks against the same model on one of them."""

from __future__ import annotations

import contextlib
import math
import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from liger_cli.commands.verify.losses import random_batch
from liger_cli.commands.verify.model import turn_off_dropout
from liger_cli.config import RunConfig
from liger_cli.data.batches import count_labels
from liger_cli.errors import ConfigError, RequirementFailed
from liger_cli.report import notify
from liger_cli.report.verify_ranks import RanksReport, RankTensor, ranks_verdict
from liger_cli.training.forward import LossOf
from liger_cli.training.launch.agreement import check_same_launch
from liger_cli.training.model.adapters import adapts
from liger_cli.training.model.loading import load_patched
from liger_cli.training.model.source import ModelSource, resolve_model
from liger_cli.training.parallel.assumed import assumed_plan
from liger_cli.training.parallel.engine import Engine, make_engine
from liger_cli.training.parallel.mesh import ParallelPlan
from liger_cli.training.runtime.launch import make_accelerator, quiet_libraries
from liger_cli.training.runtime.launch_variables import config_of_launch
from liger_kernels.transformers.wrappers import inner_model

__all__ = ["require_equal", "verify_ranks"]

# A fresh adapter has a gradient in one of its two matrices; after a step it has one in both.
_STEPS, _MICRO_STEPS, _RATE = 2, 2, 1e-3
# In float32 what sums in another order differ by. A gradient in half precision is rounded on each
# rank before it is summed, and there where micro-batches are.
_ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}
# Through many layers rounding grows: as much as one process differs from itself when it sums in
# another order, but never as much as a gradient that lacks the part of a rank.
_TIMES, _MOST = 4.0, 1e-2
# Of the norm of all gradients: what a gradient that is zero but for rounding is compared with.
_FLOOR = 1e-3

_Outcome = tuple[list[float], dict[str, Tensor]]


def verify_ranks(config: RunConfig) -> RanksReport | None:
    """Return the errors of the ranks' losses and gradients; None on all ranks but the main one.

    Args:
        config: Model, ops, adapter, dtype and the sizes of the layout; without sizes all ranks
            share the model.

    Raises:
        LigerError: The layout is refused, or the model cannot be loaded.
    """
    began = time.monotonic()
    config = config_of_launch(config, notify)
    quiet_libraries()
    source = resolve_model(config.model)
    if source.is_classifier:
        raise ConfigError(
            "several ranks are compared by losses of next tokens, which a model of sequence "
            "classification has not",
            hint="liger verify without --nproc compares it with the stock model.",
        )
    accelerator = make_accelerator(config, adapts=adapts(config, source))
    check_same_launch(config, accelerator)
    count, is_main = accelerator.num_processes, accelerator.is_main_process
    plan = assumed_plan(config, source, count) or ParallelPlan(dp_shard=count)
    say = notify if is_main else lambda line: None
    say(f"the model on one process, then by {plan.name} ...")
    alone = [_alone(config, source, accelerator, order) for order in (1, -1) if is_main]
    accelerator.wait_for_everyone()
    engine = make_engine(accelerator, plan)
    model, record = engine.load(config, source, lambda line: None)
    together = _together(model, engine, accelerator, config.seed)
    report = None
    if alone:
        dtype = inner_model(model).dtype
        report = RanksReport(
            model=source.name,
            layout=plan.name,
            device=accelerator.device.type,
            dtype=str(dtype).removeprefix("torch."),
            coverage=record.coverage,
            seconds=time.monotonic() - began,
            **_compared(alone, together, _ALLOWED.get(dtype, _ALLOWED[torch.float32])),
        )
    accelerator.end_training()
    return report


def require_equal(report: RanksReport) -> None:
    """End the command where ranks differ from one process; the report has been shown.

    Raises:
        RequirementFailed: A loss or a gradient does.
    """
    if not report.ok:
        raise RequirementFailed(
            ranks_verdict(report),
            hint="liger verify without --nproc says whether the model is right on one device.",
            is_reported=True,
        )


class _OneProcess:
    """The steps of an engine where there is one process."""

    def micro_step(self, model: Any, *, is_last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, part: Tensor) -> None:
        part.backward()


def _alone(config: RunConfig, source: ModelSource, accelerator: Any, order: int) -> _Outcome:
    """Return the outcome of all ranks' batches on the whole model in this process.

    Args:
        order: -1 takes the batches of a step from the last to the first.
    """
    model, _ = load_patched(config, source, accelerator.device, lambda line: None)
    turn_off_dropout(model)
    optimizer = torch.optim.SGD(_trained(model).values(), lr=_RATE)
    steps = [rows[::order] for rows in _steps(model, accelerator, config.seed)]
    losses = _train(model, optimizer, _OneProcess(), accelerator, steps)
    return losses, {name: p.grad.cpu() for name, p in _trained(model).items() if p.grad is not None}


def _together(model: Any, engine: Engine, accelerator: Any, seed: int) -> _Outcome:
    """Return the outcome of all ranks' batches on all ranks, each with its own."""
    turn_off_dropout(model)
    steps = _steps(model, accelerator, seed)
    parameters, is_main = _trained(model), accelerator.is_main_process
    optimizer = torch.optim.SGD(parameters.values(), lr=_RATE)
    prepared, optimizer = engine.prepare(model, optimizer)
    losses = _train(prepared, optimizer, engine, accelerator, steps)
    sums = torch.tensor(losses, device=engine.device)
    found = {}
    for name, parameter in parameters.items():
        if (grad := parameter.grad) is not None:
            # Every rank takes part.
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = whole.cpu() if is_main else whole.new_empty(0)
    return accelerator.reduce(sums, "sum").tolist(), found


def _train(
    model: Any,
    optimizer: Any,
    engine: _OneProcess | Engine,
    accelerator: Any,
    steps: list[list[dict[str, Tensor]]],
) -> list[float]:
    """Train steps and return this process's part of their losses; the last gradients stay."""
    is_alone = isinstance(engine, _OneProcess)
    rank, count = (0, 1) if is_alone else (accelerator.process_index, accelerator.num_processes)
    loss_of = LossOf(accelerator.unwrap_model(model), accelerator.device)
    losses = []
    model.train()
    for number, rows in enumerate(steps):
        num_labels, own, loss = sum(map(count_labels, rows)), rows[rank::count], 0.0
        for place, batch in enumerate(own, start=1):
            with engine.micro_step(model, is_last=place == len(own)):
                with accelerator.autocast():
                    part = loss_of(model, batch, num_labels)
                engine.backward(part)
            loss += part.item()
        losses.append(loss)
        if number < len(steps) - 1:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _steps(model: Any, accelerator: Any, seed: int) -> list[list[dict[str, Tensor]]]:
    """Return the batches of each step, the same on all ranks."""
    count = _MICRO_STEPS * accelerator.num_processes
    base = inner_model(model)
    return [
        [
            random_batch(base, accelerator.device, seed + step * count + number)
            for number in range(count)
        ]
        for step in range(_STEPS)
    ]


def _trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _compared(alone: list[_Outcome], together: _Outcome, least: float) -> dict[str, Any]:
    """Return the losses, and the error of each loss and gradient, with what is allowed.

    Args:
        alone: Of one process, with the batches in order, and in the other order: what sums in
            another order differ by in this model.
        least: What is allowed of a model of few layers.
    """
    spread = max(_errors(*alone).values())
    allowed = max(least, min(_TIMES * spread, _MOST))
    errors = _errors(alone[0], together)
    parts = [
        # NaN is no number that is at most another.
        RankTensor(name=name, error=error, allowed=allowed, ok=bool(error <= allowed))
        for name, error in errors.items()
    ]
    return {
        "losses": alone[0][0],
        "losses_of_ranks": together[0],
        "tensors": parts,
        "ok": all(part.ok for part in parts),
    }


def _errors(true: _Outcome, found: _Outcome) -> dict[str, float]:
    """Return the relative error of each loss and gradient; infinity of one that only one has."""
    errors = {
        f"loss of step {number}": abs(theirs - loss) / abs(loss)
        for number, (loss, theirs) in enumerate(zip(true[0], found[0], strict=True), start=1)
    }
    floor = _FLOOR * math.hypot(*(float(g.double().norm()) for g in true[1].values()))
    for name in sorted(true[1].keys() | found[1].keys()):
        errors[f"gradient of {name}"] = math.inf
        if name in true[1] and name in found[1]:
            gradient = true[1][name].double()
            distance = float((found[1][name].double() - gradient).norm())
            errors[f"gradient of {name}"] = distance / max(float(gradient.norm()), floor)
    return errors
