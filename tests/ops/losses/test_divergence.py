"""Divergences beyond test_ops.py: TRL's values, identities, who gets a gradient, chunks, errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from linear_heads import FP32, make, plain_torch

from liger_kernels.compare import error
from liger_kernels.ops import divergence, fused_linear_divergence
from liger_kernels.ops.fused_linear_divergence import fused_linear_divergence_ref
from liger_kernels.ops.losses import linear_divergence

# Of GKDTrainer.generalized_jsd_loss, trl 1.16.0 (scripts/trl_divergence_values.py).
TRL = json.loads(Path(__file__).with_name("trl_divergence.json").read_text())
BETAS = (0.0, 0.3, 1.0)


def layers(rows: int = 5, vocab: int = 20, dtype=torch.float32, device="cpu"):
    """hidden, weight, teacher_hidden, teacher_weight."""
    return [
        make(*shape, seed=seed, dtype=dtype, device=device)
        for seed, shape in enumerate(((rows, 8), (vocab, 8), (rows, 6), (vocab, 6)))
    ]


@pytest.mark.parametrize("case", TRL["cases"], ids=lambda c: f"{c['beta']}-{c['temperature']}")
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_divergence_and_gradients_are_those_of_trl(case, reduction):
    tensors = [torch.tensor(x, dtype=torch.float64) for x in TRL["tensors"]]
    hidden, weight = (x.requires_grad_() for x in tensors[:2])
    options = {"beta": case["beta"], "temperature": case["temperature"]}
    loss = fused_linear_divergence(*tensors, reduction=reduction, **options).sum()
    grads = torch.autograd.grad(loss, (hidden, weight))
    # TRL holds beta in fp32.
    assert loss.item() == pytest.approx(case["loss"], rel=5e-7)
    for ours, theirs in zip(grads, case["gradients"], strict=True):
        assert error(ours, torch.tensor(theirs, dtype=torch.float64).view_as(ours)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_that_is_the_student_gives_0_with_a_gradient_of_0(beta, dtype, device):
    hidden, weight, *_ = layers(dtype=dtype, device=device)
    same = (hidden.detach(), weight.detach())
    values = fused_linear_divergence(hidden, weight, *same, beta=beta, temperature=0.5)
    assert torch.equal(values, torch.zeros_like(values))
    for gradient in torch.autograd.grad(values.sum(), (hidden, weight)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_one_hot_teacher_gives_cross_entropy(device):
    z = make(4, 30, seed=1, device=device)
    target = torch.tensor([3, 0, 29, 7], device=device)
    teacher = torch.full_like(z, -torch.inf).scatter_(1, target[:, None], 0.0)
    values = divergence(z, teacher, beta=0.0)
    wanted = F.cross_entropy(z, target, reduction="none")
    assert error(values.detach(), wanted.detach()) < FP32
    pairs = zip(*(torch.autograd.grad(x.sum(), z) for x in (values, wanted)), strict=True)
    assert all(error(ours, theirs) < 2 * FP32 for ours, theirs in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.02, 0.3, 0.98, 1.0])
def test_sides_that_are_far_apart_have_the_value_of_fp64(beta, dtype, device):
    """From classes that only one side gives a share, 2 ** -90 and less of the other's, to equal."""
    spread = torch.tensor([[90.0], [30.0], [1.0], [1e-2]], device=device)
    z, teacher = ((make(4, 40, seed=i, device=device).detach() * spread).to(dtype) for i in (1, 2))
    z.requires_grad_()
    values = divergence(z, teacher, beta=beta)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    wide = z.detach().double().requires_grad_()
    wanted = divergence(wide, teacher.double(), beta=beta)
    (truth,) = torch.autograd.grad(wanted.sum(), wide)
    assert torch.allclose(values.detach().double(), wanted.detach(), rtol=2e-5, atol=1e-6)
    rounding = torch.finfo(dtype).eps * truth.abs().amax(1, keepdim=True)
    # In it logits of their size are taken from each other.
    allowed = rounding + 1e-6 * wanted.detach().clamp(min=1.0)[:, None]
    assert ((gradient - truth).abs() <= allowed).all()


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_a_class_that_both_exclude_counts_nothing(beta, device):
    z, teacher = (make(3, 9, seed=i, device=device).detach() for i in (1, 2))
    part = divergence(z, teacher, beta=beta)
    low = torch.full((3, 2), -torch.inf, device=device)
    wide = torch.cat((z, low), 1).requires_grad_()
    values = divergence(wide, torch.cat((teacher, low), 1), beta=beta)
    assert error(values.detach(), part) < FP32
    (gradient,) = torch.autograd.grad(values.sum(), wide)
    assert (gradient[:, 9:] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (True, True)], ids=str)
