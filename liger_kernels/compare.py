"""No worse than eager: an op's error against fp64, beside that of plain torch in the same dtype.

truth = reference in fp64; eager = reference in dtype; an op passes when, for every output and every
gradient, error(op) <= 2 * error(eager) + floor[dtype]. Used by the tests and by the commands.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from liger_kernels.ops.backend import backend
from liger_kernels.ops.op import Case, Op, Sample

# About half an ulp of each dtype, relative to the largest element: one rounding more than eager.
FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
# Triton's interpreter truncates where a GPU rounds to the nearest bf16: an ulp, for two roundings.
INTERPRETER_FLOOR = {**FLOOR, torch.bfloat16: 1.6e-2}


def error_floor(dtype: torch.dtype, device: torch.device) -> float:
    """Return the error that is always allowed: one rounding of dtype on the device's backend."""
    is_interpreted = backend(device) == "triton-interpreter"
    return (INTERPRETER_FLOOR if is_interpreted else FLOOR)[dtype]


def allowed_error(
    eager: float, dtype: torch.dtype, device: torch.device, times: float = 2.0
) -> float:
    """Return the largest error that counts as no worse than eager.

    Args:
        eager: Error of plain torch in dtype, against fp64.
        dtype: Dtype that both computed in.
        device: Device that both ran on.
        times: How many of eager's errors are allowed.
    """
    return times * eager + error_floor(dtype, device)


@dataclass(frozen=True)
class TensorError:
    """Error of one output or gradient, relative to the largest element of the truth."""

    name: str
    ours: float
    eager: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.limit


@dataclass(frozen=True)
class Comparison:
    """One case of one op on one device: the error of every output and gradient."""

    op: str
    case: str
    dtype: torch.dtype
    backend: str
    errors: tuple[TensorError, ...]

    @property
    def ok(self) -> bool:
        return all(error.ok for error in self.errors)

    @property
    def worst(self) -> TensorError:
        return max(self.errors, key=lambda error: error.ours - error.limit)

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"{self.op}[{self.case}] {str(self.dtype).removeprefix('torch.')} on {self.backend}: "
            f"{worst.name} is off by {worst.ours:.2e}, eager by {worst.eager:.2e}, "
            f"allowed {worst.limit:.2e}"
        )


@dataclass(frozen=True)
class CheckResult:
    """Whether an op may be used on a device, and if not, why; ms is how long it took to tell."""

    op: str
    ok: bool
    reason: str | None = None
    ms: float = 0.0


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest deviation from truth over its largest element (absolute if that is 0)."""
    if value.shape != truth.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}")
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - truth.double()).abs().max().item()
    scale = truth.double().abs().max().item()
    result = difference / scale if scale else difference
    # NaN compares false with everything and must never pass.
    return result if result == result else float("inf")


def _is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)


def _map(value: Any, dtype: torch.dtype | None) -> Any:
    """Copy a tensor argument as a fresh leaf, in dtype if it is floating; strides are kept."""
    if not _is_tensor(value):
        return value
    # A detached separate view keeps an unusual layout, which a clone would pack.
    copy = value.detach()
    if dtype is not None and copy.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(value.requires_grad)


def run(
    function: Any, sample: Sample, dtype: torch.dtype | None, seed: int
) -> dict[str, torch.Tensor]:
    """Call function on a copy of the sample and return its outputs and gradients by name.

    Raises:
        AssertionError: function wrote into an argument or a gradient it was given, or an argument
            that requires grad got none.
    """
    args = [_map(value, dtype) for value in sample.args]
    kwargs: Mapping[str, Any] = {k: _map(value, dtype) for k, value in sample.kwargs.items()}
    named = [*enumerate(args), *kwargs.items()]
    kept = [(f"argument {name}", x, x.detach().clone()) for name, x in named if _is_tensor(x)]
    outputs = function(*args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = {f"output {i}": y for i, y in enumerate(outputs) if _is_tensor(y)}
    generator = torch.Generator().manual_seed(seed)
    differentiable, gradients = [], []
    for y in tensors.values():
        if y.requires_grad:
            # A random direction: a plain sum would hide errors that cancel.
            dy = torch.randn(y.shape, generator=generator, dtype=torch.float32)
            differentiable.append(y)
            gradients.append(dy.to(device=y.device, dtype=y.dtype))
    kept += [("a gradient given to it", dy, dy.clone()) for dy in gradients]
    if differentiable:
        torch.autograd.backward(differentiable, gradients)
    for what, value, before in kept:
        if not torch.equal(value, before):
            raise AssertionError(f"the op wrote into {what}")
    for name, value in named:
        if _is_tensor(value) and value.requires_grad:
            if value.grad is None:
                raise AssertionError(f"argument {name} requires grad and got none")
            tensors[f"gradient of argument {name}"] = value.grad
    return {name: y.detach() for name, y in tensors.items()}


def compare(
    op: Op, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> Comparison:
    """Run a case forward and backward three times (fp64, eager, op) and return the errors.

    Raises:
        AssertionError: an output or gradient is missing or has not eager's dtype and shape.
    """
    device = torch.device(device)
    sample = op.sample(case, dtype, device, torch.Generator().manual_seed(seed))
    truth = run(op.reference, sample, torch.float64, seed)
    eager = run(op.reference, sample, None, seed)
    ours = run(op.function, sample, None, seed)
    if ours.keys() != eager.keys():
        raise AssertionError(f"{op.name} returns {sorted(ours)}, its reference {sorted(eager)}")
    errors = []
    for key, value in ours.items():
        wanted = eager[key]
        if value.dtype != wanted.dtype or value.shape != wanted.shape:
            raise AssertionError(
                f"{op.name}[{case.id}] {key} is {value.dtype} {tuple(value.shape)}, "
                f"eager gives {wanted.dtype} {tuple(wanted.shape)}"
            )
        by_eager = error(wanted, truth[key])
        limit = allowed_error(by_eager, dtype, device)
        errors.append(TensorError(key, error(value, truth[key]), by_eager, limit))
    return Comparison(op.name, case.id, dtype, backend(device), tuple(errors))


def check_op(
    name: str,
    device: torch.device | str = "cpu",
    *,
    case: Case | None = None,
    dtype: torch.dtype | None = None,
) -> CheckResult:
    """Return whether an op passes on a device, whatever context it is called in.

    Args:
        name: The op, or a short name of it.
        device: Where it runs.
        case: The case to run; the op's first case by default.
        dtype: Of its inputs; fp32 and, on a GPU that has it, bf16 by default.
    """
    from liger_kernels.ops.registry import find_op

    op = find_op(name)
    device = torch.device(device)
    dtypes = [torch.float32 if dtype is None else dtype]
    if dtype is None and device.type == "cuda" and torch.cuda.is_bf16_supported():
        dtypes.append(torch.bfloat16)
    began = time.perf_counter()
    reason = None
    for dtype in dtypes:
        try:
            # Samples are drawn on the CPU, where a model may be being built on another device.
            with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                result = compare(op, case or op.cases[0], dtype, device)
        except Exception as problem:
            # A kernel that does not compile here is a finding about this machine, not a crash.
            reason = f"{type(problem).__name__}: {problem}"
        else:
            reason = None if result.ok else str(result)
        if reason is not None:
            break
    return CheckResult(op.name, reason is None, reason, (time.perf_counter() - began) * 1e3)
