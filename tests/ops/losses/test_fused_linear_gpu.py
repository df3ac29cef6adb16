"""The fused loss at sizes that need a GPU."""

from __future__ import annotations

import pytest
import torch
from linear_heads import FP32, HALF_DTYPES, assert_close, head, labels, run, truth

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import (
    count_labels,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
)
from liger_kernels.ops.fused_linear_cross_entropy import (
    fused_linear_cross_entropy_ref,
)
from liger_kernels.ops.losses import linear_loss

# On a GPU


def gpu_head(tokens: int, width: int, vocab: int, dtype=torch.bfloat16):
    """hidden and weight drawn on the GPU, since a large head takes long on the host."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, width, device="cuda", dtype=dtype) * width**-0.5
    return hidden, weight.requires_grad_()


@pytest.mark.gpu
def test_case_12_bf16_weight_gradient_of_many_chunks_is_as_good_as_one_product(monkeypatch):
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 128)
    hidden, weight = gpu_head(4096, 512, 32000)
    target = labels(4096, vocab=32000, device="cuda")
    ours = run(fused_linear_cross_entropy, (hidden, weight, None), target)[2]
    eager = run(fused_linear_cross_entropy_ref, (hidden, weight, None), target)[2]
    wanted = truth((hidden, weight, None), target)[2]
    assert error(ours, wanted) <= 1.25 * error(eager, wanted)


@pytest.mark.gpu
def test_case_12_bf16_weight_gradient_of_eight_chunks_stays_within_twice_eagers(monkeypatch):
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 512)
    hidden, weight = gpu_head(4096, 512, 32000)
    target = labels(4096, vocab=32000, device="cuda")
    ours = run(fused_linear_cross_entropy, (hidden, weight, None), target)[2]
    eager = run(fused_linear_cross_entropy_ref, (hidden, weight, None), target)[2]
    wanted = truth((hidden, weight, None), target)[2]
    assert (ours - wanted).norm() <= 2 * (eager - wanted).norm()


@pytest.mark.gpu
def test_case_11_frozen_weight_saves_its_gradient():
    hidden, weight = gpu_head(1024, 4096, 128256)
    target = labels(1024, vocab=128256, device="cuda")
    peaks, grads = [], []
    for is_frozen in (False, True):
        weight.requires_grad_(not is_frozen)
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_linear_cross_entropy(hidden, weight, target).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        grads.append(hidden.grad)
        assert (weight.grad is None) == is_frozen
    assert peaks[0] - peaks[1] > 0.95 * weight.numel() * weight.element_size()
    assert torch.equal(*grads)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [1000, 70001])
def test_case_31_whether_each_label_is_the_likeliest(vocab):
    hidden, weight = gpu_head(300, 64, vocab, dtype=torch.float32)
    likeliest = (hidden @ weight.t()).argmax(-1)
    target = labels(300, vocab=vocab, device="cuda")
    target[::3] = likeliest[::3]
    target[:40] = -100
    _, stats = fused_linear_cross_entropy(hidden, weight, target, return_stats=True)
    assert torch.equal(stats.correct.bool(), likeliest == target)
    assert stats.correct.sum() >= 80


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [65535, 65536, 65537, 102400, 262208])
def test_case_40_any_vocabulary(vocab):
    tensors = (*gpu_head(3, 64, vocab, dtype=torch.float32), None)
    target = torch.tensor([0, vocab - 1, vocab // 2], device="cuda")
    ours = run(fused_linear_cross_entropy, tensors, target)
    eager = run(fused_linear_cross_entropy_ref, tensors, target)
    wanted = truth(tensors, target)
    for mine, theirs, true in zip(ours[:3], eager[:3], wanted[:3], strict=True):
        assert error(mine, true) <= 2 * error(theirs, true) + FP32


@pytest.mark.whole_card
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 4096])
def test_case_43_few_and_many_tokens_of_a_large_head(tokens):
    hidden, weight = gpu_head(tokens, 4096, 128256)
    target = labels(tokens, vocab=128256, device="cuda")
    loss, dx, dw, _ = run(fused_linear_cross_entropy, (hidden, weight, None), target)
    # Eager fp32 as the truth: fp64 products of this size would take minutes.
    wanted = run(
        fused_linear_cross_entropy_ref, (hidden, weight, None), target, dtype=torch.float32
    )
    assert error(loss, wanted[0]) < FLOOR[torch.bfloat16]
    assert error(dx, wanted[1]) < 4 * FLOOR[torch.bfloat16]
    assert error(dw, wanted[2]) < 4 * FLOOR[torch.bfloat16]


@pytest.mark.whole_card
@pytest.mark.gpu
def test_case_47_one_chunk_past_two_to_the_31_logits(monkeypatch):
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 16400)
    hidden, weight = gpu_head(16400, 64, 131072)
    weight.requires_grad_(False)
    target = labels(16400, vocab=131072, device="cuda")
    loss, dx, *_ = run(fused_linear_cross_entropy, (hidden, weight, None), target, reduction="sum")
    last = hidden.detach()[-64:].requires_grad_()
    few = run(fused_linear_cross_entropy, (last, weight, None), target[-64:], reduction="sum")
    assert loss.isfinite()
    # The library may choose another algorithm for fewer rows.
    assert error(dx[-64:], few[1]) < 3 * FLOOR[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50257, 50304])
def test_odd_vocabulary_on_a_gpu(vocab):
    hidden, weight = gpu_head(300, 768, vocab)
    target = labels(300, vocab=vocab, ignored=40, device="cuda")
    tensors = (hidden, weight, None)
    ours = run(fused_linear_cross_entropy, tensors, target)
    eager = run(fused_linear_cross_entropy_ref, tensors, target)
    wanted = truth(tensors, target)
    for mine, theirs, true in zip(ours[:3], eager[:3], wanted[:3], strict=True):
        assert error(mine, true) < 2 * error(theirs, true) + FLOOR[torch.bfloat16]


@pytest.mark.whole_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_DTYPES], ids=str)
@pytest.mark.parametrize("has_count", [False, True])
def test_nothing_but_the_count_is_waited_for(has_count, dtype, monkeypatch):
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 16)
    tensors = head(96, 32, 1000, dtype=dtype, device="cuda")
    hidden, weight, bias = tensors
    target = labels(96, vocab=1000, ignored=40, device="cuda")
    class_weight = torch.rand(1000, device="cuda")
    ones = torch.ones(96, device="cuda")

    def step():
        count = count_labels(target) if has_count else None
        loss, _ = fused_linear_cross_entropy(
            hidden, weight, target, bias=bias, class_weight=class_weight, return_stats=True,
            label_count=count,
        )  # fmt: skip
        (loss * 2.0).backward()
        normalizer = target.ne(-100).sum()
        fused_linear_cross_entropy(hidden, weight, target, normalizer=normalizer).backward()
        rows = fused_linear_cross_entropy(
            hidden, weight, target, reduction="none", label_count=count
        )
        rows.backward(ones)
        logprob, entropy = fused_linear_logprobs(hidden, weight, target.clamp(min=0))
        (logprob - entropy).backward(ones)

    step()
    wanted = [t.grad.clone() for t in tensors]
    for t in tensors:
        t.grad = None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(t.grad, grad) for t, grad in zip(tensors, wanted, strict=True))


@pytest.mark.gpu
def test_cuda_graph_replays_with_other_labels():
    hidden, weight, bias = head(64, 32, 1000, dtype=torch.bfloat16, device="cuda")
    target = labels(64, vocab=1000, ignored=40, device="cuda")

    def step():
        loss = fused_linear_cross_entropy(hidden, weight, target, bias=bias)
        return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    # Other labels, and another number of them: nothing was left out for good.
    target.copy_(labels(64, vocab=1000, seed=9, ignored=3))
    graph.replay()
    torch.cuda.synchronize()
    wanted = truth((hidden, weight, bias), target)
    assert_close(captured, wanted, 3 * FLOOR[torch.bfloat16])
