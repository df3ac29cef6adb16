"""Log-probabilities beyond test_ops.py: what is paid for, options, chunks, memory, autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from linear_heads import FP32, HALF_DTYPES, assert_close, head, labels, make, not_interpreted
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernels.compare import FLOOR, error
from liger_kernels.ops import count_labels, fused_linear_cross_entropy, fused_linear_logprobs
from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.ops.fused_linear_logprobs import (
    LOGPROB_OUTPUTS,
    fused_linear_logprobs_ref,
    linear_logprobs,
    logprob_options,
)
from liger_kernels.ops.losses import linear_loss
from liger_kernels.ops.losses.label_count import LabelCount
from liger_kernels.ops.losses.options import LossOptions
from liger_kernels.ops.losses.row_gradient import gradient_rows
from liger_kernels.ops.losses.row_loss_torch import Coefs, KeptRows

OPTIONS = {"temperature": 1.3, "softcap": 3.0, "scale": 0.5, "ignore_index": -100}


def outcome(function, tensors, ids, dtype=None, **options):
    """The outputs, and the gradients under a random gradient of each differentiable output."""
    leaves = [
        None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad)
        for t in tensors
    ]
    hidden, weight, bias = leaves
    found = function(hidden, weight, ids, bias=bias, **options)
    trained = [y for y in found if y.requires_grad]
    if trained:
        dys = [make(*y.shape, seed=7 + i).detach().to(y) for i, y in enumerate(trained)]
        torch.autograd.backward(trained, dys)
    return [y.detach() for y in found], [None if t is None else t.grad for t in leaves]


# The outputs


@pytest.mark.usefixtures("three_tokens_a_chunk")
@pytest.mark.parametrize("size", [1, 2, 5])
def test_outputs_come_in_the_order_asked_with_the_values_of_all(size, device):
    tensors = head(8, 12, 33, device=device)
    ids = labels(8, vocab=33, ignored=3, device=device)
    everything = fused_linear_logprobs(*tensors[:2], ids, outputs=LOGPROB_OUTPUTS, **OPTIONS)
    orders = list(itertools.permutations(LOGPROB_OUTPUTS, size))
    for names in orders[:: {1: 1, 2: 3, 5: 41}[size]]:
        found = fused_linear_logprobs(*tensors[:2], ids, outputs=list(names), **OPTIONS)
        assert found._fields == names
        for name, value in found._asdict().items():
            assert value.requires_grad == (name in ("logprob", "entropy"))
            assert torch.equal(value, getattr(everything, name)), name
            assert (value[:3] == 0).all()


def test_the_default_is_log_probability_and_entropy(device):
    hidden, weight, _ = head(4, 8, 16, device=device)
    logprob, entropy = found = fused_linear_logprobs(
        hidden, weight, labels(4, vocab=16, device=device)
    )
    assert found._fields == ("logprob", "entropy")
    assert found.logprob is logprob
    assert found.entropy is entropy


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """The passes over rows of logits: ("rows", names of outputs) or ("gradient", coefficients)."""
    found: list[tuple[str, object]] = []
    rows, gradient = linear_loss.loss_rows, linear_loss.gradient_rows

    def loss_rows(z, *args, class_weight=None, coef=None, dx=None, overwrite=False, **outputs):
        found.append(("rows", (tuple(outputs), dx is not None)))
        options = {"class_weight": class_weight, "overwrite": overwrite}
        rows(z, *args, coef=coef, dx=dx, **options, **outputs)

    def gradient_rows(*args, coefs, **options):
        found.append(("gradient", tuple(c is not None for c in coefs)))
        gradient(*args, coefs=coefs, **options)

    monkeypatch.setattr(linear_loss, "loss_rows", loss_rows)
    monkeypatch.setattr(linear_loss, "gradient_rows", gradient_rows)
    return found


PASSES = {
    # Kept for backward: the peak, the logarithm of the sum, and an entropy that has a gradient.
    ("logprob",): ("loss", "peak", "log_total"),
    ("entropy",): ("entropy", "peak", "log_total"),
    ("logprob", "entropy"): ("loss", "entropy", "peak", "log_total"),
    ("logprob", "correct", "mean_logit"): ("loss", "best", "mean", "peak", "log_total"),
    ("logsumexp",): ("peak", "log_total"),
    ("correct",): ("best",),
    ("mean_logit",): ("mean",),
}


@pytest.mark.parametrize("names", PASSES, ids="-".join)
def test_nothing_is_computed_that_is_not_asked_for(names, work, device):
    tensors = head(6, 8, 16, device=device)
    ids = labels(6, vocab=16, device=device)
    is_trained = bool({"logprob", "entropy"} & set(names))
    outcome(fused_linear_logprobs, tensors, ids, outputs=names)
    backward = [("gradient", (True, "entropy" in names, False))]
    assert work == [("rows", (PASSES[names], False)), *(backward if is_trained else [])]
    work.clear()
    with torch.no_grad():
        outcome(fused_linear_logprobs, tensors, ids, outputs=names)
    without = tuple(x for x in PASSES[names] if names == ("logsumexp",) or x not in KEPT)
    assert work == [("rows", (without, False))]


KEPT = ("peak", "log_total")


def test_with_a_frozen_head_backward_has_no_logits(work, device):
    hidden, weight, bias = head(6, 8, 16, device=device)
    frozen = (hidden, weight.detach(), bias.detach())
    ids = labels(6, vocab=16, ignored=2, device=device)
    for names in (("logprob",), ("correct", "logprob")):
        work.clear()
        found, grads = outcome(fused_linear_logprobs, frozen, ids, outputs=names, ignore_index=-100)
        made = tuple({"logprob": "loss", "correct": "best"}[name] for name in names)
        kept = ("peak", "log_total", *made)
        assert work == [("rows", (kept, False)), ("gradient", (True, False, False))]
        true, wanted = outcome(
            fused_linear_logprobs_ref, frozen, ids, torch.float64, outputs=names, ignore_index=-100
        )
        assert_close(found, true, FP32)
        assert grads[1] is grads[2] is None
        assert error(grads[0], wanted[0]) < 2 * FP32


# Right, whatever is trained


@pytest.mark.usefixtures("three_tokens_a_chunk")
@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize(
    "names", [("logprob",), ("logprob", "entropy"), ("logsumexp", "entropy")], ids="-".join
)
def test_gradients_exist_exactly_where_asked_for(names, trained, device):
    tensors = [
        t.detach().requires_grad_(is_trained)
        for t, is_trained in zip(head(8, 12, 33, device=device), trained, strict=True)
    ]
    ids = labels(8, vocab=33, ignored=3, device=device)
    found, grads = outcome(fused_linear_logprobs, tensors, ids, outputs=names, **OPTIONS)
    true, wanted = outcome(
        fused_linear_logprobs_ref, tensors, ids, torch.float64, outputs=names, **OPTIONS
    )
    assert_close(found, true, 2 * FP32)
    assert_close(grads, wanted, 4 * FP32)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("is_frozen", [False, True])
def test_half_precision_is_no_worse_than_eager(is_frozen, dtype, device):
    tensors = head(24, 32, 100, dtype=dtype, device=device)
    if is_frozen:
        tensors = [tensors[0], tensors[1].detach(), tensors[2].detach()]
    ids = labels(24, vocab=100, device=device)
    names = ("logprob",)
    results = [
        outcome(function, tensors, ids, kind, outputs=names)
        for function, kind in (
            (fused_linear_logprobs, None),
            (fused_linear_logprobs_ref, None),
            (fused_linear_logprobs_ref, torch.float64),
        )
    ]
    for ours, eager, true in zip(*((*r[0], *r[1]) for r in results), strict=True):
        if true is not None:
            floor = (4 if INTERPRETED else 1) * FLOOR[dtype]
            assert error(ours, true) <= 2 * error(eager, true) + floor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_are_the_same_bits_whatever_has_a_gradient_or_is_asked_for(dtype, device):
    """A reference that is the policy, in evaluation, has a log-ratio of 0 and not of a rounding."""
    hidden, weight, bias = head(6, 24, 1500, dtype=dtype, device=device)
    ids = labels(6, vocab=1500, ignored=2, device=device)
    found = []
    for names in (("logprob",), ("logprob", "entropy"), LOGPROB_OUTPUTS):
        for trained in ((True, True, True), (True, False, False), (False, False, False)):
            tensors = [
                t.detach().requires_grad_(is_trained)
                for t, is_trained in zip((hidden, weight, bias), trained, strict=True)
            ]
            values = fused_linear_logprobs(
                *tensors[:2], ids, bias=tensors[2], outputs=names, ignore_index=-100
            )
            found.append(values.logprob.detach())
    assert all(torch.equal(value, found[0]) for value in found)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2000, 4096, 128256), (1000, 2048, 151936)], ids=str)
def test_values_are_the_same_bits_on_a_gpu(shape, device):
    tokens, width, vocab = shape
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16) * 0.02
    ids = torch.randint(0, vocab, (tokens,), device=device)
    found = []
    for names in (("logprob",), ("logprob", "entropy"), LOGPROB_OUTPUTS):
        for trained in itertools.product([True, False], repeat=2):
            hidden, weight = (
                t.detach().requires_grad_(is_trained)
                for t, is_trained in zip((hidden, weight), trained, strict=True)
            )
            found.append(fused_linear_logprobs(hidden, weight, ids, outputs=names).logprob.detach())
    assert all(torch.equal(value, found[0]) for value in found)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_tensors_of_any_layout(layout, device):
    hidden, weight, bias = head(8, 12, 33, device=device)
    ids = labels(8, 2, vocab=33, device=device)[:, 1]
    if layout == "transposed":
        hidden = hidden.detach().t().contiguous().t().requires_grad_()
        weight = weight.detach().t().contiguous().t().requires_grad_()
    elif layout == "strided":
        wide = torch.zeros(16, 20, device=device)
        hidden = wide[::2, :12].copy_(hidden.detach()).requires_grad_()
    else:
        hidden = hidden[:1].detach().expand(8, 12).requires_grad_()
    found, grads = outcome(fused_linear_logprobs, (hidden, weight, bias), ids)
    true, wanted = outcome(fused_linear_logprobs_ref, (hidden, weight, bias), ids, torch.float64)
    assert_close(found, true, 2 * FP32)
    assert_close(grads, wanted, 4 * FP32)


@pytest.mark.parametrize("scale", [1.0, 30.0, 3000.0])
def test_confident_tokens_keep_their_digits(scale, device):
    """Backward has p from what forward kept: exact also where the logits are in the thousands."""
    hidden, weight, bias = head(8, 12, 33, device=device)
    ids = (hidden @ weight.t()).detach().argmax(-1)
    options = {"scale": scale, "outputs": ("logprob", "entropy")}
    tensors = (hidden, weight, None)
    found, grads = outcome(fused_linear_logprobs, tensors, ids, **options)
    # The logits as they are rounded: at 3000 their last digit is a thousandth.
    z = (hidden.detach() @ weight.detach().t()).double() * scale
    log_p = z.log_softmax(-1)
    assert (found[0] - log_p.gather(1, ids[:, None])[:, 0]).abs().max() <= 3e-6 * scale
    assert all(grad.isfinite().all() for grad in grads[:2])


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"scale": 3.0}, {"temperature": 0.5}], ids=str
)
def test_scale_then_cap_then_temperature(options, device):
    hidden, weight, _ = head(4, 8, 16, device=device)
    ids = labels(4, vocab=16, device=device)
    given = {"softcap": 1.5, "scale": 2.0, "temperature": 0.7, **options}
    z = given["scale"] * (hidden @ weight.t()).double()
    z = given["softcap"] * torch.tanh(z / given["softcap"]) / given["temperature"]
    found = fused_linear_logprobs(hidden, weight, ids, outputs=("logsumexp",), **given)
    assert error(found.logsumexp, z.logsumexp(-1).detach()) < 2 * FP32


# Counts, chunks and memory


@pytest.mark.parametrize("bound", [None, 5, 7, 100])
def test_a_count_that_is_too_small_gives_nan(bound, device):
    hidden, weight, _ = head(9, 8, 16, device=device)
    ids = labels(9, vocab=16, ignored=3, device=device)
    count = count_labels(ids) if bound is None else LabelCount(bound)
    found = fused_linear_logprobs(hidden, weight, ids, ignore_index=-100, label_count=count)
    if bound == 5:
        assert all(value.isnan().all() for value in found)
    else:
        true = fused_linear_logprobs_ref(hidden, weight, ids, ignore_index=-100)
        assert_close([x.detach() for x in found], [x.detach() for x in true], 2 * FP32)
    with pytest.raises(ValueError, match="label_count must be None without ignore_index"):
        fused_linear_logprobs(hidden, weight, ids.clamp(0), label_count=count)


class PeakBytes(TorchDispatchMode):
    """Counts the most bytes that tensors of a call had at once, by their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[object, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        import weakref

        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(value), storage.nbytes())
        self.alive = {k: v for k, v in self.alive.items() if v[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@not_interpreted
@pytest.mark.parametrize("trained", ["all", "frozen", "none"])
def test_memory_is_a_chunk_and_the_gradients(trained, monkeypatch, device):
    tokens, width, vocab, chunk = 256, 16, 2000, 16
    monkeypatch.setattr(linear_loss, "chunk_tokens", lambda *_: chunk)
    hidden, weight, _ = head(tokens, width, vocab, device=device)
    if trained != "all":
        weight = weight.detach()
    hidden = hidden.detach().requires_grad_(trained != "none")
    ids = labels(tokens, vocab=vocab, device=device)
    with PeakBytes() as memory:
        found = fused_linear_logprobs(hidden, weight, ids, outputs=("logprob",))
        if trained != "none":
            found.logprob.sum().backward()
    gradient = (
        4
        * {"all": vocab * width + tokens * width, "frozen": 2 * tokens * width, "none": 0}[trained]
    )
    # A chunk and, as torch code, two of its size; not the 2 MB of all logits.
    assert memory.peak <= gradient + 3 * 4 * chunk * vocab + 200 * tokens
    assert memory.peak < 4 * tokens * vocab


# Autograd and torch.compile


def test_logsumexp_may_have_a_gradient_inside(device):
    """As the losses of deferred logits use it: lse less logprob has no gradient at the label."""
    hidden, weight, bias = head(6, 8, 16, device=device)
    ids = labels(6, vocab=16, device=device)
    names = ("logprob", "logsumexp")
    options = logprob_options(None, 1.0, 2.0, 1.5)
    found = linear_logprobs((hidden, weight, bias), ids, options, names, differentiable=names)
    dys = [make(6, seed=s, device=device).detach() for s in (3, 4)]
    grads = torch.autograd.grad(tuple(found), (hidden, weight, bias), dys)
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    z = 2.0 * torch.tanh(1.5 * torch.nn.functional.linear(*wide) / 2.0)
    true = (z.log_softmax(-1).gather(1, ids[:, None])[:, 0], z.logsumexp(-1))
    wanted = torch.autograd.grad(true, wide, [dy.double() for dy in dys])
    assert_close(grads, wanted, 4 * FP32)


def test_reduction_none_of_the_loss_keeps_rows_too(work, device):
    hidden, weight, bias = head(8, 12, 33, device=device)
    target = labels(8, vocab=33, ignored=2, device=device)
    loss = fused_linear_cross_entropy(
        hidden, weight, target, bias=bias, reduction="none", z_loss=1e-2, label_smoothing=0.1
    )
    torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    assert [kind for kind, _ in work] == ["rows", "gradient"]


@not_interpreted
@pytest.mark.parametrize("trained", ["all", "frozen"])
def test_every_output_compiles_into_one_graph(trained, device, true_allocators):
    hidden, weight, bias = head(8, 12, 33, device=device)
    if trained == "frozen":
        weight, bias = weight.detach(), bias.detach()
    ids = labels(8, vocab=33, ignored=2, device=device)
    names = ("logprob",) if trained == "frozen" else ("mean_logit", "entropy", "logprob", "correct")
    leaves = [t for t in (hidden, weight, bias) if t.requires_grad]

    def loss(hidden, weight, bias, ids):
        found = fused_linear_logprobs(hidden * 2, weight, ids, bias=bias, outputs=names, **OPTIONS)
        total = found.logprob.square().sum()
        return total + sum(getattr(found, name).sum() for name in names if name != "logprob")

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    arguments = (hidden, weight, bias, ids)
    assert error(compiled(*arguments).detach(), loss(*arguments).detach()) < FP32
    wanted = torch.autograd.grad(loss(*arguments), leaves)
    assert_close(torch.autograd.grad(compiled(*arguments), leaves), wanted, 2 * FP32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"outputs": ("logprob", "entropie")}, "outputs must be some of logprob, entropy"),
        ({"ignore_index": 1.5}, "ignore_index must be None or an int"),
        ({"temperature": 1e-30, "scale": 1e30}, "temperature must leave scale and softcap finite"),
        ({"softcap": 0.0}, "softcap must be None or positive"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, device):
    hidden, weight, _ = head(2, 4, 8, device=device)
    with pytest.raises(ValueError, match=message):
        fused_linear_logprobs(hidden, weight, labels(2, vocab=8, device=device), **arguments)


@pytest.mark.parametrize("pitch", [33, 48, 50])
def test_rows_that_are_far_apart_have_the_gradient_of_packed_ones(pitch, device):
    """On a GPU rows begin at multiples of 16, and are read and written to the next one."""
    logits = make(5, 33, seed=1, device=device).detach()
    ids = labels(5, vocab=33, ignored=1, device=device)
    coefs = Coefs(make(5, seed=2, device=device).detach(), make(5, seed=3, device=device).detach())
    peak = logits.amax(1)
    log_total = (logits - peak[:, None]).exp().sum(1).log()
    log_p = logits - (peak + log_total)[:, None]
    kept = KeptRows(peak, log_total, -(log_p.exp() * log_p).sum(1))
    x = torch.full((5, pitch), float("nan"), device=device)[:, :33].copy_(logits)
    gradient_rows(x, ids, LossOptions(ignore_index=-100), kept, coefs=coefs)
    z = logits.double().requires_grad_()
    true = z.log_softmax(-1)
    nll = -true.gather(1, ids.clamp(0)[:, None])[:, 0] * (ids >= 0)
    entropy = -(true.exp() * true).sum(1) * (ids >= 0)
    (wanted,) = torch.autograd.grad((nll * coefs.loss + entropy * coefs.entropy).sum(), z)
    assert error(x, wanted) < 2 * FP32


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("trained", ["all", "frozen", "none"])
@pytest.mark.parametrize("shape", [(8192, 4096, 128256), (4096, 2048, 151936)], ids=str)
def test_transient_memory_on_a_gpu(shape, trained, device):
    tokens, width, vocab = shape
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, device=device, dtype=torch.bfloat16) * width**-0.5
    hidden.requires_grad_(trained != "none")
    weight.requires_grad_(trained == "all")
    ids = torch.randint(0, vocab, (tokens,), device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = fused_linear_logprobs(hidden, weight, ids, outputs=("logprob",))
    if trained != "none":
        found.logprob.sum().backward()
    gradient = 2 * vocab * width if trained == "all" else 0
    assert torch.cuda.max_memory_allocated() - before <= gradient + (600 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [1000, 32000, 128256, 151936])
def test_every_output_on_a_gpu(vocab, dtype, device):
    hidden = make(300, 256, seed=1, dtype=dtype, device=device)
    weight = make(vocab, 256, seed=2, spread=256**-0.5, dtype=dtype, device=device)
    ids = labels(300, vocab=vocab, ignored=40, device=device)
    options = {"outputs": LOGPROB_OUTPUTS, **OPTIONS}
    results = [
        outcome(function, (hidden, weight, None), ids, kind, **options)
        for function, kind in (
            (fused_linear_logprobs, None),
            (fused_linear_logprobs_ref, None),
            (fused_linear_logprobs_ref, torch.float64),
        )
    ]
    for ours, eager, true in zip(*((*r[0], *r[1]) for r in results), strict=True):
        if true is not None and true.is_floating_point():
            assert error(ours, true) <= 2 * error(eager, true) + FLOOR[dtype]
