"""Chunks of the fused loss: their sizes, what is never made, what is not computed."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from linear_heads import (
    FP32,
    assert_close,
    head,
    labels,
    make,
    not_interpreted,
    plain_torch,
    run,
    truth,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from liger_kernels.compare import FLOOR, INTERPRETER_FLOOR, error
from liger_kernels.ops import (
    backend,
    fused_linear_cross_entropy,
)
from liger_kernels.ops.fused_linear_cross_entropy import (
    fused_linear_cross_entropy_ref,
)
from liger_kernels.ops.losses import chunk_size
from liger_kernels.ops.losses.label_count import LabelCount

BF16 = (INTERPRETER_FLOOR if backend.INTERPRETED else FLOOR)[torch.bfloat16]


class Products(TorchDispatchMode):
    """Records the size of new memory, and the rows of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.shapes: list[tuple[int, ...]] = []
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.numel())
                self.shapes.append(tuple(t.shape))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows.append(out.shape[0])
        return out


# The benchmark's heads (tokens, width, vocabulary), and how many tokens a chunk has: of all, of the
# 40 % with labels, of all with a frozen head.
HEADS = {
    (8192, 4096, 128256): (2048, 2048, 768),
    (4096, 4096, 128256): (2048, 1024, 1024),
    (16384, 2048, 128256): (2048, 2048, 640),
    # Five chunks: four of 2048 take 12 MiB more than are allowed.
    (8192, 2304, 256000): (1792, 1920, 512),
    (4096, 4096, 32000): (2048, 1024, 2048),
}


# Of values per token: whatever has a gradient, within 512 MiB.
VALUES = {(8192, 4096, 128256): 2048, (4096, 2048, 151936): 1536, (8192, 2304, 256000): 1024}
H100 = {"device": torch.device("cuda"), "sms": 132}


