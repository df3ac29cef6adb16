"""`liger verify`: the ops on this device, then the user's own model, patched against stock."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from liger_cli.commands.verify.errors import GRADIENT, errors_of, judge, norm
from liger_cli.commands.verify.losses import Loss, make_loss
from liger_cli.commands.verify.modules import compare_modules
from liger_cli.commands.verify.precision import in_precision
from liger_cli.common.environment import devices, environment, host_memory
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, OutOfMemory, RequirementFailed
from liger_cli.report.inspection import describe_model
from liger_cli.report.verify import ModulePart, OpPart, TensorPart, VerifyReport, WorstPart, verdict
from liger_cli.training.model.adapters import attach_adapter, is_adapted, new_adapter
from liger_cli.training.model.source import ModelSource, load_model
from liger_kernels.compare import check_op
from liger_kernels.ops.backend import backend
from liger_kernels.ops.registry import OPS
from liger_kernels.transformers.api import apply_liger_kernel, inspect_model
from liger_kernels.transformers.patching.engine import PatchRecord
from liger_kernels.transformers.patching.plan import LOSSES, PatchPlan, build_plan, resolve_ops

__all__ = ["require_right", "turn_off_dropout", "verify"]

# Through thirty layers the same rounding grows more here and less there: on SmolLM2-135M correct
# kernels are up to six times further from fp64 than eager in one gradient and closer in the next.
# What a module does alone is held to twice.
_TIMES = 8.0
_TRUTHS = {"fp64": torch.float64, "fp32": torch.float32}


@dataclass(frozen=True)
class _Truth:
    """The outcome that errors are measured against, on the host.

    Attributes:
        name: fp64, fp32 or eager.
        eager: How far the stock model is from it; None where the truth is the stock model itself.
        dtype, device: Of the model that is verified.
    """

    name: str
    values: Mapping[str, torch.Tensor]
    eager: Mapping[str, float] | None
    dtype: torch.dtype
    device: torch.device

    def judge(self, values: Mapping[str, torch.Tensor]) -> list[TensorPart]:
        """Judge the error of each tensor of an outcome."""
        errors = errors_of(values, self.values, norm)
        return judge(errors, self.eager, _TIMES, self.dtype, self.device)


def verify(
    source: ModelSource,
    *,
    ops: str,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device,
    notify: Callable[[str], None],
) -> VerifyReport:
    """Verify the ops and a model, patched against stock; a wrong result is a value, not an error.

    Args:
        ops: As `--ops` takes them. An op that auto would leave out on this device fails.
        config: The keys of a new adapter, where `adapter` is not none, and of the objective; its
            seed is that of random weights and of the batch.
        notify: Called with a line before each part.

    Raises:
        LigerError: The model cannot be loaded, or does not fit on a CPU.
    """
    began = time.monotonic()
    seed = config.seed
    model = _add_adapter(_load(source, dtype, device, seed, notify), source, config, seed)
    plan = inspect_model(model, ops)
    used = _used_ops(plan)
    op_parts = _check_ops(model, ops, used, device)
    loss = make_loss(config, model, device, dtype, notify)
    notify("the stock model ...")
    with _as_trained(model, dtype):
        truth = _truth(model, loss, dtype, notify)
        losses = _losses_alone(model, plan, loss, truth, notify)
        notify("the patched model ...")
        record = apply_liger_kernel(model, ops)
        if loss.teacher is not None:
            apply_liger_kernel(loss.teacher, ops)
        whole, modules = _judge_patched(model, record, loss, truth, seed)
    modules += losses
    return VerifyReport(
        model=describe_model(source, model, plan),
        environment=environment(),
        device=devices()[0]["name"] if device.type != "cpu" else "cpu",
        backend=backend(device),
        dtype=str(dtype).removeprefix("torch."),
        truth=truth.name,
        objective=config.objective,
        tokens=loss.num_tokens,
        seconds=time.monotonic() - began,
        coverage=record.coverage,
        ops=op_parts,
        modules=modules,
        loss=whole["loss"],
        logits=whole["logits"],
        gradients=[part for name, part in whole.items() if name.startswith(GRADIENT)],
        worst=_worst(modules, whole.values()),
        ok=_is_right(op_parts, used, whole.values(), modules),
    )


def _load(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    notify: Callable[[str], None],
) -> Any:
    """Load the model for training, without dropout.

    Raises:
        OutOfMemory: A CPU has too little memory for its weights and gradients.
    """
    model: Any = load_model(source, dtype=dtype, device=device, seed=seed, notify=notify)
    if source.adapter is not None:
        # It comes frozen, for use; training is what is compared.
        model.set_adapter(model.active_adapter)
    _check_host_memory(model, device)
    turn_off_dropout(model)
    return model


def _add_adapter(model: Any, source: ModelSource, config: RunConfig, seed: int) -> Any:
    """Return the model with a new adapter, whose matrices are random: a fresh one has zeros.

    Raises:
        ConfigError: The model is an adapter already, or cannot have this one.
        EnvironmentProblem: peft is missing.
    """
    settings = new_adapter(config, model)
    if settings is None:
        return model
    if source.adapter is not None:
        raise ConfigError(
            f"{source.name} is an adapter already, and --adapter {config.adapter} asks for another",
            hint="leave --adapter out, or give the base model",
        )
    settings.init_lora_weights = False
    device = next(model.parameters()).device
    adapted = attach_adapter(model, settings, base="", seed=seed).to(device)
    turn_off_dropout(adapted)
    return adapted


def _as_trained(model: Any, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return the context that a run computes the model in: autocast around a half-precision base
    with an adapter."""
    if not is_adapted(model) or dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)


