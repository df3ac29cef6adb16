"""Every tensor argument of every op in every memory layout: the result is the contiguous call's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rows import arguments_of, call, cases_with, each_tensor

from liger_kernels.compare import error
from liger_kernels.ops import cross_entropy, fused_linear_cross_entropy
from liger_kernels.ops.registry import OPS

# Another layout may be another order of adding up.
TOLERANCE = 4e-6


def poisoned(shape, like: torch.Tensor) -> torch.Tensor:
    """A buffer of values that spoil every result they get into: NaN, or no label at all."""
    return like.new_full(tuple(shape), float("nan") if like.is_floating_point() else 2**30)


def strided(x: torch.Tensor) -> torch.Tensor:
    buffer = poisoned((2 * size for size in x.shape), x)
    return buffer[tuple(slice(1, None, 2) for _ in x.shape)].copy_(x)


def column(x: torch.Tensor) -> torch.Tensor:
    """As T[:, -1] is: the last of several values that are neighbours."""
    return poisoned((*x.shape, 3), x)[..., -1].copy_(x)


def offset(x: torch.Tensor) -> torch.Tensor:
    """A part of a wider tensor that begins at an odd address."""
    buffer = poisoned((*x.shape[:-1], x.shape[-1] + 8), x)
    return buffer[..., 3:-5].copy_(x)


def transposed(x: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def expanded_first(x: torch.Tensor) -> torch.Tensor:
    return x[:1].clone().expand_as(x)


def expanded_last(x: torch.Tensor) -> torch.Tensor:
    return x[..., :1].clone().expand_as(x)


def expanded_all(x: torch.Tensor) -> torch.Tensor:
    """As the gradient of a sum is."""
    return x.flatten()[0].clone().expand_as(x)


LAYOUTS = (strided, column, offset, transposed, expanded_first, expanded_last, expanded_all)
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def memory(x: torch.Tensor) -> torch.Tensor:
    """All bytes of the storage of x, what lies around x included."""
    return torch.tensor([], dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def assert_same(ours, wanted, where: str) -> None:
    (outputs, grads), (wanted_outputs, wanted_grads) = ours, wanted
    for i, (mine, other) in enumerate(zip(outputs, wanted_outputs, strict=True)):
        assert is_same(mine, other), f"{where}: output {i}"
    for name, grad in grads.items():
        assert is_same(grad, wanted_grads[name]), f"{where}: gradient of {name}"


def is_same(x: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Say whether x is wanted up to rounding, which is all there is where like rows cancel."""
    return error(x, wanted) <= TOLERANCE or (x - wanted).abs().max() <= 1e-6


def check(op, case, name: str, layout: Callable[[torch.Tensor], torch.Tensor], device) -> None:
    arguments = arguments_of(op, case, device)
    x = layout(arguments[name])
    kept = memory(x).clone()
    packed = x.clone(memory_format=torch.contiguous_format)
    wanted = call(op, {**arguments, name: packed})
    assert_same(call(op, {**arguments, name: x}), wanted, f"{op.name}[{case.id}] {name}")
    assert torch.equal(memory(x), kept), f"{op.name}[{case.id}] wrote into {name}"


@each_layout
@pytest.mark.parametrize(
    ("op", "name"), list(each_tensor()), ids=lambda value: getattr(value, "name", value)
)
def test_case_201_tensors_of_any_layout(op, name, layout, device):
    cases = cases_with(op, name)
    assert cases, f"no case of {op.name} has a {name}: its layouts are not tested"
    for case in cases:
        check(op, case, name, layout, device)


@each_layout
@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_case_201_incoming_gradients_of_any_layout(op, layout, device):
    for case in cases_with(op, op.tensors[0].name):
        arguments = arguments_of(op, case, device)
        outputs, _ = call(op, arguments)
        generator = torch.Generator().manual_seed(1)
        shapes = [y.shape for y in outputs if y.is_floating_point()]
        grads = []
        for shape in shapes:
            dy = torch.randn(shape, generator=generator).to(device)
            grads.append(layout(dy) if dy.dim() else dy)
        kept = [memory(dy).clone() for dy in grads]
        packed = [dy.clone(memory_format=torch.contiguous_format) for dy in grads]
        wanted = call(op, arguments, packed)
        assert_same(call(op, arguments, grads), wanted, f"{op.name}[{case.id}] gradient")
        for dy, before in zip(grads, kept, strict=True):
            assert torch.equal(memory(dy), before), f"{op.name}[{case.id}] wrote into a gradient"


def test_case_201_labels_of_a_column_give_the_loss_of_a_copy(device):
    torch.manual_seed(0)
    hidden = torch.randn(6, 16, device=device)
    weight = torch.randn(33, 16, device=device)
    target = torch.randint(0, 33, (6, 5), device=device)[:, -1]
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), target)
    for loss in (
        fused_linear_cross_entropy(hidden, weight, target),
        cross_entropy(hidden @ weight.t(), target),
    ):
        assert error(loss, wanted) <= TOLERANCE


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_incoming_gradients_with_a_lazy_minus_sign(op, device):
    """The gradient of a real part of a conjugate is a view whose memory holds the other sign."""
    case = cases_with(op, op.tensors[0].name)[0]
    arguments = arguments_of(op, case, device)
    outputs, _ = call(op, arguments)
    grads = [torch.ones_like(y).mul(0.5) for y in outputs if y.is_floating_point()]
    lazy = [torch.complex(dy, -dy).conj().imag for dy in grads]
    assert all(dy.is_neg() for dy in lazy)
    assert_same(call(op, arguments, lazy), call(op, arguments, grads), op.name)
