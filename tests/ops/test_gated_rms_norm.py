"""The gated RMS norm beyond the table of test_ops.py: roundings, groups, views, autograd."""

from __future__ import annotations

import itertools
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, INTERPRETER_FLOOR, error
from liger_kernels.ops import backend, gated_rms_norm
from liger_kernels.ops.gated_rms_norm import gated_rms_norm_ref

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The four places of gate and rounding that transformers has, named after a model.
FORMS = {
    "qwen3_next": {},
    "kimi": {"cast": "after_weight", "activation": "sigmoid"},
    "mamba2": {"gate_first": True, "num_groups": 2},
    "falcon_h1": {"gate_first": True, "cast": "after_weight"},
}
each_form = pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)


def make(*shape: int, seed: int, dtype=torch.float32, device="cpu", shift: float = 0.0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + shift
    return x.to(device=device, dtype=dtype).requires_grad_()


def arguments(*shape: int, device, dtype=torch.float32):
    """x, gate and weight, each a leaf that requires grad."""
    x, gate = (make(*shape, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    return [x, gate, make(shape[-1], seed=3, dtype=dtype, device=device, shift=1.0)]


def gradients(function, tensors, dy, **options):
    """Gradients of function(*tensors) in direction dy, by fresh leaves that keep the flags."""
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = function(*leaves, **options)
    y.backward(dy.to(y.dtype))
    return y.detach(), [leaf.grad for leaf in leaves]


def _qwen3_next(x, gate, weight):
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight * x_hat.to(x.dtype) * F.silu(gate.float())).to(x.dtype)


def _kimi(x, gate, weight):
    x_hat = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (weight.float() * x_hat * torch.sigmoid(gate.float())).to(x.dtype)


def _mamba2(x, gate, weight):
    u = (x.float() * F.silu(gate.float())).view(*x.shape[:-1], 2, -1)
    x_hat = u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x_hat.view(x.shape).to(x.dtype)


def _falcon_h1(x, gate, weight):
    u = x * F.silu(gate.float())
    return (weight * (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)


STOCK = {
    "qwen3_next": _qwen3_next,
    "kimi": _kimi,
    "mamba2": _mamba2,
    "falcon_h1": _falcon_h1,
}


# Case 16: where each class rounds, bit by bit. fp16: the interpreter rounds it as a GPU does.
@pytest.mark.parametrize("name", FORMS)
def test_case_16_bits_of_transformers(name, device):
    tensors = [t.detach() for t in arguments(64, 128, device=device, dtype=torch.half)]
    outputs = {form: gated_rms_norm(*tensors, **FORMS[form]) for form in FORMS}
    wanted = STOCK[name](*tensors)
    share = {form: (y == wanted).double().mean().item() for form, y in outputs.items()}
    assert share[name] > 0.995
    # The forms are told apart by this data.
    assert all(share[form] < 0.9 for form in FORMS if form != name)


@each_form
@pytest.mark.parametrize(
    "dtypes",
    list(itertools.product(DTYPES, DTYPES, (torch.float32, torch.bfloat16))),
    ids=lambda dtypes: "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes),
)
def test_case_41_dtypes_of_x_gate_and_weight(options, dtypes, device):
    tensors = [
        t.detach().to(dtype).requires_grad_()
        for t, dtype in zip(arguments(5, 34, device=device), dtypes, strict=True)
    ]
    dy = make(5, 34, seed=9, device=device).detach()
    y, ours = gradients(gated_rms_norm, tensors, dy, **options)
    wanted, eager = gradients(gated_rms_norm_ref, tensors, dy, **options)
    assert y.dtype == wanted.dtype
    floor = INTERPRETER_FLOOR if backend.INTERPRETED else FLOOR
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    # Up to three roundings of eager's, and the interpreter truncates to bf16.
    tolerance = 3 * floor[coarsest]
    assert error(y, wanted) <= tolerance
    for mine, theirs in zip(ours, eager, strict=True):
        assert mine.dtype == theirs.dtype
        assert error(mine, theirs) <= tolerance


@pytest.mark.parametrize("gate_first", [True, False])
def test_groups_are_norms_of_their_own(gate_first, device):
    x, gate, weight = arguments(7, 60, device=device)
    with torch.no_grad():
        x *= torch.tensor([1.0, 100.0, 0.01], device=device).repeat_interleave(20)
    dy = make(7, 60, seed=9, device=device).detach()
    options = {"gate_first": gate_first}
    y, ours = gradients(gated_rms_norm, (x, gate, weight), dy, num_groups=3, **options)
    for part in (slice(0, 20), slice(20, 40), slice(40, 60)):
        alone = [t.detach()[..., part].requires_grad_() for t in (x, gate, weight)]
        wanted, grads = gradients(gated_rms_norm, alone, dy[:, part], **options)
        assert error(y[:, part], wanted) <= FLOOR[torch.float32]
        for mine, theirs in zip(ours, grads, strict=True):
            assert error(mine[..., part], theirs) <= 2 * FLOOR[torch.float32]


# A gate far from 0 on both sides: silu and its slope neither overflow nor cancel.
@each_form
def test_gates_far_out(options, device):
    x, gate, weight = arguments(6, 40, device=device)
    gate = (60 * gate).detach().requires_grad_()
    dy = make(6, 40, seed=9, device=device).detach()
    y, ours = gradients(gated_rms_norm, (x, gate, weight), dy, **options)
    doubles = [t.detach().double().requires_grad_() for t in (x, gate, weight)]
    wanted, truth = gradients(gated_rms_norm_ref, doubles, dy.double(), **options)
    assert error(y, wanted) <= 2e-6
    for mine, theirs in zip(ours, truth, strict=True):
        assert error(mine, theirs) <= 5e-6


# How mixers call it: x is scores of heads, the gate a slice of the input projection.
@each_form
def test_slices_of_a_projection_are_read_in_place(options, device):
    saved = []
    projection = make(2, 5, 3 * 40, seed=1, device=device).detach()
    gate = projection[..., 40:80].requires_grad_()
    x, _, weight = arguments(2, 5, 40, device=device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = gated_rms_norm(x, gate, weight, **options)
    pointers = {t.data_ptr() for t in saved}
    assert {x.data_ptr(), gate.data_ptr()} <= pointers
    others = [t for t in saved if t.data_ptr() not in (x.data_ptr(), gate.data_ptr())]
    # The weight and the statistics: nothing as large as x.
    assert all(t.numel() <= 40 for t in others)
    packed = gated_rms_norm(x, gate.detach().contiguous(), weight, **options)
    assert error(y.detach(), packed.detach()) <= FLOOR[torch.float32]


@each_form
def test_case_37_expanded_gradients(options, device):
    tensors = arguments(6, 40, device=device)
    for dy in (make(1, 1, seed=9, device=device), make(1, 40, seed=9, device=device)):
        dy = dy.detach().expand(6, 40)
        _, ours = gradients(gated_rms_norm, tensors, dy, **options)
        _, packed = gradients(gated_rms_norm, tensors, dy.contiguous(), **options)
        for mine, theirs in zip(ours, packed, strict=True):
            assert error(mine, theirs) <= FLOOR[torch.float32]


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (3, 0)])
def test_case_44_no_elements(shape, device):
    tensors = arguments(*shape, device=device)
    y, grads = gradients(gated_rms_norm, tensors, torch.ones(shape, device=device))
    assert y.shape == shape
    for tensor, grad in zip(tensors, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_case_46_a_second_derivative_is_an_error(device):
    tensors = arguments(6, 40, device=device)
    loss = gated_rms_norm(*tensors).sum()
    with pytest.raises(RuntimeError, match="gated_rms_norm is not differentiable twice"):
        torch.autograd.grad(loss, tensors[0], create_graph=True)


@each_form
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_case_91_checkpoint_under_autocast(options, use_reentrant, device):
    tensors = arguments(6, 40, device=device)
    projection = make(40, 40, seed=5, device=device).detach()
    dy = make(6, 40, seed=9, device=device).detach()

    def block(x, gate, weight):
        # bf16 out of the products, with an fp32 weight.
        return gated_rms_norm(x @ projection, gate @ projection, weight, **options)

    def run(function):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.autocast(device.type, torch.bfloat16):
            y = function(*leaves)
        y.backward(dy.to(y.dtype))
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    again = run(lambda *leaves: checkpoint(block, *leaves, use_reentrant=use_reentrant))
    assert all(map(torch.equal, run(block), again))


@each_form
@pytest.mark.parametrize(
    "flags",
    [flags for flags in itertools.product((True, False), repeat=3) if any(flags)],
    ids=lambda flags: "".join("ft"[flag] for flag in flags),
)
def test_gradients_exist_exactly_where_asked(options, flags, device):
    tensors = arguments(6, 40, device=device)
    dy = make(6, 40, seed=9, device=device).detach()
    _, all_grads = gradients(gated_rms_norm, tensors, dy, **options)
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    _, grads = gradients(gated_rms_norm, tensors, dy, **options)
    for flag, grad, wanted in zip(flags, grads, all_grads, strict=True):
        assert error(grad, wanted) <= 1e-6 if flag else grad is None


@each_form
def test_more_rows_than_programs(options, device):
    # Wide enough for one row a program: each adds up several rows before the partial sums meet.
    tensors = arguments(15, 2 * 2060, device=device)
    dy = make(15, 2 * 2060, seed=9, device=device).detach()
    _, ours = gradients(gated_rms_norm, tensors, dy, **options)
    _, eager = gradients(gated_rms_norm_ref, tensors, dy, **options)
    for mine, theirs in zip(ours, eager, strict=True):
        assert error(mine, theirs) <= 2e-6


@each_form
def test_fp64_is_computed_in_fp64(options, device):
    tensors = [t.detach().double().requires_grad_() for t in arguments(4, 34, device=device)]
    dy = make(4, 34, seed=9, device=device).detach().double()
    y, ours = gradients(gated_rms_norm, tensors, dy, **options)
    wanted, eager = gradients(gated_rms_norm_ref, tensors, dy, **options)
    for mine, theirs in zip((y, *ours), (wanted, *eager), strict=True):
        assert error(mine, theirs) <= FLOOR[torch.float64]


def _far_rows(num_rows: int, width: int, stride: int, seed: int) -> torch.Tensor:
    """Rows of fp16 more than 2^31 elements apart; the memory between them is never touched."""
    buffer = torch.frombuffer(
        mmap.mmap(-1, 2 * (stride * (num_rows - 1) + width)), dtype=torch.half
    )
    values = make(num_rows, width, seed=seed).detach()
    return buffer.as_strided((num_rows, width), (stride, 1)).copy_(values)


@pytest.mark.skipif(not backend.INTERPRETED, reason="a GPU needs the real amount of memory")
@each_form
def test_case_1_rows_are_addressed_in_64_bits(options, device):
    weight = make(64, seed=3, dtype=torch.half, device=device)
    x, gate, dy = (_far_rows(2, 64, 2**31 + 64 * i, seed=i) for i in (1, 2, 3))
    far = [x.requires_grad_(), gate.requires_grad_(), weight]
    packed = [t.detach().contiguous().requires_grad_() for t in far]
    y, ours = gradients(gated_rms_norm, far, dy, **options)
    wanted, near = gradients(gated_rms_norm, packed, dy.contiguous(), **options)
    assert torch.equal(y, wanted)
    assert all(map(torch.equal, ours, near))


def test_wrong_arguments_are_named(device):
    x, gate, weight = arguments(2, 8, device=device)
    with pytest.raises(ValueError, match=r"x must be a floating tensor .*int64 \(2, 8\)"):
        gated_rms_norm(x.long(), gate)
    with pytest.raises(ValueError, match=r"gate must be floating \(2, 8\) as x, got .*\(2, 4\)"):
        gated_rms_norm(x, gate[:, :4])
    with pytest.raises(ValueError, match=r"weight must be \(8,\) as x's width, got \(7,\)"):
        gated_rms_norm(x, gate, weight[:7])
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"num_groups must divide x's width 8, got {wrong}"):
            gated_rms_norm(x, gate, num_groups=wrong)
    with pytest.raises(ValueError, match="activation must be one of silu, sigmoid, got 'relu'"):
        gated_rms_norm(x, gate, activation="relu")
    with pytest.raises(
        ValueError, match="cast must be one of before_weight, after_weight, got 'llama'"
    ):
        gated_rms_norm(x, gate, cast="llama")


@pytest.mark.gpu
@each_form
def test_case_14_inside_torch_compile(options, device, true_allocators):
    tensors = arguments(4, 128, 768, device=device, dtype=torch.bfloat16)
    dy = make(4, 128, 768, seed=9, device=device, dtype=torch.bfloat16).detach()
    wanted, eager = gradients(gated_rms_norm, tensors, dy, **options)
    compiled = torch.compile(gated_rms_norm, fullgraph=False)
    y, ours = gradients(compiled, tensors, dy, **options)
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)
    for mine, theirs in zip(ours, eager, strict=True):
        assert error(mine, theirs) <= 2 * FLOOR[torch.bfloat16]
