"""Norms at sizes that need a GPU and inside torch.compile."""

from __future__ import annotations

import importlib

import pytest
import torch
from norm_calls import NORMS, arguments, function_of, gradients, make

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import rms_norm
from liger_kernels.ops.rows import sum_partials_kernel


@pytest.mark.whole_card
@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_case_1_more_than_2_31_elements(norm, device):
    # 4.3 GB a tensor, five of them at the peak.
    rows, width = 524289, 4096
    x = torch.empty(1, rows, width, dtype=torch.bfloat16, device=device).normal_()
    dy = torch.empty_like(x).normal_()
    _, *parameters = arguments(norm, 1, width, device=device, dtype=torch.bfloat16)
    leaves = [x.requires_grad_(), *parameters]
    y = function_of(norm)(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    for part in (slice(None, 8), slice(-8, None)):
        few, few_grads = gradients(
            function_of(norm), (x.detach()[:, part].requires_grad_(), *parameters), dy[:, part]
        )
        assert torch.equal(y.detach()[:, part], few)
        assert torch.equal(grads[0][:, part], few_grads[0])
    assert all(grad.isfinite().all() for grad in grads[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_case_14_case_28_inside_torch_compile(norm, device, true_allocators):
    tensors = arguments(norm, 4, 128, 768, device=device, dtype=torch.bfloat16)
    dy = make(4, 128, 768, seed=9, device=device, dtype=torch.bfloat16).detach()
    wanted, eager = gradients(function_of(norm), tensors, dy)
    compiled = torch.compile(function_of(norm), fullgraph=False)
    y, ours = gradients(compiled, tensors, dy)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(ours, eager, strict=True):
        assert error(mine, theirs) <= 2 * FLOOR[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
def test_case_15_weight_gradient_of_many_narrow_rows(cast, device):
    # In fp32, so that only what is rounded on the way to the sum is seen.
    rows, width = 32768, 128
    x = make(rows, width, seed=1, device=device, dtype=torch.bfloat16)
    weight = make(width, seed=2, device=device, shift=1.0)
    dy = make(rows, width, seed=9, device=device).detach()
    y = rms_norm(x, weight, cast=cast)
    (dw,) = torch.autograd.grad(y, weight, dy.to(y.dtype))
    wide = x.detach().double()
    x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    if cast == "before_weight":
        x_hat = x_hat.bfloat16().double()
    wanted = (dy.to(y.dtype).double() * x_hat).sum(0)
    assert dw.dtype == torch.float32
    # Products in bf16 are off by 1.4e-3 here, and sums of 16 rows in bf16 by 5e-3.
    assert error(dw, wanted) < 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_case_29_no_fp64_inside_torch_compile(norm, device, true_allocators):
    from triton.testing import do_bench

    tensors = [
        t.detach() for t in arguments(norm, 65536, 4096, device=device, dtype=torch.bfloat16)
    ]
    function = function_of(norm)
    compiled = torch.compile(function)
    with torch.no_grad():
        compiled(*tensors)
        eager_ms = do_bench(lambda: function(*tensors), return_mode="median")
        compiled_ms = do_bench(lambda: compiled(*tensors), return_mode="median")
    # eps and offset arrive as fp64 there, and would pull the whole kernel along.
    assert compiled_ms <= 1.1 * eager_ms


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS)
def test_case_30_compilations_do_not_follow_the_rows(norm, device):
    module = importlib.import_module(f"liger_kernels.ops.{norm}_kernel")
    kernels = [
        getattr(module, f"{norm}_fwd_kernel"),
        getattr(module, f"{norm}_bwd_kernel"),
        sum_partials_kernel,
    ]

    def num_compiled() -> int:
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    def run(rows):
        for num_rows in rows:
            tensors = arguments(norm, num_rows, 1024, device=device, dtype=torch.bfloat16)
            function_of(norm)(*tensors).sum().backward()

    # These lengths meet multiples of 16 and others, both in rows and in programs.
    run(range(100, 141))
    before = num_compiled()
    run(range(141, 201))
    assert before > 0
    assert num_compiled() == before