@pytest.mark.parametrize(("shape", "chunks"), HEADS.items(), ids=str)
def test_chunks_of_the_benchmark(shape, chunks):
    tokens, width, vocab = shape
    sizes = width, vocab, torch.bfloat16
    found = [chunk_size.chunk_tokens(n, *sizes, **H100) for n in (tokens, tokens * 2 // 5)]
    found.append(chunk_size.chunk_tokens(tokens, *sizes, needs_weight=False, **H100))
    assert tuple(found) == chunks


@pytest.mark.parametrize(("shape", "chunk"), VALUES.items(), ids=str)
def test_chunks_of_values_per_token(shape, chunk):
    tokens, width, vocab = shape
    sizes = tokens, width, vocab, torch.bfloat16
    assert chunk_size.chunk_tokens(*sizes, needs_weight=None, **H100) == chunk
    # With the gradient of hidden, kept and returned.
    assert 2 * (chunk * vocab + tokens * width) <= 599 << 20


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize(("tokens", "width", "vocab"), HEADS)
def test_chunks_stay_within_memory(tokens, width, vocab, needs_weight):
    chunk = chunk_size.chunk_tokens(
        tokens, width, vocab, torch.bfloat16, needs_weight=needs_weight, **H100
    )
    num_bytes = 2 * (chunk * vocab + tokens * width)
    most = (1024 if vocab >= 256000 else 600) if needs_weight else 300
    assert num_bytes <= (most - 1) << 20
    if needs_weight:
        bf16, num_chunks = torch.bfloat16, -(-tokens // chunk)
        assert chunk_size.accumulator_dtype(bf16, bf16, num_chunks, H100["device"]) == bf16


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("width", [640, 2048, 4096])
@pytest.mark.parametrize("vocab", [32000, 151936])
def test_no_chunk_is_a_short_tail(vocab, width, needs_weight):
    """A tail of a few tokens would cost a whole reading of the weight, and of its gradient."""
    for tokens in (1, 127, 2049, 8192, 9000, 16385):
        chunk = chunk_size.chunk_tokens(
            tokens, width, vocab, torch.bfloat16, needs_weight=needs_weight, **H100
        )
        assert chunk % 128 == 0
        assert chunk < tokens + 128
        assert (tokens % chunk or chunk) >= min(tokens, chunk / 4)


def test_chunks_of_a_small_vocabulary_grow_to_keep_the_sum_in_bf16():
    sizes = 2048, 32000, torch.bfloat16
    for tokens, chunk in ((16384, 2048), (17000, 2176), (32768, 4096)):
        assert chunk_size.chunk_tokens(tokens, *sizes, **H100) == chunk
        frozen = chunk_size.chunk_tokens(tokens, *sizes, needs_weight=False, **H100)
        assert frozen <= 2048


def test_a_chunk_on_a_cpu_is_bounded_in_bytes():
    for tokens, vocab in itertools.product((1, 500, 100_000), (10, 49152, 262208)):
        chunk = chunk_size.chunk_tokens(tokens, 64, vocab, torch.float32, torch.device("cpu"))
        assert 1 <= chunk <= tokens + 8
        assert chunk * vocab * 4 <= 36 << 20


@pytest.mark.whole_card
@pytest.mark.usefixtures("three_tokens_a_chunk")
def test_case_12_bf16_weight_gradient_over_many_chunks(device):
    tensors = head(48, 16, 40, dtype=torch.bfloat16, device=device)
    target = labels(48, vocab=40, device=device)
    eager = run(fused_linear_cross_entropy_ref, tensors, target)
    ours = run(fused_linear_cross_entropy, tensors, target)
    wanted = truth(tensors, target)
    for mine, theirs, true in zip(ours, eager, wanted, strict=True):
        assert error(mine, true) < 2 * error(theirs, true) + BF16


# Memory and work


@not_interpreted
@pytest.mark.usefixtures("three_tokens_a_chunk")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_logits_are_never_made(reduction, device):
    tensors = head(60, 8, 50, device=device)
    target = labels(60, vocab=50, device=device)
    with Products() as made:
        dy = torch.ones(60, device=device) if reduction == "none" else None
        run(
            fused_linear_cross_entropy, tensors, target, dy, reduction=reduction, return_stats=False
        )
    # One chunk has 3 * 50 elements, the gradients 480 and 400, all logits 3000.
    assert max(made.sizes) <= 60 * 8


@not_interpreted
@pytest.mark.usefixtures("three_tokens_a_chunk")
def test_case_9_and_66_loss_alone_makes_no_gradient_buffer(device):
    tensors = head(60, 8, 50, device=device)
    target = labels(60, vocab=50, device=device)
    wanted = truth(tensors, target)[0]
    with Products() as made, torch.no_grad():
        loss = fused_linear_cross_entropy(tensors[0], tensors[1], target, bias=tensors[2])
    assert error(loss, wanted) < FP32
    # On a GPU rows begin at multiples of 16 elements.
    assert max(made.sizes) <= 3 * 64


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_case_10_gradients_exist_exactly_where_asked_for(flags, reduction, device):
    tensors = head(7, 16, 30, device=device)
    for tensor, flag in zip(tensors, flags, strict=True):
        tensor.requires_grad_(flag)
    target = labels(7, vocab=30, ignored=2, device=device)
    dy = make(7, seed=5, device=device).detach() if reduction == "none" else None
    ours = run(fused_linear_cross_entropy, tensors, target, dy, reduction=reduction)
    assert [grad is not None for grad in ours[1:]] == list(flags)
    assert_close(ours, truth(tensors, target, dy, reduction=reduction), 2 * FP32)


@pytest.mark.whole_card
@not_interpreted
@pytest.mark.usefixtures("three_tokens_a_chunk")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_case_11_frozen_weight_has_no_buffer_and_no_product(reduction, device):
    hidden, weight, _ = head(30, 8, 50, device=device)
    weight.requires_grad_(False)
    target = labels(30, vocab=50, device=device)
    dy = torch.ones(30, device=device) if reduction == "none" else None
    with Products() as made:
        run(fused_linear_cross_entropy, (hidden, weight, None), target, dy, reduction=reduction)
    assert (50, 8) not in made.shapes
    assert 50 not in made.rows


@not_interpreted
def test_ignored_tokens_are_left_out_before_the_product(device):
    hidden, weight, _ = head(400, 8, 50, device=device)
    target = labels(400, vocab=50, ignored=390, device=device)
    weight.requires_grad_(False)
    with Products() as made:
        ours = run(fused_linear_cross_entropy, (hidden, weight, None), target)
    assert set(made.rows) == {10}
    assert_close(ours, truth((hidden, weight, None), target), 2 * FP32)
    assert ours[1][:390].abs().max().item() == 0.0


class Counting:
    """Stands in for the event of a count on its way, and notes the wait among the operators."""

    def __init__(self, made: list[str]) -> None:
        self.made = made

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.made.append("wait")


@plain_torch
@pytest.mark.parametrize("ignored", [0, 20])
def test_a_gpu_has_something_to_do_while_its_host_waits(ignored, device, monkeypatch):
    """What needs no count is started before the wait; little is between that and the products."""
    tensors = head(40, 8, 50, device=device)
    target = labels(40, vocab=50, ignored=ignored, device=device)
    made = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def count(target, ignore_index):
        return LabelCount((target != ignore_index).sum(), Counting(made))

    module = importlib.import_module("liger_kernels.ops.fused_linear_cross_entropy")
    monkeypatch.setattr(module, "count_labels", count)
    with Names():
        ours = run(fused_linear_cross_entropy, tensors, target)
    assert_close(ours, truth(tensors, target), 2 * FP32)
    assert made.count("wait") == 1
    after = made[made.index("wait") + 1 :]
    between = set(after[: after.index("addmm")])
    views = {"alias", "expand", "slice", "t"}
    gathered = {"index", "index_select"} if ignored else set()
    assert between <= views | gathered | {"_local_scalar_dense", "empty", "fill_", "zeros"}
