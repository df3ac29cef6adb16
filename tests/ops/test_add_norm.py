"""fused_add_rms_norm: which gradients exist, what is saved, what is refused."""

from __future__ import annotations

import pytest
import torch
from norm_calls import flags_of, gradients, make

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import fused_add_rms_norm
from liger_kernels.ops.fused_add_rms_norm import fused_add_rms_norm_ref


def add_arguments(*shape: int, device, dtype=torch.float32, residual_dtype=None):
    return [
        make(*shape, seed=1, dtype=dtype, device=device),
        make(*shape, seed=2, dtype=residual_dtype or dtype, device=device),
        make(shape[-1], seed=3, dtype=dtype, device=device, shift=1.0),
    ]


@pytest.mark.parametrize("unused", ["y", "total"])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.half], ids=["fp32", "fp16"])
def test_add_norm_whose_output_nobody_reads(unused, residual_dtype, device):
    tensors = add_arguments(6, 40, device=device, residual_dtype=residual_dtype)
    dy = make(6, 40, seed=9, device=device).detach()
    index = ("total", "y").index(unused)

    def used(function):
        return lambda *args: function(*args)[index]

    _, ours = gradients(used(fused_add_rms_norm), tensors, dy)
    _, eager = gradients(used(fused_add_rms_norm_ref), tensors, dy)
    for mine, theirs in zip(ours, eager, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            assert mine.dtype == theirs.dtype
            assert error(mine, theirs) <= FLOOR[theirs.dtype]


@pytest.mark.parametrize("flags", flags_of(3), ids=lambda flags: "".join("ft"[f] for f in flags))
def test_add_norm_gradients_exist_exactly_where_asked(flags, device):
    tensors = add_arguments(6, 40, device=device)
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    dy, dtotal = (make(6, 40, seed=seed, device=device).detach() for seed in (8, 9))

    def both(function):
        leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
        y, total = function(*leaves)
        outputs = [(y, dy)] + [(total, dtotal)] * total.requires_grad
        torch.autograd.backward(*zip(*outputs, strict=True))
        return [leaf.grad for leaf in leaves]

    ours, eager = both(fused_add_rms_norm), both(fused_add_rms_norm_ref)
    for mine, theirs in zip(ours, eager, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(mine, theirs) <= 2e-6


def test_case_17_add_norm_leaves_the_gradients_it_is_given_alone(device):
    tensors = add_arguments(6, 40, device=device)
    given = [make(6, 40, seed=seed, device=device).detach() for seed in (8, 9)]
    before = [t.detach().clone() for t in (*tensors, *given)]
    y, total = fused_add_rms_norm(*tensors)
    assert torch.equal(total, tensors[0] + tensors[1])
    first = torch.autograd.grad((y, total), tensors, given, retain_graph=True)
    # case 19: and again.
    second = torch.autograd.grad((y, total), tensors, given)
    assert all(map(torch.equal, first, second))
    for tensor, old in zip((*tensors, *given), before, strict=True):
        assert torch.equal(tensor.detach(), old)


def test_add_norm_saves_only_the_sum_and_a_number_a_row(device):
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    tensors = add_arguments(50, 40, device=device, dtype=torch.half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, total = fused_add_rms_norm(*tensors)
    assert saved.pop(total.data_ptr()).numel() == 50 * 40
    assert saved.pop(tensors[2].data_ptr()).numel() == 40
    (rstd,) = saved.values()
    assert (rstd.numel(), rstd.dtype) == (50, torch.float32)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_case_44_add_norm_of_no_elements(shape, device):
    x, residual, weight = add_arguments(*shape, device=device)
    y, total = fused_add_rms_norm(x, residual, weight)
    assert y.shape == total.shape == shape
    (y.sum() + total.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_case_46_a_second_derivative_of_add_norm_is_an_error(device):
    tensors = add_arguments(6, 40, device=device)
    y, total = fused_add_rms_norm(*tensors)
    with pytest.raises(RuntimeError, match="fused_add_rms_norm is not differentiable twice"):
        torch.autograd.grad((y + total).sum(), tensors[0], create_graph=True)


def test_add_norm_names_wrong_arguments(device):
    x, residual, weight = add_arguments(2, 8, device=device)
    with pytest.raises(
        ValueError, match=r"residual must be floating \(2, 8\) as x, got .*\(1, 8\)"
    ):
        fused_add_rms_norm(x, residual[:1], weight)
    with pytest.raises(ValueError, match=r"residual must be floating .* got torch.int64"):
        fused_add_rms_norm(x, residual.long(), weight)
    with pytest.raises(ValueError, match=r"weight must be \(8,\) as x's width, got \(7,\)"):
        fused_add_rms_norm(x, residual, weight[:7])
    with pytest.raises(
        ValueError, match="cast must be one of before_weight, after_weight, got 'llama'"
    ):
        fused_add_rms_norm(x, residual, weight, cast="llama")
