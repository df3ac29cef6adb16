"""The gated MLP as one function: the numbers of its parts, and less memory than they take."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from liger_kernels.compare import FLOOR, INTERPRETER_FLOOR, error
from liger_kernels.ops import backend
from liger_kernels.ops.glu_mlp import ACTIVATIONS, glu_mlp

ACTS = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}
FLOORS = INTERPRETER_FLOOR if backend.INTERPRETED else FLOOR
NAMES = ("x", "gate_weight", "up_weight", "down_weight")
# The interpreter's sigmoid goes through exp(-x), which may be inf as on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def reference(x, gate_weight, up_weight, down_weight, *, activation="silu", keeps_product=False):
    if up_weight is None:
        gate, up = F.linear(x, gate_weight).chunk(2, -1)
    else:
        gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return F.linear(ACTS[activation](gate) * up, down_weight)


def make(dtype=torch.float32, device="cpu", rows=(2, 7), width=24, inner=33, out=None):
    generator = torch.Generator().manual_seed(0)
    shapes = ((*rows, width), (inner, width), (inner, width), (out or width, inner))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors = [x * (x.shape[-1] ** -0.5 if i else 1.0) for i, x in enumerate(tensors)]
    return [x.to(device=device, dtype=dtype).requires_grad_() for x in tensors]


def gradients(function, tensors, dy, **options):
    """Output, then the gradient of each tensor that wants one."""
    y = function(*tensors, **options)
    wanted = [x for x in tensors if x.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def direction(tensors):
    shape = (*tensors[0].shape[:-1], tensors[3].shape[0])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(tensors[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(24, 33), (40, 2065)], ids=["odd", "two-tiles"])
def test_no_worse_than_eager(activation, dtype, sizes, device):
    tensors = make(dtype, device, width=sizes[0], inner=sizes[1], out=12)
    dy = direction(tensors)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = gradients(reference, wide, dy.double(), activation=activation)
    eager = gradients(reference, tensors, dy, activation=activation)
    ours = gradients(glu_mlp, tensors, dy, activation=activation)
    for name, true, theirs, mine in zip(("y", *NAMES), truth, eager, ours, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= 2 * error(theirs, true) + FLOORS[dtype], name


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradients_exist_exactly_where_asked(flags, device):
    tensors = make(device=device)
    for x, flag in zip(tensors, flags, strict=True):
        x.requires_grad_(flag)
    dy = direction(tensors)
    if not any(flags):
        assert not glu_mlp(*tensors).requires_grad
        return
    for mine, theirs in zip(
        gradients(glu_mlp, tensors, dy), gradients(reference, tensors, dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
def test_gate_and_up_in_one_weight(flags, device):
    x, gate_weight, up_weight, down_weight = make(device=device)
    both = torch.cat([gate_weight, up_weight]).detach()
    tensors = [x, both, None, down_weight]
    for tensor, flag in zip((x, both, down_weight), flags, strict=True):
        tensor.requires_grad_(flag)
    if not any(flags):
        assert not glu_mlp(*tensors).requires_grad
        return
    given = [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]
    dy = direction(tensors)
    ours = torch.autograd.grad(glu_mlp(*tensors), given, dy)
    theirs = torch.autograd.grad(reference(*tensors), given, dy)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_making_the_product_again_changes_no_bit(dtype, device):
    tensors = make(dtype, device)
    dy = direction(tensors)
    kept = gradients(glu_mlp, tensors, dy, keeps_product=True)
    again = gradients(glu_mlp, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def saved_by(function, tensors, **options) -> int:
    """How many numbers function keeps for backward that are none of its arguments."""
    given = {x.untyped_storage().data_ptr() for x in tensors}
    sizes = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = function(*tensors, **options)
    assert y.requires_grad
    return sum(sizes.values())


def test_keeps_gate_and_up_alone(device):
    tensors = make(device=device)
    num_rows, inner = 14, 33
    assert saved_by(glu_mlp, tensors) == 2 * num_rows * inner
    assert saved_by(glu_mlp, tensors, keeps_product=True) == 3 * num_rows * inner
    assert saved_by(reference, tensors) == 4 * num_rows * inner


def test_case_17_case_19_arguments_are_left_alone_and_backward_runs_twice(device):
    tensors = make(device=device)
    dy = direction(tensors)
    before = [x.detach().clone() for x in (*tensors, dy)]
    y = glu_mlp(*tensors)
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, dy), strict=True))


def test_case_37_expanded_gradients(device):
    tensors = make(device=device)
    mine = torch.autograd.grad(glu_mlp(*tensors).sum(), tensors)
    theirs = torch.autograd.grad(reference(*tensors).sum(), tensors)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_case_44_no_rows(rows, device):
    tensors = make(device=device, rows=rows)
    y, *grads = gradients(glu_mlp, tensors, direction(tensors))
    assert y.shape == (*rows, 24)
    assert all(not grad.any() for grad in grads)


def test_case_46_a_second_derivative_is_an_error(device):
    tensors = make(device=device)
    with pytest.raises(RuntimeError, match="glu_mlp is not differentiable twice"):
        torch.autograd.grad(glu_mlp(*tensors).sum(), tensors, create_graph=True)


def test_wrong_arguments_are_named(device):
    x, gate_weight, up_weight, down_weight = make(device=device)
    with pytest.raises(ValueError, match=r"up_weight must be \(33, 24\)"):
        glu_mlp(x, gate_weight, up_weight[1:], down_weight)
    with pytest.raises(ValueError, match=r"gate_weight must be \(66, 24\)"):
        glu_mlp(x, gate_weight, None, down_weight)
    with pytest.raises(ValueError, match=r"down_weight must be .*float16"):
        glu_mlp(x, gate_weight, up_weight, down_weight.half())
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, gelu"):
        glu_mlp(x, gate_weight, up_weight, down_weight, activation="relu")
