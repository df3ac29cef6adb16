"""What the property tests share: arguments of an op by name, and the results of a call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from liger_kernels.ops.op import Case, Op
from liger_kernels.ops.registry import OPS

# A case of more elements than this adds time and no layout.
_MAX_ELEMENTS = 30000


def arguments_of(op: Op, case: Case, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a case by name, contiguous and in fp32."""
    sample = op.sample(case, torch.float32, device, torch.Generator().manual_seed(0))
    bound = inspect.signature(op.function).bind(*sample.args, **sample.kwargs)
    return {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in bound.arguments.items()
    }


@functools.cache
def _cases_with(op_name: str, name: str) -> list[Case]:
    op, found = OPS[op_name], []
    for case in op.cases:
        if case.needs_gpu or not 0 < torch.Size(case.shape).numel() <= _MAX_ELEMENTS:
            continue
        value = arguments_of(op, case, torch.device("cpu")).get(name)
        if isinstance(value, torch.Tensor) and value.dim() and value.numel():
            found.append(case)
    by_options = sorted(found, key=lambda case: -len(case.options))
    by_rank = sorted(found, key=lambda case: -len(case.shape))
    return list({case.id: case for case in (*by_options[:2], *by_rank[:1])}.values())


def cases_with(op: Op, name: str) -> list[Case]:
    """Return small cases in which the named tensor is there: most options first, then most sizes.

    Two with the most options, and the one of the highest rank.
    """
    return _cases_with(op.name, name)


def each_tensor() -> Iterator[tuple[Op, str]]:
    """Yield every tensor argument of every op."""
    for op in OPS.values():
        for row in op.tensors:
            yield op, row.name


def call(
    op: Op, arguments: Mapping[str, Any], grads: list[torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Return the outputs of a call, and the gradient of every floating tensor that may have one.

    grads are those of the outputs that have a graph; ones by default.
    """
    given = dict(arguments)
    leaves = {}
    for row in op.tensors:
        value = arguments.get(row.name)
        if value is not None and value.is_floating_point() and not row.is_constant:
            given[row.name] = leaves[row.name] = value.detach().requires_grad_()
    outputs = op.function(**given)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    differentiable = [y for y in outputs if isinstance(y, torch.Tensor) and y.requires_grad]
    grads = [torch.ones_like(y) for y in differentiable] if grads is None else grads
    found = torch.autograd.grad(differentiable, list(leaves.values()), grads)
    return [y.detach() for y in outputs], dict(zip(leaves, found, strict=True))