def _used_ops(plan: PatchPlan) -> list[str]:
    names = {op for op in plan.coverage if op in plan.ops}
    return [op.name for op in OPS.values() if names & set(op.patch_names)]


def _judge_patched(
    model: Any, record: PatchRecord, loss: Loss, truth: _Truth, seed: int
) -> tuple[dict[str, TensorPart], list[ModulePart]]:
    """Judge the outcome of the patched model by tensor, and each patched module alone."""
    whole = {part.name: part for part in truth.judge(_outcome(model, loss))}
    model.train()
    run = functools.partial(model, input_ids=loss.input_ids, use_cache=False)
    return whole, compare_modules(model, record, run, seed)


def _is_right(
    ops: Iterable[OpPart],
    used: Sequence[str],
    whole: Iterable[TensorPart],
    modules: Iterable[ModulePart],
) -> bool:
    return (
        all(part.ok for part in ops if part.op in used)
        and all(part.ok for part in whole)
        and all(part.tensor is None or part.tensor.ok for part in modules)
    )


def _losses_alone(
    model: Any,
    plan: PatchPlan,
    loss: Loss,
    truth: _Truth,
    notify: Callable[[str], None],
) -> list[ModulePart]:
    """Patch the loss of each plan alone, and judge the whole model with it."""
    parts: list[ModulePart] = []
    for patch in (patch for patch in plan.patches if patch.op in LOSSES):
        notify(f"{patch.op} alone ...")
        record = apply_liger_kernel(model, patch.op)
        tensor = max(truth.judge(_outcome(model, loss)), key=lambda part: part.share)
        record.undo()
        parts.append(
            ModulePart(name=patch.name, module_class=patch.module_class, op=patch.op, tensor=tensor)
        )
    return parts


def require_right(report: VerifyReport) -> None:
    """End the command where something is wrong; the report has been shown.

    Raises:
        RequirementFailed: An op, a module or the model is.
    """
    if report.ok:
        return
    lines = [f"{part.op} is wrong here: {part.reason}" for part in report.ops if not part.ok]
    raise RequirementFailed(
        "\n".join([*lines, verdict(report)]),
        hint="train without it: --ops auto leaves out an op that fails; --ops auto,-OP any other.",
        is_reported=True,
    )


