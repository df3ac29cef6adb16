"""The fused loss and log-probabilities beyond test_ops.py: chunks, memory, dtypes, autograd."""

from __future__ import annotations

import importlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from liger_kernels.compare import FLOOR, INTERPRETER_FLOOR, compare, error
from liger_kernels.ops import (
    backend,
    count_labels,
    fused_linear_cross_entropy,
    fused_linear_logprobs,
)
from liger_kernels.ops.fused_linear_cross_entropy import (
    LOGPROBS,
    OP,
    fused_linear_cross_entropy_ref,
    fused_linear_logprobs_ref,
)
from liger_kernels.ops.losses import chunk_size, linear_loss
from liger_kernels.ops.losses.label_count import LabelCount

HALF_DTYPES = (torch.float16, torch.bfloat16)
FP32 = FLOOR[torch.float32]
BF16 = (INTERPRETER_FLOOR if backend.INTERPRETED else FLOOR)[torch.bfloat16]

not_interpreted = pytest.mark.skipif(
    backend.INTERPRETED, reason="the interpreter copies what kernels are given"
)

plain_torch = pytest.mark.skipif(backend.INTERPRETED, reason="slow in the interpreter")


@pytest.fixture
def three_tokens_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: 3)


def make(*shape: int, seed: int, spread: float = 1.0, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread
    return x.to(device=device, dtype=dtype).requires_grad_()


def head(tokens: int, width: int, vocab: int, *, dtype=torch.float32, device="cpu"):
    """hidden, weight and bias, all leaves that require grad, with logits of about one unit."""
    return [
        make(tokens, width, seed=1, dtype=dtype, device=device),
        make(vocab, width, seed=2, spread=width**-0.5, dtype=dtype, device=device),
        make(vocab, seed=3, dtype=dtype, device=device),
    ]


def labels(*shape: int, vocab: int, seed: int = 4, device="cpu", ignored: int = 0):
    target = torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
    target.view(-1)[:ignored] = -100
    return target.to(device)


def run(function, tensors, target, dy=None, dtype=None, **options):
    """The loss and the gradients of hidden, weight and bias; fresh leaves keep the flags."""
    hidden, weight, bias = (
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for t in tensors
    )
    loss = function(hidden, weight, target, bias=bias, **options)
    if loss.requires_grad:
        loss.backward(None if dy is None else dy.to(loss.dtype))
    return [loss.detach(), *(None if t is None else t.grad for t in (hidden, weight, bias))]


def truth(tensors, target, dy=None, **options):
    if "class_weight" in options:
        options["class_weight"] = options["class_weight"].double()
    return run(fused_linear_cross_entropy_ref, tensors, target, dy, torch.float64, **options)


def assert_close(ours, wanted, limit: float) -> None:
    for value, true in zip(ours, wanted, strict=True):
        assert (value is None) == (true is None)
        if value is not None:
            assert error(value, true) < limit


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
H100 = {"device": torch.device("cuda"), "sms": 132}


@pytest.mark.parametrize(("shape", "chunks"), HEADS.items(), ids=str)
def test_chunks_of_the_benchmark(shape, chunks):
    tokens, width, vocab = shape
    sizes = width, vocab, torch.bfloat16
    found = [chunk_size.chunk_tokens(n, *sizes, **H100) for n in (tokens, tokens * 2 // 5)]
    found.append(chunk_size.chunk_tokens(tokens, *sizes, needs_weight=False, **H100))
    assert tuple(found) == chunks


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
