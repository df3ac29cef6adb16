"""Contracts of the losses and of "no worse than eager" that hold for any size, scale or context."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from liger_kernels.compare import FLOOR, check_op, compare, error
from liger_kernels.ops import (
    backend,
    count_labels,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
)
from liger_kernels.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_ref
from liger_kernels.ops.fused_linear_logprobs import fused_linear_logprobs_ref
from liger_kernels.ops.losses import linear_loss
from liger_kernels.ops.registry import OPS

pytestmark = pytest.mark.skipif(
    backend.INTERPRETED, reason="what is shown is the host's; the interpreter would take minutes"
)
BF16, FP16 = torch.bfloat16, torch.float16


def head(tokens: int, width: int, vocab: int, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * width**-0.5
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return *leaves, target.to(device)


# The sum over chunks


@pytest.mark.parametrize("direction", ["any", "one"])
@pytest.mark.parametrize("num_chunks", [1, 4, 5, 9, 64, 512])
def test_case_260_error_of_a_bf16_weight_gradient_does_not_grow_with_chunks(
    num_chunks, direction, device, monkeypatch
):
    """Sums in bf16 lose what is small beside them: of like numbers, most of the later ones."""
    tokens, vocab = 512, 16
    hidden, weight, target = head(tokens, 8, vocab, BF16, device)
    if direction == "one":
        with torch.no_grad():
            hidden.abs_()
            target.fill_(3)
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: tokens // num_chunks)

    def gradient(function, dtype=BF16):
        leaf = weight.detach().to(dtype).requires_grad_()
        function(hidden.detach().to(dtype), leaf, target, reduction="sum").backward()
        return leaf.grad

    true = gradient(fused_linear_cross_entropy_ref, torch.float64)
    eager = error(gradient(fused_linear_cross_entropy_ref), true)
    ours = error(gradient(fused_linear_cross_entropy), true)
    assert ours <= 2 * eager + FLOOR[BF16]


# Autocast


@pytest.mark.parametrize("during_backward", [BF16, FP16], ids=str)
@pytest.mark.parametrize("during_forward", [None, BF16, FP16], ids=str)
@pytest.mark.parametrize("op", ["mean", "none", "logprobs"])
def test_case_261_autocast_around_backward_changes_no_gradient(
    op, during_forward, during_backward, device, monkeypatch
):
    """Forward decides the dtype of all products; backward may run in another context."""
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 8)
    hidden, weight, target = head(24, 8, 40, device=device)
    if op != "logprobs":
        # So many that the others are gathered.
        target[::2] = -100

    def gradients(in_backward):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        kind = device.type
        with torch.autocast(kind, during_forward, enabled=during_forward is not None):
            if op == "logprobs":
                loss = sum(y.sum() for y in fused_linear_logprobs(*leaves, target))
            else:
                loss = fused_linear_cross_entropy(*leaves, target, reduction=op).sum()
        with torch.autocast(kind, in_backward, enabled=in_backward is not None):
            return torch.autograd.grad(loss, leaves)

    for found, wanted in zip(gradients(during_backward), gradients(None), strict=True):
        assert torch.equal(found, wanted)


# fp16


@pytest.mark.parametrize("exponent", [-40, -24, -12, 0, 12, 24, 40])
@pytest.mark.parametrize("op", ["none", "logprob", "entropy", "both"])
def test_case_262_fp16_gradients_per_token_are_as_precise_at_any_scale(op, exponent, device):
    """Mixed precision multiplies a loss by thousands, a mean divides it: fp16 holds neither."""
    hidden, weight, target = head(12, 16, 40, device=device)
    scale = torch.randn(2, 12, generator=torch.Generator().manual_seed(1)).to(device)

    def gradients(loss_of, dtype, power):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight)]
        given = scale.to(dtype) * 2.0**power
        with torch.autocast(device.type, FP16, enabled=dtype != torch.float64):
            losses = loss_of(*leaves, target)
        wanted = {"logprob": (0,), "entropy": (1,), "both": (0, 1)}.get(op, (0,))
        if op == "none":
            losses = (losses,)
        kept = [losses[i] for i in wanted]
        return torch.autograd.grad(kept, leaves, [given[i].to(losses[i].dtype) for i in wanted])

    functions = (fused_linear_logprobs, fused_linear_logprobs_ref)
    if op == "none":
        functions = [
            lambda *args, f=f: f(*args, reduction="none")
            for f in (fused_linear_cross_entropy, fused_linear_cross_entropy_ref)
        ]
    ours = gradients(functions[0], torch.float32, exponent)
    usual = gradients(functions[0], torch.float32, 0)
    for mine, same, true in zip(
        ours, usual, gradients(functions[1], torch.float64, 0), strict=True
    ):
        # fp16 rounds hidden, weight, logits and their gradient.
        assert error(mine * 2.0**-exponent, true) <= 8 * FLOOR[FP16]
        # A power of two costs no digit.
        assert torch.equal(mine * 2.0**-exponent, same)


# Counts of labels


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_case_264_a_label_count_is_of_its_ignore_index(ignore_index, reduction, device):
    hidden, weight, target = head(40, 8, 16, device=device)
    target[::4] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}

    def outcome(**count):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        loss = fused_linear_cross_entropy(*leaves, target, **options, **count)
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    right = count_labels(target, ignore_index)
    assert right.wait() == (target != ignore_index).sum()
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    loss = fused_linear_cross_entropy_ref(*wide, target, **options)
    wanted = loss.detach(), *torch.autograd.grad(loss.sum(), wide)
    for found in (outcome(), outcome(label_count=right)):
        for value, true in zip(found, wanted, strict=True):
            assert error(value, true) <= 1e-5


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 1000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_case_264_no_row_is_computed_that_this_ignore_index_ignores(
    ignore_index, reduction, device, monkeypatch
):
    hidden, weight, target = head(40, 8, 16, device=device)
    target[::2] = ignore_index
    computed = []
    loss_rows = linear_loss.loss_rows
    monkeypatch.setattr(
        linear_loss,
        "loss_rows",
        lambda z, *rest, **more: computed.append(z.shape[0]) or loss_rows(z, *rest, **more),
    )
    fused_linear_cross_entropy(
        hidden, weight, target, ignore_index=ignore_index, reduction=reduction
    )
    assert sum(computed) == (target != ignore_index).sum()


def test_case_264_a_count_under_another_ignore_index_is_never_a_wrong_number(device):
    hidden, weight, target = head(40, 8, 16, device=device)
    target[::4] = 3
    for counted, ignored in ((3, -100), (3, 5), (-100, 3), (5, 3)):
        true = fused_linear_cross_entropy_ref(hidden, weight, target, ignore_index=ignored)
        count = count_labels(target, counted)
        loss = fused_linear_cross_entropy(
            hidden, weight, target, ignore_index=ignored, label_count=count
        )
        if count.wait() < (target != ignored).sum():
            assert loss.isnan()
        else:
            assert error(loss.detach(), true.detach()) <= 1e-5


# No worse than eager


def off_by(factor: float, dtype: torch.dtype):
    """rms_norm with an error of factor times eager's, less the floor's part, in its output."""
    op = OPS["rms_norm"]
    case, cpu = op.cases[1], torch.device("cpu")
    sample = op.sample(case, dtype, cpu, torch.Generator().manual_seed(0))
    with torch.no_grad():
        eager = op.reference(*sample.args, **sample.kwargs)
        wide = [x.double() for x in sample.args]
        true = op.reference(*wide, **sample.kwargs)
    by_eager = error(eager, true)
    assert by_eager > 0

    def function(*args, **kwargs):
        y = op.reference(*args, **kwargs)
        # From the truth, in the wider dtype of a comparison: no rounding adds to it.
        shift = factor * by_eager * true.abs().max()
        moved = (true + shift).to(y.dtype)
        return y + (moved - y).detach()

    return dataclasses.replace(op, function=function), case


@pytest.mark.parametrize("floor", [0.0, 1e-9])
@pytest.mark.parametrize(
    ("factor", "ok"), [(0.5, True), (1.5, True), (3.0, False), (10.0, False), (30.0, False)]
)
def test_case_270_twice_eagers_error_is_all_that_is_allowed(factor, ok, floor, monkeypatch):
    import liger_kernels.compare as module

    # Without the floor, which is a rounding more than eager's, the factor alone decides.
    monkeypatch.setattr(module, "FLOOR", dict.fromkeys(FLOOR, floor))
    monkeypatch.setattr(module, "INTERPRETER_FLOOR", dict.fromkeys(FLOOR, floor))
    op, case = off_by(factor, torch.float16)
    result = compare(op, case, torch.float16)
    output = next(part for part in result.errors if part.name == "output 0")
    assert output.limit == pytest.approx(2 * output.eager + floor)
    assert output.ok == ok
    assert result.ok == ok


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16], ids=str)
@pytest.mark.parametrize(("floors", "ok"), [(0.0, True), (4.0, False)])
def test_case_270_where_eager_is_exact_the_floor_is_all_that_is_allowed(floors, ok, dtype):
    op = OPS["swiglu"]
    shift = floors * FLOOR[dtype]

    def reference(gate, up):
        return gate + 0 * up

    def function(gate, up):
        return reference(gate, up) + shift * gate.detach().abs().max()

    moved = dataclasses.replace(op, reference=reference, function=function)
    result = compare(moved, op.cases[0], dtype)
    output = next(part for part in result.errors if part.name == "output 0")
    assert (output.eager, output.limit) == (0.0, FLOOR[dtype])
    assert output.ok == result.ok == ok, str(result)


def test_case_270_check_op_refuses_what_compare_refuses(monkeypatch):
    op, case = off_by(200.0, torch.float32)
    monkeypatch.setitem(OPS, "rms_norm", op)
    result = check_op("rms_norm", case=case, dtype=torch.float32)
    assert not result.ok
    assert "output 0 is off by" in result.reason
