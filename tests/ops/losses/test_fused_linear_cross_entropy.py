"""The fused loss and log-probabilities beyond test_ops.py: chunks, memory, dtypes, autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_heads import (
    FP32,
    HALF_DTYPES,
    assert_close,
    head,
    labels,
    make,
    not_interpreted,
    plain_torch,
    run,
    truth,
)
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, compare, error
from liger_kernels.ops import (
    count_labels,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
)
from liger_kernels.ops.fused_linear_cross_entropy import OP
from liger_kernels.ops.fused_linear_logprobs import OP as LOGPROBS
from liger_kernels.ops.fused_linear_logprobs import fused_linear_logprobs_ref
from liger_kernels.ops.losses.label_count import LabelCount

# Chunks


@pytest.mark.usefixtures("three_tokens_a_chunk")
@pytest.mark.parametrize(
    "dtype",
    # The sums over chunks are torch's: narrow ones need no interpreter.
    [torch.float32, *(pytest.param(dtype, marks=plain_torch) for dtype in HALF_DTYPES)],
    ids=str,
)
@pytest.mark.parametrize("op", [OP, LOGPROBS], ids=lambda op: op.name)
def test_every_case_again_in_chunks_of_three_tokens(op, dtype, device):
    # Large vocabularies were compared in one chunk already.
    for case in op.cases:
        if not case.needs_gpu and case.shape[-1] < 1000:
            result = compare(op, case, dtype, device)
            assert result.ok, str(result)


def test_case_3_all_labels_ignored_gives_zero(device):
    for reduction in ("mean", "sum", "none"):
        tensors = head(8, 16, 32, device=device)
        target = torch.full((8,), -100, device=device)
        dy = torch.ones(8, device=device) if reduction == "none" else None
        for value in run(fused_linear_cross_entropy, tensors, target, dy, reduction=reduction):
            assert value.abs().max().item() == 0.0


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_case_44_no_tokens(shape, device):
    _, weight, bias = head(1, 16, 32, device=device)
    hidden = torch.zeros(*shape, 16, device=device, requires_grad=True)
    target = torch.zeros(shape, dtype=torch.int64, device=device)
    loss = fused_linear_cross_entropy(hidden, weight, target, bias=bias)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.abs().max().item() == bias.grad.abs().max().item() == 0.0
    nll = fused_linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none")
    assert nll.shape == shape


# Options


@pytest.mark.parametrize(
    "option",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 2.0},
        {"scale": 0.5},
        {"class_weight": torch.arange(1.0, 31.0)},
        {"ignore_index": 3},
        {"normalizer": 3},
        {"reduction": "sum"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_case_33_no_option_is_dropped(option, device):
    tensors = head(9, 16, 30, device=device)
    target = labels(9, vocab=30, device=device)
    target[0] = 3
    option = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in option.items()}
    plain = run(fused_linear_cross_entropy, tensors, target)
    ours = run(fused_linear_cross_entropy, tensors, target, **option)
    assert error(ours[0], plain[0]) > 1e-3
    assert_close(ours, truth(tensors, target, **option), 2 * FP32)


def test_case_33_unknown_option_raises():
    hidden, weight, _ = head(2, 4, 8)
    with pytest.raises(TypeError, match="lse_square_scale"):
        fused_linear_cross_entropy(hidden, weight, labels(2, vocab=8), lse_square_scale=0.1)


@pytest.mark.parametrize("is_flat", [True, False])
def test_case_38_bias_counts_once_for_every_class(is_flat, device):
    tensors = head(8, 16, 1000, device=device)
    if is_flat:
        tensors[2] = torch.full((1000,), 3.0, device=device, requires_grad=True)
    target = labels(8, vocab=1000, device=device)
    ours = run(fused_linear_cross_entropy, tensors, target)
    assert ours[0].item() > 0.0
    assert_close(ours, truth(tensors, target), 2 * FP32)


@pytest.mark.parametrize("kind", ["int", "tensor", "vector"])
def test_normalizer_adds_micro_batches_up_to_the_whole(kind, device):
    tensors = head(10, 16, 30, device=device)
    target = labels(10, vocab=30, ignored=3, device=device)
    normalizer = {
        "int": 7,
        "tensor": torch.tensor(7, device=device),
        "vector": torch.tensor([7.0]),
    }[kind]
    whole = run(fused_linear_cross_entropy, tensors, target)
    parts = [
        run(
            fused_linear_cross_entropy,
            (tensors[0][part], *tensors[1:]),
            target[part],
            normalizer=normalizer,
        )
        for part in (slice(0, 4), slice(4, 10))
    ]
    assert error(parts[0][0] + parts[1][0], whole[0]) < FP32
    assert error(parts[0][2] + parts[1][2], whole[2]) < 2 * FP32


def test_batch_without_labels_and_a_normalizer_of_zero_is_zero(device):
    tensors = head(3, 4, 8, device=device)
    target = torch.full((3,), -100, device=device)
    zero = torch.zeros((), dtype=torch.int64, device=device)
    for normalizer in (0, zero):
        for value in run(fused_linear_cross_entropy, tensors, target, normalizer=normalizer):
            assert value.abs().max().item() == 0.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_label_count_is_an_upper_bound(reduction, device):
    tensors = head(16, 16, 30, device=device)
    target = labels(16, vocab=30, ignored=10, device=device)
    dy = torch.ones(16, device=device) if reduction == "none" else None
    wanted = truth(tensors, target, dy, reduction=reduction)
    count = count_labels(target)
    assert count.wait() == count.wait() == 6
    for bound in (count, LabelCount(6), LabelCount(8), LabelCount(1000)):
        ours = run(
            fused_linear_cross_entropy, tensors, target, dy, reduction=reduction, label_count=bound
        )
        assert_close(ours, wanted, 2 * FP32)
    for bound in (5, 0):
        loss, *grads = run(
            fused_linear_cross_entropy,
            tensors,
            target,
            dy,
            reduction=reduction,
            label_count=LabelCount(bound),
        )
        assert loss.isnan().all()
        assert bound == 0 or all(grad.isnan().any() for grad in grads)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0])
def test_stats_of_each_token(ignore_index, device):
    hidden, weight, bias = head(12, 16, 30, device=device)
    target = labels(12, vocab=30, device=device)
    target[:3] = ignore_index
    # Row 4 has its label as the largest logit; row 5 shares it with an earlier class.
    with torch.no_grad():
        hidden[4] = 20 * weight[target[4]]
        weight[20] = weight[10]
        hidden[5] = 50 * weight[10]
        bias[:] = 0.0
        target[5] = 20
    loss, stats = fused_linear_cross_entropy(
        hidden, weight, target, bias=bias, ignore_index=ignore_index, label_smoothing=0.1,
        return_stats=True,
    )  # fmt: skip
    log_p = F.linear(hidden, weight, bias).detach().double().log_softmax(-1)
    valid = target != ignore_index
    nll = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0] * valid
    assert error(stats.nll, nll) < FP32
    assert error(stats.logprob, -nll) < FP32
    assert error(stats.entropy, -(log_p.exp() * log_p).sum(-1) * valid) < FP32
    assert torch.equal(stats.correct, (log_p.argmax(-1) == target) & valid)
    assert stats.correct[4].item()
    assert not stats.correct[5].item()
    assert loss.requires_grad
    assert not any(value.requires_grad for value in stats)


# Dtypes


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_case_8_autocast_gives_gradients_in_each_tensors_dtype(dtype, has_bias, device):
    hidden, weight, bias = head(8, 16, 32, device=device)
    tensors = (hidden, weight, bias if has_bias else None)
    target = labels(8, vocab=32, ignored=1, device=device)

    def eager(hidden, weight, target, bias=None):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)

    wanted = truth(tensors, target)
    with torch.autocast(torch.device(device).type, dtype=dtype):
        ours = run(fused_linear_cross_entropy, tensors, target)
        theirs = run(eager, tensors, target)
    for mine, other, true in zip(ours, theirs, wanted, strict=True):
        assert (mine is None) == (true is None)
        if mine is not None:
            assert mine.dtype == torch.float32
            assert error(mine, true) < 2 * error(other, true) + FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_case_80_mixed_dtypes_compute_in_the_weights(hidden_dtype, weight_dtype, reduction, device):
    hidden, weight, _ = head(8, 16, 32, device=device)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    weight = weight.detach().to(weight_dtype)
    target = labels(8, vocab=32, device=device)
    dy = make(8, seed=6, device=device).detach() if reduction == "none" else None
    tensors = (hidden, weight, None)
    loss, dx, dw, _ = run(fused_linear_cross_entropy, tensors, target, dy, reduction=reduction)
    wanted = truth(tensors, target, dy, reduction=reduction)
    assert loss.dtype == torch.float32
    assert dx.dtype == hidden_dtype
    assert dw is None
    limit = 3 * FLOOR[torch.bfloat16]
    assert_close((loss, dx), wanted[:2], limit)


def test_fp16_gradients_survive_a_large_count(device):
    # Mixed precision multiplies the loss by 2^16; dividing by the count first would lose all.
    tensors = head(8, 16, 32, dtype=torch.float16, device=device)
    target = labels(8, vocab=32, device=device)
    scale = torch.tensor(2.0**16, device=device)
    ours = run(fused_linear_cross_entropy, tensors, target, scale, normalizer=10**7)
    wanted = truth(tensors, target, scale, normalizer=10**7)
    assert_close(ours[1:], wanted[1:], 4 * FLOOR[torch.float16])


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_case_91_inside_a_checkpoint_under_autocast(use_reentrant, reduction, device):
    hidden, weight, _ = head(8, 16, 32, device=device)
    target = labels(8, vocab=32, ignored=2, device=device)

    def loss(hidden, weight):
        # An in-place op before the loss, as models have.
        doubled = (hidden * 1.0).mul_(2.0)
        return fused_linear_cross_entropy(doubled, weight, target, reduction=reduction).sum()

    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        wanted = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
        again = checkpoint(loss, hidden, weight, use_reentrant=use_reentrant)
    again.backward()
    for leaf, grad in zip((hidden, weight), wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_case_46_differentiating_twice_raises(reduction, device):
    hidden, weight, _ = head(4, 8, 16, device=device)
    target = labels(4, vocab=16, device=device)
    loss = fused_linear_cross_entropy(hidden, weight, target, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_second_backward_raises_for_a_mean_and_repeats_for_none(device):
    hidden, weight, _ = head(4, 8, 16, device=device)
    target = labels(4, vocab=16, device=device)
    loss = fused_linear_cross_entropy(hidden, weight, target)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with pytest.raises(RuntimeError, match="gave them away in the first backward"):
        loss.backward()
    loss = fused_linear_cross_entropy(hidden, weight, target, reduction="none").sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, weight)[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inputs_and_incoming_gradient_stay_as_they_are(reduction, device):
    tensors = head(6, 16, 32, device=device)
    before = [t.detach().clone() for t in tensors]
    target = labels(6, vocab=32, ignored=1, device=device)
    dy = torch.full((6,) if reduction == "none" else (), 0.5, device=device)
    hidden, weight, bias = tensors
    loss = fused_linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
    loss.backward(dy)
    assert all(torch.equal(t, old) for t, old in zip(tensors, before, strict=True))
    assert torch.equal(dy, torch.full_like(dy, 0.5))


def test_case_5_and_37_rows_scale_by_their_own_gradient_of_any_stride(device):
    tensors = head(8, 16, 32, device=device)
    target = labels(8, vocab=32, ignored=1, device=device)
    for dy in (torch.arange(8.0, device=device), torch.ones((), device=device).expand(8)):
        ours = run(fused_linear_cross_entropy, tensors, target, dy, reduction="none")
        assert_close(ours, truth(tensors, target, dy, reduction="none"), 2 * FP32)


def test_logprobs_by_either_output_alone_and_twice(device):
    hidden, weight, _ = head(6, 16, 32, device=device)
    ids = labels(6, vocab=32, device=device)
    for i in range(2):
        y = fused_linear_logprobs(hidden, weight, ids, temperature=0.5)[i]
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
        true = fused_linear_logprobs_ref(*wide, ids, temperature=0.5)[i]
        dy = make(6, seed=7, device=device).detach()
        wanted = torch.autograd.grad(true, wide, dy.double())
        first = torch.autograd.grad(y, (hidden, weight), dy, retain_graph=True)
        second = torch.autograd.grad(y, (hidden, weight), dy)
        assert_close(first, wanted, 2 * FP32)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@not_interpreted
def test_compiles_into_one_graph(device):
    hidden, weight, bias = head(6, 16, 32, device=device)
    target = labels(6, vocab=32, ignored=2, device=device)

    def loss(hidden, weight, bias, target):
        mean = fused_linear_cross_entropy(hidden * 2, weight, target, bias=bias)
        per_token, stats = fused_linear_cross_entropy(
            hidden, weight, target, reduction="none", return_stats=True
        )
        logprob, entropy = fused_linear_logprobs(hidden, weight, target.clamp(min=0))
        return mean + (per_token * stats.entropy + logprob - 0.1 * entropy).sum()

    tensors = (hidden, weight, bias)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert error(compiled(*tensors, target), loss(*tensors, target)) < FP32
    wanted = torch.autograd.grad(loss(*tensors, target), tensors)
    assert_close(torch.autograd.grad(compiled(*tensors, target), tensors), wanted, 2 * FP32)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"reduction": "sum", "normalizer": 3}, "normalizer is for reduction='mean'"),
        ({"normalizer": -1}, "normalizer must not be negative, got -1"),
        ({"normalizer": "3"}, "normalizer must be a number"),
        ({"normalizer": torch.ones(2)}, r"normalizer must be one number, got \(2,\)"),
        ({"class_weight": torch.ones(3)}, r"class_weight must be floating \(8,\)"),
        ({"bias": torch.ones(3)}, r"bias must be floating \(8,\)"),
        ({"hidden": torch.ones(2, 5)}, r"hidden must be floating \(..., 4\) as weight's width"),
        ({"weight": torch.ones(8)}, r"weight must be floating \(V, H\)"),
        ({"target": torch.tensor([1, 8])}, "target holds 8; labels go from 0 to 7"),
        ({"target": torch.tensor([1])}, r"target must be \(2,\), got \(1,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    hidden, weight, _ = head(2, 4, 8)
    given = {"hidden": hidden, "weight": weight, "target": labels(2, vocab=8), **arguments}
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**given)


def test_a_temperature_of_any_type_is_the_number_it_holds(device):
    """One of a type that Triton does not take would stay in what is remembered of the launch."""
    hidden, weight, _ = head(6, 16, 32, device=device)
    ids = labels(6, vocab=32, device=device)
    wanted, _ = fused_linear_logprobs(hidden, weight, ids, temperature=2.0)
    for temperature in (np.float32(2.0), torch.tensor(2.0), 2, 2.0):
        ours, _ = fused_linear_logprobs(hidden, weight, ids, temperature=temperature)
        assert torch.equal(ours, wanted), repr(temperature)


def test_logprobs_name_what_is_wrong():
    hidden, weight, _ = head(2, 4, 8)
    with pytest.raises(ValueError, match="ids holds -100; labels go from 0 to 7"):
        fused_linear_logprobs(hidden, weight, torch.tensor([1, -100]))
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0.0"):
        fused_linear_logprobs(hidden, weight, torch.tensor([1, 2]), temperature=0.0)
