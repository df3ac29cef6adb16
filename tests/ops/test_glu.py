"""swiglu and geglu beyond the table of test_ops.py: rounding, layouts and uses of autograd."""

from __future__ import annotations

import functools
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import backend, geglu, swiglu

EXACT = functools.partial(geglu, approximate="none")
# name -> the op and eager's way to say it.
OPS = {
    "swiglu": (swiglu, lambda gate, up: F.silu(gate) * up),
    "geglu": (geglu, lambda gate, up: F.gelu(gate, approximate="tanh") * up),
    "geglu-exact": (EXACT, lambda gate, up: F.gelu(gate) * up),
}
# The interpreter's sigmoid goes through exp(-x), which may be inf as on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
each_op = pytest.mark.parametrize(("op", "eager"), OPS.values(), ids=OPS)


def make(*shape: int, seed: int, dtype=torch.float32, device="cpu", scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * scale
    return x.to(device=device, dtype=dtype)


def gradients(function, gate, up, dy):
    """Output and gradients of function in direction dy, by fresh leaves over the same memory."""
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = function(gate, up)
    y.backward(dy)
    return y.detach(), gate.grad, up.grad


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many representable numbers of a 16-bit dtype lie between the elements of a and b."""

    def ordinal(x):
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (ordinal(a) - ordinal(b)).abs()


@each_op
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_case_20_case_22_rounds_where_eager_rounds(op, eager, dtype, device):
    # bf16 on a GPU only: the interpreter truncates to it.
    gate, up, dy = (make(128, 256, seed=i, dtype=dtype, device=device) for i in range(3))
    # Left of that gelu's slope goes through 0, and eager's gelu loses its digits to 1 - tanh.
    is_sharp = gate > -0.5
    for mine, theirs in zip(
        gradients(op, gate, up, dy), gradients(eager, gate, up, dy), strict=True
    ):
        distance = ulps(mine, theirs)[is_sharp]
        # fp32 results a few of its ulps apart rarely fall on two sides of a 16-bit rounding.
        assert distance.max() <= 2
        assert (distance == 0).double().mean() > 0.99
    # A product with the unrounded activation is told apart by this data.
    unrounded = eager(gate.float(), up.float()).to(dtype)
    assert (ulps(eager(gate, up), unrounded) == 0).double().mean() < 0.9


def test_case_21_the_two_gelus_are_two(device):
    gate, up = make(64, 128, seed=0, device=device), make(64, 128, seed=1, device=device)
    assert error(geglu(gate, up), F.gelu(gate, approximate="tanh") * up) < 1e-6
    assert error(EXACT(gate, up), F.gelu(gate) * up) < 1e-6
    assert error(geglu(gate, up), F.gelu(gate) * up) > 1e-5


@each_op
def test_values_far_out(op, eager, device):
    gate = torch.tensor([-3e4, -100.0, -20.0, -5.0, -0.0, 0.0, 5.0, 20.0, 100.0, 3e4])
    gate = gate.to(device)
    up, dy = torch.ones_like(gate), torch.ones_like(gate)
    for mine, theirs in zip(
        gradients(op, gate, up, dy), gradients(eager, gate, up, dy), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@each_op
def test_case_17_grad_output_and_inputs_are_left_alone(op, eager, device):
    tensors = [make(6, 40, seed=i, device=device) for i in range(3)]
    before = [t.clone() for t in tensors]
    gradients(op, *tensors)
    assert all(map(torch.equal, tensors, before))


@each_op
def test_case_19_a_second_backward_gives_the_same_gradients(op, eager, device):
    a, b, dy = (make(6, 40, seed=i, device=device, scale=1.0) for i in range(3))
    leaves = (a.requires_grad_(), b.requires_grad_())
    y = op(leaves[0].exp(), leaves[1].exp())
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, dy)
    assert all(map(torch.equal, first, second))
    wanted = torch.autograd.grad(eager(a.exp(), b.exp()), leaves, dy)
    for mine, theirs in zip(first, wanted, strict=True):
        assert error(mine, theirs) < 2e-6


@each_op
def test_case_37_expanded_gradients(op, eager, device):
    gate, up = make(6, 40, seed=0, device=device), make(6, 40, seed=1, device=device)
    # Stride 0 over everything, as the gradient of a sum has, and over the rows alone.
    for dy in (make(1, 1, seed=2, device=device), make(1, 40, seed=2, device=device)):
        expanded = dy.expand(6, 40)
        ours, packed = (
            gradients(op, gate, up, direction) for direction in (expanded, expanded.contiguous())
        )
        assert all(map(torch.equal, ours, packed))


@pytest.mark.parametrize("up_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_case_41_dtype_pairs(gate_dtype, up_dtype, device):
    op, eager = OPS["swiglu"]
    gate = make(5, 33, seed=0, dtype=gate_dtype, device=device)
    up = make(5, 33, seed=1, dtype=up_dtype, device=device)
    dy = make(5, 33, seed=2, dtype=torch.promote_types(gate_dtype, up_dtype), device=device)
    coarsest = max(gate_dtype, up_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    for mine, theirs in zip(
        gradients(op, gate, up, dy), gradients(eager, gate, up, dy), strict=True
    ):
        assert mine.dtype == theirs.dtype
        # Two roundings on each side, and the interpreter truncates to bf16.
        assert error(mine, theirs) <= 5 * FLOOR[coarsest]


@each_op
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_case_44_no_elements(op, eager, shape, device):
    empty = torch.ones(shape, device=device)
    for tensor in gradients(op, empty, empty, empty):
        assert tensor.shape == shape


@each_op
def test_case_46_a_second_derivative_is_an_error(op, eager, device):
    gate = make(6, 40, seed=0, device=device).requires_grad_()
    loss = op(gate, make(6, 40, seed=1, device=device)).sum()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, gate, create_graph=True)


@each_op
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_case_91_checkpoint_under_autocast(op, eager, use_reentrant, device):
    x, dy = make(6, 40, seed=0, device=device), make(6, 48, seed=1, device=device)
    weights = [make(48, 40, seed=i, device=device).requires_grad_() for i in (2, 3)]

    def block(x):
        # bf16 out of the products, one of them changed in place.
        gate, up = (F.linear(x, weight) for weight in weights)
        return op(gate.mul_(0.1), up)

    def run(function):
        leaf = x.detach().requires_grad_()
        for weight in weights:
            weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            y = function(leaf)
        assert y.dtype == torch.bfloat16
        y.backward(dy.to(y.dtype))
        return [y.detach(), leaf.grad, *(weight.grad for weight in weights)]

    plain = run(block)
    again = run(lambda leaf: checkpoint(block, leaf, use_reentrant=use_reentrant))
    assert all(map(torch.equal, plain, again))


@each_op
@pytest.mark.parametrize("flags", [(True, False), (False, True)], ids=["gate", "up"])
def test_gradients_exist_exactly_where_asked(op, eager, flags, device):
    tensors = [make(6, 40, seed=i, device=device) for i in range(2)]
    dy = make(6, 40, seed=2, device=device)
    _, *wanted = gradients(op, *tensors, dy)
    leaves = [t.requires_grad_(flag) for t, flag in zip(tensors, flags, strict=True)]
    op(*leaves).backward(dy)
    for leaf, flag, grad in zip(leaves, flags, wanted, strict=True):
        assert error(leaf.grad, grad) <= 1e-6 if flag else leaf.grad is None


@each_op
def test_halves_of_one_tensor_are_neither_copied_nor_kept_twice(op, eager, device):
    both = make(2, 5, 88, seed=0, device=device).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = op(*both.chunk(2, dim=-1))
    # Gate and up themselves and nothing else: no activation, no packed copy.
    assert len(saved) == 2
    storage = both.untyped_storage().data_ptr()
    assert all(tensor.untyped_storage().data_ptr() == storage for tensor in saved)
    assert y.is_contiguous()
    dy = make(2, 5, 44, seed=1, device=device)
    y.backward(dy)
    ours, both.grad = both.grad, None
    wanted = eager(*both.chunk(2, dim=-1))
    wanted.backward(dy)
    assert error(y.detach(), wanted.detach()) < 1e-6
    assert error(ours, both.grad) < 1e-6


@each_op
def test_one_tensor_as_both(op, eager, device):
    x = make(6, 40, seed=0, device=device).requires_grad_()
    dy = make(6, 40, seed=1, device=device)
    (ours,) = torch.autograd.grad(op(x, x), x, dy)
    (wanted,) = torch.autograd.grad(eager(x, x), x, dy)
    assert error(ours, wanted) < 1e-6


def test_layouts_that_need_strides(device):
    packed = make(6, 40, seed=0, device=device)
    layouts = {
        "transposed": packed.t().contiguous().t(),
        "every second column": torch.stack((packed, packed + 9), -1)[..., 0],
        "rows apart": torch.cat((packed, packed + 9), -1)[:, :40],
        "one row for all": packed[:1].expand(6, 40),
    }
    for name, gate in layouts.items():
        up, dy = make(6, 40, seed=1, device=device), make(6, 40, seed=2, device=device)
        for a, b in ((gate, up), (up, gate), (gate, gate)):
            ours = gradients(swiglu, a, b, dy)
            wanted = gradients(swiglu, a.contiguous(), b.contiguous(), dy)
            assert ours[0].is_contiguous(), name
            assert all(error(x, y) < 1e-6 for x, y in zip(ours, wanted, strict=True)), name


def far_rows(*shape: int, stride: int, seed: int) -> torch.Tensor:
    """Rows of fp16 more than 2^31 elements apart; the memory between them is never touched."""
    rows, width = shape
    num_bytes = 2 * (stride * (rows - 1) + width)
    buffer = torch.frombuffer(mmap.mmap(-1, num_bytes), dtype=torch.half)
    return buffer.as_strided(shape, (stride, 1)).copy_(make(*shape, seed=seed))


@pytest.mark.skipif(not backend.INTERPRETED, reason="a GPU needs the real amount of memory")
@each_op
def test_case_2_rows_are_addressed_in_64_bits(op, eager):
    gate, up, dy = (far_rows(2, 64, stride=2**31 + 64 * i, seed=i) for i in range(1, 4))
    far = gradients(op, gate, up, dy)
    near = gradients(op, gate.contiguous(), up.contiguous(), dy.contiguous())
    assert all(map(torch.equal, far, near))


def test_fp64_is_computed_in_fp64(device):
    gate, up = (make(4, 33, seed=i, dtype=torch.float64, device=device) for i in range(2))
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate) * up, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(EXACT(gate, up), F.gelu(gate) * up, rtol=1e-12, atol=1e-12)


@each_op
def test_wrong_arguments_are_named(op, eager, device):
    x = make(2, 8, seed=0, device=device)
    with pytest.raises(ValueError, match=r"up must be \(2, 8\) as gate is, got \(2, 1\)"):
        op(x, x[:, :1])
    with pytest.raises(ValueError, match=r"up must be a floating tensor .*int64 \(2, 8\)"):
        op(x, x.long())
    with pytest.raises(ValueError, match="gate must be a floating tensor"):
        op(x[0, 0], x[0, 0])


def test_unknown_approximation_names_the_choices(device):
    x = make(2, 8, seed=0, device=device)
    with pytest.raises(ValueError, match="approximate must be one of tanh, none, got 'fast'"):
        geglu(x, x, approximate="fast")


@pytest.mark.whole_card
@pytest.mark.gpu
@each_op
def test_case_2_more_than_2_31_elements(op, eager, device):
    # 4.3 GB a tensor, six of them at the peak.
    gate, up, dy = (
        torch.empty(65537, 32768, dtype=torch.bfloat16, device=device).normal_() for _ in range(3)
    )
    whole = gradients(op, gate, up, dy)
    for part in (slice(None, 8), slice(-8, None)):
        few = gradients(op, gate[part], up[part], dy[part])
        for large, small in zip(whole, few, strict=True):
            assert torch.equal(large[part], small)
        eagers = gradients(eager, gate[part], up[part], dy[part])
        for mine, theirs in zip(few, eagers, strict=True):
            assert error(mine, theirs) <= 4 * FLOOR[torch.bfloat16]


@pytest.mark.whole_card
@pytest.mark.gpu
@each_op
def test_case_2_halves_of_more_than_2_31_elements(op, eager, device):
    both = torch.empty(65537, 2 * 16640, dtype=torch.bfloat16, device=device).normal_()
    dy = torch.empty(65537, 16640, dtype=torch.bfloat16, device=device).normal_()
    gate, up = both.chunk(2, dim=-1)
    whole = gradients(op, gate, up, dy)
    few = gradients(op, gate[-8:].contiguous(), up[-8:].contiguous(), dy[-8:])
    for large, small in zip(whole, few, strict=True):
        assert torch.equal(large[-8:], small)


@pytest.mark.whole_card
@pytest.mark.gpu
@each_op
def test_case_29_as_fast_inside_torch_compile(op, eager, device, true_allocators):
    from triton.testing import do_bench

    gate, up = (make(32768, 8192, seed=i, dtype=torch.bfloat16, device=device) for i in range(2))
    compiled = torch.compile(op)
    with torch.no_grad():
        assert torch.equal(compiled(gate, up), op(gate, up))
        eager_ms = do_bench(lambda: op(gate, up), return_mode="median")
        compiled_ms = do_bench(lambda: compiled(gate, up), return_mode="median")
    assert compiled_ms <= 1.1 * eager_ms


@pytest.mark.gpu
@each_op
def test_compiled_gradients_are_the_same(op, eager, device, true_allocators):
    tensors = [make(4, 33, 96, seed=i, dtype=torch.bfloat16, device=device) for i in range(3)]
    for mine, theirs in zip(
        gradients(torch.compile(op), *tensors), gradients(op, *tensors), strict=True
    ):
        assert error(mine, theirs) <= 4 * FLOOR[torch.bfloat16]


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("is_fused", [False, True], ids=["packed", "halves"])
def test_case_30_compilations_do_not_follow_the_rows(op, eager, is_fused, device):
    from liger_kernels.ops.glu import _glu_bwd_kernel, _glu_fwd_kernel

    def num_compiled() -> int:
        device_index = torch.cuda.current_device()
        kernels = (_glu_fwd_kernel, _glu_bwd_kernel)
        return sum(len(kernel.device_caches[device_index][0]) for kernel in kernels)

    def run(rows):
        for num_rows in rows:
            both = make(num_rows, 2 * 257, seed=0, dtype=torch.bfloat16, device=device)
            gate, up = both.requires_grad_().chunk(2, dim=-1)
            if not is_fused:
                gate, up = gate.contiguous(), up.contiguous()
            op(gate, up).sum().backward()

    # These lengths meet both kinds of argument, multiples of 16 and others.
    run(range(100, 141))
    before = num_compiled()
    run(range(141, 201))
    assert before > 0
    assert num_compiled() == before
