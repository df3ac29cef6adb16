"""Norms beyond the table of test_ops.py: parameters, dtypes, layouts and uses of autograd."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F
from norm_calls import NORMS, arguments, flags_of, function_of, gradients, make
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import backend, layer_norm, rms_norm
from liger_kernels.ops.registry import OPS
from liger_kernels.ops.rms_norm import recompute
from liger_kernels.ops.rows import RowShape, persistent_row_plan

HALF_DTYPES = (torch.float16, torch.bfloat16)


DTYPES = (torch.float32, *HALF_DTYPES)


@pytest.mark.parametrize("width", [3, 17, 41, 768, 1536])
def test_case_13_layer_norm_takes_the_variance_over_the_true_width(width, device):
    x = make(4, width, seed=0, shift=5.0, device=device)
    weight = make(width, seed=1, device=device)
    bias = make(width, seed=2, device=device)
    dy = make(4, width, seed=3, device=device).detach()
    y, ours = gradients(layer_norm, (x, weight, bias), dy)
    wanted, torchs = gradients(
        lambda x, w, b: F.layer_norm(x, (width,), w, b), (x, weight, bias), dy
    )
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)


def test_layer_norm_of_one_column_is_the_bias(device):
    x, weight, bias = arguments("layer_norm", 5, 1, device=device)
    y, (dx, _, db) = gradients(layer_norm, (x, weight, bias), torch.ones(5, 1, device=device))
    assert torch.equal(y, bias.detach().expand(5, 1))
    # A fused multiply-add leaves the rounding of a product, which rstd enlarges 316 times.
    torch.testing.assert_close(dx, torch.zeros_like(dx), rtol=0, atol=2e-4)
    assert db.item() == 5.0


def test_layer_norm_keeps_small_deviations_from_a_large_mean(device):
    # mean(x^2) - mean(x)^2 has no correct digit here.
    deviation = make(6, 96, seed=0, device=device).detach()
    x = 4096.0 + deviation
    truth = F.layer_norm(x.double(), (96,))
    eager = error(F.layer_norm(x, (96,)), truth)
    assert error(layer_norm(x, None), truth) <= 2 * eager + FLOOR[torch.float32]


def test_case_16_gemma_adds_one_to_the_weight_in_fp32(device):
    # 1 + 2^-8 does not exist in bf16: a sum in the weight's dtype gives 1 and loses the weight.
    weight = torch.full((64,), 2.0**-8, dtype=torch.bfloat16, device=device)
    assert (1.0 + weight).float().eq(1.0).all()
    x = make(3, 64, seed=0, device=device).detach()
    ratio = rms_norm(x, weight, offset=1.0, cast="after_weight") / rms_norm(x)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1.00390625), rtol=1e-6, atol=0)


def test_case_16_casting_points_of_llama_and_gemma(device):
    # fp16: the interpreter rounds it as a GPU does.
    x, weight = (
        t.detach() for t in arguments("rms_norm", 64, 128, device=device, dtype=torch.half)
    )
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    llama = weight * x_hat.half()
    gemma = (x_hat * (1.0 + weight.float())).half()
    olmo = (weight.float() * x_hat).half()

    def share_of_equals(a, b):
        return (a == b).double().mean().item()

    assert share_of_equals(rms_norm(x, weight), llama) > 0.995
    assert share_of_equals(rms_norm(x, weight, cast="after_weight"), olmo) > 0.995
    assert share_of_equals(rms_norm(x, weight, offset=1.0, cast="after_weight"), gemma) > 0.995
    # The two castings are told apart by this data.
    assert share_of_equals(llama, olmo) < 0.9


@pytest.mark.parametrize("norm", NORMS)
def test_case_17_grad_output_and_inputs_are_left_alone(norm, device):
    tensors = arguments(norm, 6, 40, device=device)
    dy = make(6, 40, seed=9, device=device).detach()
    before = [t.detach().clone() for t in (*tensors, dy)]
    gradients(function_of(norm), tensors, dy)
    for tensor, old in zip((*tensors, dy), before, strict=True):
        assert torch.equal(tensor.detach(), old)


@pytest.mark.parametrize("norm", NORMS)
def test_case_19_a_second_backward_gives_the_same_gradients(norm, device):
    tensors = arguments(norm, 6, 40, device=device)
    y = function_of(norm)(*tensors)
    dy = make(6, 40, seed=9, device=device).detach()
    first = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    second = torch.autograd.grad(y, tensors, dy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("norm", NORMS)
def test_case_37_expanded_gradients(norm, device):
    tensors = arguments(norm, 6, 40, device=device)
    full = make(1, 1, seed=9, device=device).detach()
    rows = make(1, 40, seed=9, device=device).detach()
    # Stride 0 over everything, as the gradient of a sum has, and over the rows alone.
    for dy in (full.expand(6, 40), rows.expand(6, 40)):
        _, ours = gradients(function_of(norm), tensors, dy)
        _, packed = gradients(function_of(norm), tensors, dy.contiguous())
        # Another stride is another compiled kernel, which may add in another order.
        for mine, theirs in zip(ours, packed, strict=True):
            assert error(mine, theirs) <= FLOOR[torch.float32]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 24), (2, 1, 3, 24)])
def test_case_41_ranks(norm, shape, device):
    x, *parameters = arguments(norm, *shape, device=device)
    function = function_of(norm)
    y = function(x, *parameters)
    assert y.shape == x.shape
    rows = function(x.detach().reshape(-1, 24), *parameters)
    assert torch.equal(y.reshape(-1, 24), rows)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    list(itertools.product(DTYPES, DTYPES)),
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def test_case_41_dtype_pairs(norm, x_dtype, weight_dtype, device):
    x, *parameters = arguments(norm, 5, 33, device=device)
    x = x.detach().to(x_dtype).requires_grad_()
    parameters = [p.detach().to(weight_dtype).requires_grad_() for p in parameters]
    # LlamaRMSNorm promotes; torch's layer norm returns x's dtype wherever it takes the pair.
    out_dtype = torch.promote_types(x_dtype, weight_dtype) if norm == "rms_norm" else x_dtype
    dy = make(5, 33, seed=9, device=device).detach().to(out_dtype)
    y, ours = gradients(function_of(norm), (x, *parameters), dy)
    assert y.dtype == out_dtype
    wanted, eager = gradients(OPS[norm].reference, (x, *parameters), dy)
    coarsest = min(x_dtype, weight_dtype, key=lambda dtype: -torch.finfo(dtype).eps)
    # Two roundings, and the interpreter truncates to bf16.
    tolerance = 3 * FLOOR[coarsest]
    assert error(y, wanted) <= tolerance
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= tolerance


def test_layer_norm_parameters_of_two_dtypes(device):
    x, weight, bias = arguments("layer_norm", 5, 33, device=device, dtype=torch.half)
    bias = bias.detach().float().requires_grad_()
    dy = make(5, 33, seed=9, device=device, dtype=torch.half).detach()
    _, (_, dw, db) = gradients(layer_norm, (x, weight, bias), dy)
    assert (dw.dtype, db.dtype) == (torch.half, torch.float32)
    # fp32 sums of what was given: a detour through fp16 would show.
    torch.testing.assert_close(db, dy.float().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_case_44_no_elements(norm, shape, device):
    tensors = arguments(norm, *shape, device=device)
    y, grads = gradients(function_of(norm), tensors, torch.ones(shape, device=device))
    assert y.shape == shape
    for tensor, grad in zip(tensors, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("norm", NORMS)
def test_case_46_a_second_derivative_is_an_error(norm, device):
    tensors = arguments(norm, 6, 40, device=device)
    # The gradient of a sum needs no gradient itself: where torch's own check stays silent.
    loss = function_of(norm)(*tensors).sum()
    with pytest.raises(RuntimeError, match=f"{norm} is not differentiable twice"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("is_inside", [True, False], ids=["backward-inside", "backward-outside"])
def test_case_91_checkpoint_under_autocast(norm, use_reentrant, is_inside, device):
    tensors = arguments(norm, 6, 40, device=device)
    projection = make(40, 40, seed=5, device=device)
    dy = make(6, 40, seed=9, device=device).detach()

    def block(x, *parameters):
        # bf16 out of the product, changed in place, with fp32 parameters after it.
        return function_of(norm)((x @ projection).mul_(2.0), *parameters)

    def run(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        projection.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            y = function(*leaves)
            if is_inside:
                y.backward(dy.to(y.dtype))
        if not is_inside:
            y.backward(dy.to(y.dtype))
        return [y.detach(), projection.grad, *(leaf.grad for leaf in leaves)]

    plain = run(block)
    again = run(lambda *leaves: checkpoint(block, *leaves, use_reentrant=use_reentrant))
    assert all(map(torch.equal, plain, again))
    # Parameter gradients are fp32 sums, wherever backward is called.
    assert all(grad.dtype == torch.float32 for grad in plain[1:])


@pytest.mark.parametrize("norm", NORMS)
def test_parameter_gradients_are_the_same_inside_autocast(norm, device):
    tensors = arguments(norm, 6, 40, device=device)
    dy = make(6, 40, seed=9, device=device).detach()
    _, outside = gradients(function_of(norm), tensors, dy)
    with torch.autocast(device.type, torch.bfloat16):
        _, inside = gradients(function_of(norm), tensors, dy)
    assert all(map(torch.equal, outside, inside))


def far_rows(*shape: int, stride: int, seed: int) -> torch.Tensor:
    """Rows of fp16 more than 2^31 elements apart; the memory between them is never touched."""
    rows, width = shape
    num_bytes = 2 * (stride * (rows - 1) + width)
    buffer = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.half)
    return buffer.as_strided(shape, (stride, 1)).copy_(make(*shape, seed=seed).detach())


@pytest.mark.skipif(not backend.INTERPRETED, reason="a GPU needs the real amount of memory")
@pytest.mark.parametrize("norm", NORMS)
def test_case_1_rows_are_addressed_in_64_bits(norm, device):
    _, *parameters = arguments(norm, 2, 64, device=device, dtype=torch.half)
    x = far_rows(2, 64, stride=2**31 + 64, seed=1).requires_grad_()
    dy = far_rows(2, 64, stride=2**31 + 128, seed=2)
    y, far = gradients(function_of(norm), (x, *parameters), dy)
    packed = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    wanted, near = gradients(function_of(norm), (packed, *parameters), dy.contiguous())
    assert torch.equal(y, wanted)
    assert all(map(torch.equal, far, near))


@pytest.mark.parametrize(
    ("norm", "flags"),
    [("rms_norm", flags) for flags in flags_of(2)]
    + [("layer_norm", flags) for flags in flags_of(3)],
    ids=lambda value: value if isinstance(value, str) else "".join("ft"[flag] for flag in value),
)
def test_gradients_exist_exactly_where_asked(norm, flags, device):
    tensors = arguments(norm, 6, 40, device=device)
    dy = make(6, 40, seed=9, device=device).detach()
    _, all_grads = gradients(function_of(norm), tensors, dy)
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    _, grads = gradients(function_of(norm), tensors, dy)
    for flag, grad, wanted in zip(flags, grads, all_grads, strict=True):
        assert error(grad, wanted) <= 1e-6 if flag else grad is None


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_requires_grad(norm, device):
    tensors = [t.detach() for t in arguments(norm, 6, 40, device=device)]
    assert not function_of(norm)(*tensors).requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_saves_only_the_input_and_small_statistics(norm, device):
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor
        return tensor

    tensors = arguments(norm, 50, 40, device=device, dtype=torch.half)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function_of(norm)(*tensors)
    # x itself, not a copy.
    assert saved.pop(tensors[0].data_ptr()).numel() == 50 * 40
    assert saved.pop(tensors[1].data_ptr()).numel() == 40
    (statistics,) = saved.values()
    assert statistics.numel() == (50 if norm == "rms_norm" else 2 * 50)
    assert statistics.dtype == torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_strided_parameters(norm, device):
    x, *parameters = arguments(norm, 6, 40, device=device)
    dy = make(6, 40, seed=9, device=device).detach()
    wanted, packed = gradients(function_of(norm), (x, *parameters), dy)
    # A column of a wider tensor.
    columns = [torch.stack((p.detach(), p.detach() + 7.0), 1)[:, 0] for p in parameters]
    y, strided = gradients(function_of(norm), (x, *(c.requires_grad_() for c in columns)), dy)
    assert torch.equal(y, wanted)
    assert all(map(torch.equal, strided, packed))


# One row a program and several, whole and in two parts: enough of them that programs add up several
# tiles before their partial sums meet.
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("rows", "width"), [(70, 1030), (600, 128), (2100, 40), (66, 1536)], ids=lambda n: str(n)
)
def test_rows_are_summed_over_programs(norm, rows, width, device):
    tensors = arguments(norm, rows, width, device=device)
    dy = make(rows, width, seed=9, device=device).detach()
    y, ours = gradients(function_of(norm), tensors, dy)
    wanted, eager = gradients(OPS[norm].reference, tensors, dy)
    assert error(y, wanted) <= 1e-6
    for mine, theirs in zip(ours, eager, strict=True):
        assert error(mine, theirs) <= 3e-6


@pytest.mark.parametrize(
    ("rows", "width", "block_m", "block_n", "block_rest"),
    [
        (4096, 40, 128, 32, 8),
        (4096, 5120, 1, 4096, 1024),
        (4096, 2304, 1, 4096, 0),
        (4096, 7168, 1, 8192, 0),
        (4096, 8192, 1, 8192, 0),
        (4096, 1, 8192, 1, 0),
        (3, 40, 4, 64, 0),
    ],
)
def test_rows_are_taken_apart_where_it_saves_lanes(rows, width, block_m, block_n, block_rest):
    num_elements, num_warps = (2048, 16) if width > 2048 else (8192, 4)
    shape = RowShape(num_elements, num_warps)
    plan = persistent_row_plan(shape, width, rows, 4, torch.device("cpu"))
    assert (plan.block_m, plan.block_n, plan.block_rest) == (
        min(block_m, 4096),
        block_n,
        block_rest,
    )
    assert plan.block_n + plan.block_rest >= width


def test_few_elements_are_the_work_of_one_program():
    shape, device = RowShape(8192, 8), torch.device("cpu")
    assert persistent_row_plan(shape, 1024, 64, 4, device).num_programs == 1
    assert persistent_row_plan(shape, 1024, 65, 4, device).num_programs > 1


@pytest.mark.parametrize("layout", ["packed", "strided", "transposed"])
@pytest.mark.parametrize("cast", ["before_weight", "after_weight"])
def test_recompute_gives_the_same_bits(cast, layout, device):
    x, weight = arguments("rms_norm", 3, 5, 72, device=device, dtype=torch.half)
    if layout == "strided":
        x = make(3, 5, 80, seed=1, dtype=torch.half, device=device)[..., :72]
    elif layout == "transposed":
        x = make(5, 3, 72, seed=1, dtype=torch.half, device=device).transpose(0, 1)
    y = rms_norm(x, weight, 1e-5, offset=1.0, cast=cast)
    node = y.grad_fn
    again = recompute(*node.saved_tensors, node.options)
    assert torch.equal(again.view(y.shape), y)
    # From the statistics, not by reducing x anew.
    x, weight, rstd = node.saved_tensors
    assert torch.equal(recompute(x, weight, 0 * rstd, node.options), torch.zeros_like(again))


def test_fp64_is_computed_in_fp64(device):
    x = make(4, 33, seed=0, device=device).detach().double()
    weight = make(33, seed=1, device=device).detach().double()
    torch.testing.assert_close(
        layer_norm(x, weight, weight),
        F.layer_norm(x, (33,), weight, weight),
        rtol=1e-12,
        atol=1e-12,
    )
    wanted = F.rms_norm(x, (33,), weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_wrong_arguments_are_named(norm, device):
    function = function_of(norm)
    x, weight, *_ = arguments(norm, 2, 8, device=device)
    with pytest.raises(ValueError, match=r"x must be a floating tensor .*int64 \(2, 8\)"):
        function(x.long(), weight)
    with pytest.raises(ValueError, match="x must be a floating tensor"):
        function(torch.tensor(1.0, device=device), None)
    with pytest.raises(ValueError, match=r"weight must be \(8,\) as x's width, got \(7,\)"):
        function(x, weight[:7])


def test_options_are_checked_by_name(device):
    x, weight, bias = arguments("layer_norm", 2, 8, device=device)
    with pytest.raises(ValueError, match=r"bias must be \(8,\) as x's width, got \(1, 8\)"):
        layer_norm(x, weight, bias[None])
    with pytest.raises(
        ValueError, match="cast must be one of before_weight, after_weight, got 'llama'"
    ):
        rms_norm(x, weight, cast="llama")