def _check_host_memory(model: Any, device: torch.device) -> None:
    needed = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    if device.type == "cpu" and needed > host_memory():
        raise OutOfMemory(
            f"weights and gradients to compare need {needed / 1e9:.0f} GB; this machine has "
            f"{host_memory() / 1e9:.0f} GB",
            hint="Take a smaller model, or --dtype bfloat16 for half of it.",
        )


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Turn off dropout, so that two runs are the same; the model is not trained afterwards."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "p"):
                setattr(module, name, 0.0)


def _check_ops(model: Any, ops: str, used: Sequence[str], device: torch.device) -> list[OpPart]:
    """Check every op as `liger doctor` does, and those of the model in its forms too."""
    # Whatever was asked for is tried as auto tries it, and what auto would leave out fails.
    trials = build_plan(model, replace(resolve_ops(ops), is_auto=True, named=())).trials
    parts = []
    for op in OPS:
        results = [check_op(op, device), *(trial for trial in trials if trial.op == op)]
        reason = next((result.reason for result in results if not result.ok), None)
        parts.append(
            OpPart(
                op=op,
                ok=reason is None,
                ms=sum(result.ms for result in results),
                reason=reason if op in used or reason else "not used by this run",
            )
        )
    return parts


def _outcome(model: Any, loss: Loss) -> dict[str, torch.Tensor]:
    """Compute the loss and every gradient as in training, and the logits as in evaluation."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=loss.input_ids, use_cache=False).logits
    model.train()
    model.zero_grad(set_to_none=True)
    value = loss.of(model)
    value.backward()
    found = {"loss": value.detach(), "logits": logits}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"{GRADIENT}{name}"] = parameter.grad
    model.zero_grad(set_to_none=True)
    return found


def _truth(model: Any, loss: Loss, dtype: torch.dtype, notify: Callable[[str], None]) -> _Truth:
    """Compute the stock model in the highest precision that fits, and its own error."""
    device = loss.input_ids.device
    for name, precision in _TRUTHS.items():
        if precision.itemsize <= dtype.itemsize or not _may_fit(model, precision):
            continue
        try:
            with contextlib.ExitStack() as widened:
                for one in filter(None, (model, loss.teacher)):
                    widened.enter_context(in_precision(one, precision))
                values = _to_host(_outcome(model, loss))
        except torch.OutOfMemoryError:
            notify(f"the stock model does not fit in {name}")
            torch.cuda.empty_cache()
            continue
        errors = errors_of(_outcome(model, loss), values, norm)
        return _Truth(name, values, errors, dtype, device)
    return _Truth("eager", _to_host(_outcome(model, loss)), None, dtype, device)


def _may_fit(model: Any, precision: torch.dtype) -> bool:
    """Return whether weights and gradients, or a GPU's gradients alone, fit into host memory."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return bool(2.5 * num_parameters * precision.itemsize < host_memory())


def _to_host(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu() for name, value in values.items()}


def _worst(modules: Sequence[ModulePart], whole: Iterable[TensorPart]) -> WorstPart | None:
    """Return the module nearest to its limit or beyond, else the tensor of the whole model."""
    found: list[tuple[TensorPart, str, str | None]] = [
        (part.tensor, part.name, part.op) for part in modules if part.tensor is not None
    ]
    if all(tensor.ok for tensor, _, _ in found):
        for part in whole:
            parameter = part.name.removeprefix(GRADIENT)
            is_gradient = parameter != part.name
            where = parameter.rpartition(".")[0] if is_gradient else "the whole model"
            found.append((part, where, None))
    if not found:
        return None
    tensor, where, op = max(found, key=lambda entry: entry[0].share)
    return WorstPart(
        where=where, op=op, tensor=tensor.name, ours=tensor.ours, allowed=tensor.allowed
    )