def test_gradients_of_the_student_alone_in_chunks(trained, reduction, device, monkeypatch):
    monkeypatch.setattr(linear_divergence, "chunk_tokens", lambda *_: 2)
    rows, kept = [], linear_divergence.divergence_rows
    monkeypatch.setattr(
        linear_divergence,
        "divergence_rows",
        lambda z, t, *rest, **more: rows.append((len(z), len(t))) or kept(z, t, *rest, **more),
    )
    tensors = layers(device=device)
    student = [x.requires_grad_(flag) for x, flag in zip(tensors[:2], trained, strict=True)]
    options = {"beta": 0.7, "temperature": 1.5, "reduction": reduction}
    loss = fused_linear_divergence(*tensors, **options).sum()
    loss.backward()
    wide = [x.detach().double() for x in tensors]
    truth = [x.requires_grad_(flag) for x, flag in zip(wide[:2], trained, strict=True)]
    fused_linear_divergence_ref(*wide, **options).sum().backward()
    for ours, true, flag in zip(student, truth, trained, strict=True):
        assert (ours.grad is not None) == flag
        assert not flag or error(ours.grad, true.grad) < 4 * FP32
    assert tensors[2].grad is tensors[3].grad is None
    # Never more than a chunk of either; a mean has all of it done in forward.
    assert set(rows) == {(2, 2), (1, 1)}
    assert len(rows) == (3 if reduction == "mean" else 6)


def test_no_gradient_costs_no_more_than_the_value(device):
    tensors = [x.detach() for x in layers(device=device)]
    assert not fused_linear_divergence(*tensors, reduction="mean").requires_grad
    hidden, *rest = layers(device=device)
    values = fused_linear_divergence(hidden, *rest)
    assert torch.equal(values.detach(), fused_linear_divergence(*tensors))


@plain_torch
def test_a_second_backward_of_a_sum_says_what_to_do():
    tensors = layers()
    loss = fused_linear_divergence(*tensors, reduction="sum")
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none'"):
        loss.backward()
    values = fused_linear_divergence(*tensors)
    first, second = (
        torch.autograd.grad(values.sum(), tensors[0], retain_graph=True)[0] for _ in range(2)
    )
    assert torch.equal(first, second)


BAD = {
    "vocabulary": ((20, 6), 19, r"teacher_weight must be floating \(20, G\)"),
    "tokens": ((4, 6), 20, r"teacher_hidden must be floating \(5, 6\)"),
    "width": ((5, 7), 20, r"teacher_hidden must be floating \(5, 6\)"),
}


@plain_torch
@pytest.mark.parametrize("what", BAD)
def test_a_teacher_that_does_not_fit_is_refused(what):
    shape, vocab, message = BAD[what]
    hidden, weight, _, other = layers()
    teacher = torch.zeros(5, 6) if what == "vocabulary" else torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        fused_linear_divergence(hidden, weight, teacher, other[:vocab])


@plain_torch
@pytest.mark.parametrize("options", [{"beta": 1.1}, {"temperature": 0.0}, {"beta": float("nan")}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        fused_linear_divergence(*layers(), **options)


@plain_torch
def test_it_compiles_into_one_graph(true_allocators):
    tensors = layers()
    wanted = torch.autograd.grad(fused_linear_divergence(*tensors, reduction="mean"), tensors[:2])
    function = torch.compile(fused_linear_divergence, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(function(*tensors, reduction="mean"), tensors[:2])
    for ours, true in zip(found, wanted, strict=True):
        assert error(ours, true) < 4 * FP32


@pytest.mark.gpu
@pytest.mark.parametrize("beta", BETAS)
def test_memory_on_a_gpu_is_a_chunk_of_both_logits(beta):
    rows, vocab = 4096, 65536
    tensors = [
        x.to("cuda", torch.bfloat16)
        for x in (torch.randn(rows, 512), torch.randn(vocab, 512) * 0.04)
    ]
    student = [x.clone().requires_grad_() for x in tensors]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fused_linear_divergence(*student, *tensors, beta=beta, reduction="mean").backward()
    transient = torch.cuda.max_memory_allocated() - before
    # Both logits are 1 GiB; the weight's gradient is 64 MiB.
    assert transient < 700 * 2**20
