"""The sides of one workload in this process, and the check that comes before any figure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from liger_cli.commands.bench.ops.tables import OURS, CheckPart, ErrorPart
from liger_cli.commands.bench.targets import DIVERGENCE, LOGPROBS, TRL, Workload
from liger_cli.commands.bench.timing import Arm, Stopwatch
from liger_kernels.compare import allowed_error, check_op, error
from liger_kernels.ops.losses.options import IGNORE_INDEX
from liger_kernels.ops.op import Sample

__all__ = ["TRL_FUNCTIONS", "check", "local_arms", "trl_version"]


def _torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _torch_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def _torch_experts(
    hidden: torch.Tensor,
    routing_weights: torch.Tensor,
    expert_ids: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Run silu experts by torch's grouped product, in the steps in which transformers uses it."""
    num_experts, top_k = gate_up.shape[0], expert_ids.shape[1]
    ordered, slots = expert_ids.flatten().sort()
    # Not bincount, which waits for a GPU; a CPU counts floats alone.
    values = ordered.int() if ordered.is_cuda else ordered.float()
    counts = torch.histc(values, bins=num_experts, min=0, max=num_experts - 1)
    offsets = counts.cumsum(0, dtype=torch.int32)
    h = torch._grouped_mm(hidden[slots // top_k], gate_up.transpose(1, 2), offs=offsets)
    gate, up = h.chunk(2, -1)
    y = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=offsets)
    y = y * routing_weights.flatten()[slots, None]
    places = torch.empty_like(slots)
    places[slots] = torch.arange(slots.numel(), device=slots.device)
    return y[places].view(*expert_ids.shape, -1).sum(1).to(hidden.dtype)


# torch's own fused op, on the arguments of ours; eager widens the logits of a loss before it.
_TORCH: dict[str, Callable[..., torch.Tensor]] = {
    "rms_norm": _torch_rms_norm,
    "layer_norm": _torch_layer_norm,
    "cross_entropy": F.cross_entropy,
    "moe_experts": _torch_experts,
}
if hasattr(F, "linear_cross_entropy"):
    # From torch 2.13 on; without an ignore_index it refuses labels that are IGNORE_INDEX.
    _TORCH["fused_linear_cross_entropy"] = functools.partial(
        F.linear_cross_entropy, ignore_index=IGNORE_INDEX
    )


def trl_version() -> str:
    """Return the version of TRL, or that it does not take part."""
    try:
        return version("trl")
    except PackageNotFoundError:
        return "did not run: it is not installed"


def _trl_logprobs() -> Callable[..., Any] | None:
    """Return TRL's function of the same arguments, or None where TRL does not have it."""
    try:
        function = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
        chunk = import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    except Exception:
        # Not installed, a version without it, or one whose own imports fail here.
        return None

    def logprobs(
        hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, *, outputs: tuple[str, ...]
    ) -> tuple[torch.Tensor, ...]:
        # As it has them: no others than the log-probability, and no cap.
        found = function.apply(hidden, weight, None, ids, 1.0, chunk, None, 1.0, ())
        return tuple(value for value in found if value is not None)

    return logprobs


def _trl_divergence() -> Callable[..., Any] | None:
    """Return TRL's function of the same arguments, or None where TRL does not have it."""
    try:
        function = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    except Exception:
        # As above.
        return None

    def divergence(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        *,
        beta: float = 0.5,
        temperature: float = 1.0,
        **options: Any,
    ) -> torch.Tensor:
        if options != {"reduction": "mean"}:
            raise ValueError(f"TRL's function is not compared with {options}")
        student, teacher = (hidden, weight, None), (teacher_hidden, teacher_weight, None)
        values, _ = function.apply(*student, *teacher, beta, temperature, 1.0, None, 1.0, None)
        return torch.as_tensor(values.mean())

    return divergence


# What TRL has of an op, where it has it.
TRL_FUNCTIONS = {LOGPROBS: _trl_logprobs, DIVERGENCE: _trl_divergence}


def local_arms(
    workload: Workload,
    sample: Sample,
    stopwatch: Stopwatch,
    dtype: torch.dtype,
    *,
    with_compile: bool,
) -> list[Arm]:
    """Return the sides that run in this process, on the same arguments."""
    op = workload.definition

    def arm(name: str, function: Callable[..., Any]) -> Arm:
        call = functools.partial(function, *sample.args, **sample.kwargs)
        leaves = [*sample.args, *sample.kwargs.values()]
        return Arm(name, call, leaves, stopwatch, dtype)

    ours = arm(OURS, op.function)
    if not workload.has_all_arms:
        return [ours]
    arms = [arm("eager", op.reference)]
    # Compiling takes seconds, and the host's time of a small op is not what it is for.
    if with_compile and workload.variant != "host time":
        torch._dynamo.reset()
        arms.append(arm("torch.compile", torch.compile(op.reference, dynamic=False)))
    if op.name in _TORCH and not sample.kwargs:
        arms.append(arm("torch", _TORCH[op.name]))
    trl = TRL_FUNCTIONS[op.name]() if op.name in TRL_FUNCTIONS and sample.kwargs else None
    if trl is not None:
        arms.append(arm(TRL, trl))
    return [*arms, ours]


def check(
    workload: Workload, sample: Sample, stopwatch: Stopwatch, dtype: torch.dtype
) -> CheckPart:
    """Compare ours and eager with the reference in fp64, or fp32 where that does not fit.

    Every output and every gradient counts; the limits are those of liger_kernels.compare.
    """
    op, device = workload.definition, stopwatch.device
    first = check_op(op.name, device)
    if not first.ok:
        return CheckPart(ok=False, reason=f"first case: {first.reason}")
    try:
        parameters = [*inspect.signature(op.reference).parameters][: len(sample.args)]
        named = enumerate((*parameters, *sample.kwargs))
        names = {f"gradient {i}": f"gradient of {name}" for i, name in named}
        precision, truth = _truth(workload, sample, stopwatch, dtype)
        eager = _outcome(op.reference, sample, stopwatch, dtype)
        ours = _outcome(op.function, sample, stopwatch, dtype)
        errors = []
        for key, value in ours.items():
            by_eager = error(eager[key], truth[key])
            limit = allowed_error(by_eager, dtype, device)
            name = names.get(key, key)
            errors.append((name, error(value, truth.pop(key)), by_eager, limit))
    except Exception as problem:
        # A kernel that does not run on this shape is a finding, as a wrong number is.
        return CheckPart(ok=False, reason=f"{type(problem).__name__}: {problem}".split("\n")[0])
    parts = [ErrorPart(name=k, ours=o, eager=e, limit=limit) for k, o, e, limit in errors]
    broken = [
        f"{k} is off by {o:.1e}, allowed {limit:.1e}" for k, o, _, limit in errors if o > limit
    ]
    return CheckPart(ok=not broken, truth=precision, errors=parts, reason="; ".join(broken) or None)


def _truth(
    workload: Workload, sample: Sample, stopwatch: Stopwatch, dtype: torch.dtype
) -> tuple[str, dict[str, torch.Tensor]]:
    reference = workload.definition.reference
    try:
        found = _outcome(reference, _cast(sample, torch.float64), stopwatch, dtype)
        return "fp64", found
    except torch.OutOfMemoryError:
        # The logits of the largest vocabularies, several times over: 70 GB and more.
        pass
    # Not before: while an error is handled, it keeps the tensors of its frames.
    stopwatch.free()
    return "fp32", _outcome(reference, _cast(sample, torch.float32), stopwatch, dtype)


def _cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """Return the same values as fresh leaves in another dtype; strides are kept."""

    def cast(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    kwargs = {name: cast(value) for name, value in sample.kwargs.items()}
    return replace(sample, args=tuple(map(cast, sample.args)), kwargs=kwargs)


def _outcome(
    function: Callable[..., Any], sample: Sample, stopwatch: Stopwatch, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return every output and every gradient of a call, by name."""
    values = [*sample.args, *sample.kwargs.values()]
    call = functools.partial(function, *sample.args, **sample.kwargs)
    arm = Arm("", call, values, stopwatch, dtype)
    found = {f"output {i}": y.detach() for i, y in enumerate(arm.full())}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.requires_grad:
            assert value.grad is not None, f"argument {i} got no gradient"
            found[f"gradient {i}"] = value.grad
    arm.clear()
    return found
