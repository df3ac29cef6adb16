"""Lazy logits: the loss and every gradient are the stock model's, and logits are not made."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits import ops as head_ops
from liger_kernels.transformers.lazy_logits.head import head_problem, install_head, num_fused
from liger_kernels.transformers.lazy_logits.tensor import LazyLogits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")

FUSED = "fused_linear_cross_entropy"
VOCAB, BATCH, LENGTH = 64, 2, 10

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        # Eager attention: sdpa knows no cap of attention scores, and says so in a warning.
        {"head_dim": 4, "final_logit_softcapping": 3.0, "attn_implementation": "eager"},
    ),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 4}),
}


def make(family: str = "llama", **settings: Any) -> Any:
    """Return a tiny model in training mode whose logits are far from zero."""
    prefix, own = _FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_COMMON, **own, **settings})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).train()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


def make_inputs(length: int = LENGTH) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (BATCH, length), generator=generator)
    labels = ids.clone()
    # Ragged: each row has another number of labels.
    labels[0, :3] = -100
    labels[1, -1:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model: nn.Module, **inputs: Any) -> tuple[Tensor, dict[str, Tensor | None], Any]:
    """Run one forward and backward; return loss, gradients and output."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    out = model(**inputs)
    # Not 1, so that a gradient that forgets what comes in is seen.
    (out.loss * 1.7).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return out.loss.detach(), grads, out


def assert_same(ours: Any, stock: Any, tolerance: float = 1e-5) -> None:
    """Compare two results of `step`."""
    torch.testing.assert_close(ours[0], stock[0], rtol=tolerance, atol=tolerance)
    assert ours[1].keys() == stock[1].keys()
    for name, grad in stock[1].items():
        assert (ours[1][name] is None) == (grad is None), name
        if grad is not None:
            floor = tolerance * grad.abs().max().item()
            torch.testing.assert_close(ours[1][name], grad, rtol=tolerance, atol=floor, msg=name)


def was_made(logits: LazyLogits) -> bool:
    return logits._deferred.made is not None


class LargestTensor(TorchDispatchMode):
    """Records the most numbers that any tensor with a vocabulary dimension had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and VOCAB in value.shape[-1:]:
                self.numel = max(self.numel, value.numel())
        return out


# The model's own loss.


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("family", _FAMILIES)
def test_loss_and_gradients(family: str, items: Any) -> None:
    model = make(family)
    inputs = make_inputs() if items is None else {**make_inputs(), "num_items_in_batch": items}
    stock = step(model, **inputs)
    patch = install_head(model, FUSED)
    ours = step(model, **inputs)
    assert_same(ours, stock)
    assert ours[0].dtype == torch.float32
    assert num_fused(model.lm_head) == 1
    assert isinstance(ours[2].logits, LazyLogits)
    assert not was_made(ours[2].logits)
    patch.undo()
    assert_same(step(model, **inputs), stock, tolerance=0.0)


@pytest.mark.parametrize("family", _FAMILIES)
def test_cross_entropy_mode(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family)
    stock = step(model, **make_inputs())
    seen: list[Tensor] = []
    op = head_loss.cross_entropy

    def spy(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits)
        return op(logits, *args, **kwargs)

    monkeypatch.setattr(head_loss, "cross_entropy", spy)
    install_head(model, "cross_entropy")
    assert_same(step(model, **make_inputs()), stock)
    assert num_fused(model.lm_head) == 1
    assert type(seen[0]) is Tensor


def test_cross_entropy_mode_gives_narrow_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers widens logits for the stock loss; the op widens them in registers.
    dtypes = []
    op = head_loss.cross_entropy
    monkeypatch.setattr(
        head_loss, "cross_entropy", lambda x, *a, **k: dtypes.append(x.dtype) or op(x, *a, **k)
    )
    model = make("gemma2").bfloat16()
    stock = step(model, **make_inputs())
    install_head(model, "cross_entropy")
    assert_same(step(model, **make_inputs()), stock, tolerance=2e-2)
    assert dtypes == [torch.bfloat16]


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 16 tokens, so that one chunk is less than all.
    monkeypatch.setattr("liger_kernels.ops.losses.chunk_size._CPU_BYTES", 1)
    model = make("gemma2")
    inputs = make_inputs(length=60)
    with LargestTensor() as stock:
        step(model, **inputs)
    assert stock.numel == BATCH * 60 * VOCAB
    install_head(model, FUSED)
    with LargestTensor() as ours:
        step(model, **inputs)
    assert ours.numel == 16 * VOCAB


def test_positional_labels() -> None:
    model = make()
    inputs = make_inputs()
    at = list(inspect.signature(model.forward).parameters).index("labels")
    before = [inputs["input_ids"], inputs["attention_mask"], *[None] * (at - 2)]
    stock = model(*before, inputs["labels"])
    install_head(model, FUSED)
    ours = model(*before, inputs["labels"])
    torch.testing.assert_close(ours.loss, stock.loss)
    assert isinstance(ours.logits, LazyLogits)
    assert num_fused(model.lm_head) == 1


@pytest.mark.parametrize("given", ["labels_too", "keyword", "labels_positional_none"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_shift_labels_case_63(family: str, given: str) -> None:
    model = make(family)
    inputs = make_inputs()
    labels = inputs.pop("labels")
    # The last position has a label, which no unshifted row of labels could hold.
    shift_labels = F.pad(labels[:, 1:], (0, 1), value=7)
    stock = step(model, **inputs, labels=labels, shift_labels=shift_labels)
    install_head(model, FUSED)
    call: Callable[..., Any] = model
    if given == "labels_too":
        call = functools.partial(model, labels=labels)
    elif given == "labels_positional_none":
        at = list(inspect.signature(model.forward).parameters).index("labels")
        values = [inputs.pop("input_ids"), inputs.pop("attention_mask"), *[None] * (at - 1)]
        call = functools.partial(model, *values)
    model.zero_grad()
    out = call(**inputs, shift_labels=shift_labels)
    (out.loss * 1.7).backward()
    assert_same((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}), stock)
    assert num_fused(model.lm_head) == 1
    with torch.no_grad():
        evaluated = call.func.eval() if isinstance(call, functools.partial) else call.eval()
        out = call(**inputs, shift_labels=shift_labels)
    assert not evaluated.training
    torch.testing.assert_close(out.loss, stock[0])
    assert type(out.logits) is Tensor


def test_gradient_accumulation_case_59() -> None:
    model = make()
    inputs = make_inputs(length=12)
    ids = inputs["input_ids"].repeat(2, 1)
    labels = torch.full_like(ids, -100)
    # Shifting takes the first away, so these are 3, 9, 1 and 7 labels.
    for row, count in enumerate((3, 9, 1, 7)):
        labels[row, 1 : 1 + count] = ids[row, 1 : 1 + count]
    stock = step(model, input_ids=ids, labels=labels)
    install_head(model, FUSED)
    model.zero_grad()
    total = torch.zeros(())
    for row in range(4):
        items: Any = 20 if row % 2 else torch.tensor(20)
        part = slice(row, row + 1)
        out = model(input_ids=ids[part], labels=labels[part], num_items_in_batch=items)
        (out.loss * 1.7).backward()
        total += out.loss.detach()
    assert_same((total, {n: p.grad for n, p in model.named_parameters()}), stock)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_reading_logits_in_training_case_65(family: str) -> None:
    model = make(family)
    inputs = make_inputs()
    stock = model(**inputs).logits
    install_head(model, FUSED)
    model.zero_grad()
    out = model(**inputs)
    logits = out.logits
    assert (logits.shape, logits.dtype, logits.device) == (stock.shape, stock.dtype, stock.device)
    assert logits.requires_grad
    assert logits.grad_fn is not None
    assert "LazyLogits(shape=(2, 10, 64)" in repr(logits)
    assert not was_made(logits)
    assert torch.equal(logits.argmax(-1), stock.argmax(-1))
    assert torch.equal(logits + 0, stock)
    assert logits.materialize() is logits.materialize()
    assert (out["logits"][:, -1].detach().numpy() == stock[:, -1].detach().numpy()).all()
    # And its gradient flows, beside that of the loss.
    (out.loss + logits.square().mean()).backward()
    ours = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    plain = model(**inputs, skip_logits=False)
    (plain.loss + plain.logits.square().mean()).backward()
    assert_same((out.loss, ours), (plain.loss, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(logits.real, stock.real)
    assert torch.equal(copy.copy(logits.data), stock.data)


def test_logits_of_changed_weights_are_refused() -> None:
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs())
    out.loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"before optimizer\.step\(\)"):
        out.logits.argmax(-1)


def test_eval_and_generate_are_stock() -> None:
    model = make("gemma2").eval()
    inputs = make_inputs()
    ids = inputs["input_ids"][:, :4]

    def run() -> tuple[Tensor, Any]:
        with torch.no_grad():
            return model.generate(ids, max_new_tokens=4, do_sample=False), model(**inputs)

    stock_ids, stock = run()
    install_head(model, FUSED)
    ours_ids, ours = run()
    assert torch.equal(ours_ids, stock_ids)
    assert torch.equal(ours.loss, stock.loss)
    assert torch.equal(ours.logits, stock.logits)
    model.train()
    del inputs["labels"]
    assert type(model(**inputs).logits) is Tensor


def test_skip_logits_case_66(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("liger_kernels.ops.losses.chunk_size._CPU_BYTES", 1)
    model = make().eval()
    inputs = make_inputs(length=60)
    with torch.no_grad():
        stock = model(**inputs)
        install_head(model, FUSED)
        with LargestTensor() as largest:
            ours = model(**inputs, skip_logits=True)
    assert largest.numel == 16 * VOCAB
    torch.testing.assert_close(ours.loss, stock.loss)
    assert not ours.loss.requires_grad
    assert ours.logits is None
    assert "logits" not in ours
    with torch.inference_mode():
        torch.testing.assert_close(model(**inputs, skip_logits=True).loss, stock.loss)
    model.train()
    assert model(**inputs, skip_logits=True).logits is None
    real = model(**inputs, skip_logits=False)
    assert type(real.logits) is Tensor
    torch.testing.assert_close(real.loss, stock.loss)
    with pytest.raises(ValueError, match="skip_logits must be True, False or None, got 'yes'"):
        model(**inputs, skip_logits="yes")


def test_tuple_output_case_65() -> None:
    model = make()
    stock = model(**make_inputs(), return_dict=False)
    install_head(model, FUSED)
    ours = model(**make_inputs(), return_dict=False)
    assert len(ours) == len(stock)
    torch.testing.assert_close(ours[0], stock[0])
    torch.testing.assert_close(ours[1] + 0, stock[1])
    skipped = model(**make_inputs(), return_dict=False, skip_logits=True)
    torch.testing.assert_close(skipped[0], stock[0])
    assert len(skipped) == len(stock) - 1


@pytest.mark.parametrize("keep", [3, torch.tensor([1, 4, 5])], ids=["int", "tensor"])
def test_logits_to_keep_case_62(keep: Any) -> None:
    model = make()
    inputs = make_inputs()
    inputs["labels"] = inputs["labels"][:, 4:7]
    stock = step(model, **inputs, logits_to_keep=keep)
    install_head(model, FUSED)
    ours = step(model, **inputs, logits_to_keep=keep)
    assert_same(ours, stock)
    assert ours[2].logits.shape == (BATCH, 3, VOCAB)
    # Labels of another length are the stock model's error.
    with pytest.raises(ValueError, match="batch_size"):
        model(**make_inputs(), logits_to_keep=keep)
    model.eval()
    assert model(**inputs, logits_to_keep=keep).logits.shape == (BATCH, 3, VOCAB)


def test_keywords_arrive_case_60_61(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    install_head(model, FUSED)
    seen = []
    attention = type(model.model.layers[0].self_attn)
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda self, *a, **k: seen.append(k) or forward(self, *a, **k)
    )
    # Padding-free lengths for flash attention, which the eager one takes and ignores.
    lengths = torch.tensor([0, LENGTH], dtype=torch.int32)
    packed = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": LENGTH}
    out = model(**make_inputs(), **packed, num_items_in_batch=9, return_dict=True)
    assert out.loss.isfinite()
    assert all(seen[0][name] is value for name, value in packed.items())
    assert "skip_logits" not in seen[0]


def test_signature_case_77() -> None:
    model = make()
    stock = inspect.signature(model.forward).parameters
    install_head(model, FUSED)
    ours = inspect.signature(model.forward).parameters
    assert set(ours) - set(stock) == {"skip_logits"}
    assert [name for name in ours if name != "skip_logits"] == list(stock)
    assert model.forward.__doc__ == type(model).forward.__doc__


# Any cross-entropy on the logits.


def assert_loss_is_stock(loss_of: Callable[[Tensor, Tensor], Tensor], is_lazy: bool = True) -> None:
    """Compare a loss of our own on out.logits, with a random gradient coming in."""
    model = make("gemma2")
    inputs = make_inputs()
    labels = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    results = []
    for is_patched in (False, True):
        if is_patched:
            install_head(model, FUSED)
        model.zero_grad()
        out = model(**inputs)
        loss = loss_of(out.logits, labels)
        dy = torch.randn(loss.shape, generator=torch.Generator().manual_seed(5))
        loss.backward(dy)
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
        if is_patched:
            assert was_made(out.logits) != is_lazy
            assert num_fused(model.lm_head) == 1 + is_lazy
    assert_same(results[1], results[0], tolerance=2e-5)


_CLASS_WEIGHT = torch.rand(VOCAB, generator=torch.Generator().manual_seed(8)) + 0.5


@pytest.mark.parametrize("chunked", [False, True], ids=["fused", "chunked"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"ignore_index": 9},
        {"weight": _CLASS_WEIGHT},
        {"weight": _CLASS_WEIGHT, "label_smoothing": 0.2, "ignore_index": 9},
        {"weight": _CLASS_WEIGHT, "label_smoothing": 0.2, "reduction": "none"},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_cross_entropy_options(
    options: dict[str, Any], chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunked:
        monkeypatch.setattr(head_loss, "_linear_of", lambda pending: None)
        monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", 7 * VOCAB)
    ignored = options.get("ignore_index", -100)
    assert_loss_is_stock(
        lambda logits, labels: F.cross_entropy(
            logits.view(-1, VOCAB),
            labels.reshape(-1).masked_fill(labels.reshape(-1) < 0, ignored),
            **options,
        )  # fmt: skip
    )


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x, y: F.cross_entropy(input=x.flatten(0, 1), target=y.flatten()),
        lambda x, y: F.cross_entropy(x.reshape(-1, x.size(-1)), y.reshape(-1), None, None, -100),
        lambda x, y: nn.CrossEntropyLoss(reduction="sum")(x.float().view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(x.view(x.shape[0] * x.shape[1], -1) / 2.0, y.view(-1)),
        lambda x, y: F.cross_entropy(3 * x[..., 2:, :].flatten(0, -2), y[:, 2:].flatten()),
        lambda x, y: F.cross_entropy(x[y != -100], y[y != -100]),
        lambda x, y: F.cross_entropy(x[0], y[0]),
        lambda x, y: F.cross_entropy(x[:, 1:-1].reshape((-1, VOCAB)), y[:, 1:-1].reshape(-1)),
        # Not one scale and one cap: chunked.
        lambda x, y: F.cross_entropy((torch.tanh(x) * 2).tanh().view(-1, VOCAB), y.view(-1)),
    ],
)  # fmt: skip
def test_recorded_operations(loss_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", 7 * VOCAB)
    assert_loss_is_stock(loss_of)


class _OwnLoss(torch.autograd.Function):
    """A loss of another package: it takes logits and makes the gradient itself."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1) - F.one_hot(target, VOCAB))
        return F.cross_entropy(logits, target, reduction="sum")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return ctx.saved_tensors[0] * dy, None


@pytest.mark.parametrize(
    "loss_of",
    [
        lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
        lambda x, y: F.cross_entropy(x[0], F.one_hot(y[0].clamp(0), VOCAB).float()),
        lambda x, y: F.cross_entropy(x.view(-1, VOCAB), y.view(-1), size_average=False),
        lambda x, y: F.nll_loss(x.log_softmax(-1).view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(x.view(-1, VOCAB) + torch.arange(VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(torch.cat([x[:1], x[1:]]).view(-1, VOCAB), y.view(-1)),
        lambda x, y: F.cross_entropy(x.mul_(2.0).view(-1, VOCAB), y.view(-1)),
        lambda x, y: _OwnLoss.apply(x.view(-1, VOCAB), y.reshape(-1).clamp(0)),
        lambda x, y: _OwnLoss.apply(x.flatten(0, 1)[3:], y.reshape(-1).clamp(0)[3:]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:size_average")
def test_anything_else_is_stock(loss_of: Any) -> None:
    assert_loss_is_stock(loss_of, is_lazy=False)


def test_changes_in_place_are_seen() -> None:
    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        rows = logits.view(-1, VOCAB)
        logits[..., :3] = -50.0
        return F.cross_entropy(rows, labels.reshape(-1))

    assert_loss_is_stock(loss_of, is_lazy=False)


def test_detached_logits_have_no_gradient() -> None:
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs())
    rows = out.logits.detach().view(-1, VOCAB)
    assert not rows.requires_grad
    assert not F.cross_entropy(rows, rows.argmax(-1)).requires_grad
    with torch.no_grad():
        scaled = out.logits * 2
    assert not scaled.requires_grad
    assert not (scaled + 0).requires_grad
    assert (out.logits + 0).requires_grad


def test_more_labels_after_the_forward() -> None:
    # The count of labels started in the forward must not bound a loss on others.
    model = make()
    inputs = make_inputs()
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][:, 2:] = -100
    install_head(model, FUSED)
    out = model(**inputs)
    target = inputs["input_ids"].reshape(-1)
    ours = F.cross_entropy(out.logits.view(-1, VOCAB), target)
    stock = F.cross_entropy(out.logits.view(-1, VOCAB) + 0, target)
    torch.testing.assert_close(ours, stock)


def test_label_count_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    op = head_loss.fused_linear_cross_entropy
    monkeypatch.setattr(
        head_loss,
        FUSED,
        lambda *a, **k: counts.append(k.get("label_count")) or op(*a, **k),
    )
    model = make()
    inputs = make_inputs()
    install_head(model, FUSED)
    model(**inputs)
    assert counts[0].wait() == (inputs["labels"] != -100).sum()


def test_trainers_label_smoothing_is_stock() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model = make()
    inputs = make_inputs()
    labels = inputs.pop("labels")
    install_head(model, FUSED)
    smoother = LabelSmoother(epsilon=0.1)
    out = model(**inputs)
    assert type(out.logits) is Tensor
    stock = smoother(out, labels, shift_labels=True)
    # A trainer that leaves labels in gets lazy logits, and the same loss.
    torch.testing.assert_close(smoother(model(**inputs, labels=labels), labels, True), stock)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer(smoothing: float, tmp_path: Any, accelerate: Any) -> None:
    inputs = make_inputs()
    rows = [{k: v[i].tolist() for k, v in inputs.items()} for i in (0, 1, 1, 0, 0, 1)]
    results = []
    for is_patched in (False, True):
        model = make()
        if is_patched:
            install_head(model, FUSED)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=3,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            label_smoothing_factor=smoothing,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append([*losses, trainer.evaluate()["eval_loss"]])
        # Two steps of three micro-batches; the label smoother takes the labels away.
        if is_patched:
            assert num_fused(model.lm_head) == (0 if smoothing else 6)
    assert len(results[0]) == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


# The head.


def test_frozen_head() -> None:
    model = make()
    model.lm_head.requires_grad_(False)
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    ours = step(model, **make_inputs())
    assert_same(ours, stock)
    assert ours[1]["lm_head.weight"] is None


def test_tied_head() -> None:
    model = make("gemma2", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    assert_same(step(model, **make_inputs()), stock)


def test_head_with_bias() -> None:
    model = make()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    ours = step(model, **make_inputs())
    assert_same(ours, stock)
    assert ours[1]["lm_head.bias"].abs().sum() > 0


@pytest.mark.parametrize("order", ["adapter-first", "patch-first"])
@pytest.mark.parametrize("kind", ["lora", "lora-head", "saved-head", "saved-head-off"])
def test_peft(kind: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", 7 * VOCAB)
    targets = ["q_proj", "lm_head"] if kind == "lora-head" else ["q_proj"]
    saved = ["lm_head"] if kind.startswith("saved-head") else None

    def wrap(model: nn.Module) -> Any:
        torch.manual_seed(4)
        config = peft.LoraConfig(
            r=4, target_modules=targets, modules_to_save=saved, init_lora_weights=False
        )
        return peft.get_peft_model(model, config).train()

    stock = wrap(make())
    if order == "adapter-first":
        model = wrap(make())
        patch = install_head(model, FUSED)
    else:
        base = make()
        patch = install_head(base, FUSED)
        model = wrap(base)
    for each in (stock, model):
        if kind == "saved-head-off":
            each.disable_adapter_layers()
            each.get_input_embeddings().requires_grad_(True)
        elif saved:
            with torch.no_grad():
                each.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    expected, ours = step(stock, **make_inputs()), step(model, **make_inputs())
    assert_same(ours, expected)
    head = model.get_output_embeddings() if kind == "lora" else model.base_model.model.lm_head
    assert num_fused(head) == 1
    assert not was_made(ours[2].logits)
    torch.testing.assert_close(ours[2].logits + 0, expected[2].logits)
    model.eval()
    with torch.no_grad():
        skipped = model(**make_inputs(), skip_logits=True)
    assert skipped.logits is None
    torch.testing.assert_close(skipped.loss, expected[0])
    model.train()
    patch.undo()
    assert not any(hasattr(type(m), "_lazy_call") for m in model.modules())
    assert_same(step(model, **make_inputs()), expected, tolerance=0.0)


def test_hooks_on_the_head() -> None:
    model = make()
    calls: list[Any] = []
    handles = [
        model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
        model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5),
        model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.shape)),
    ]
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    ours = step(model, **make_inputs())
    assert_same(ours, stock)
    assert num_fused(model.lm_head) == 1
    assert calls == [(BATCH, LENGTH, VOCAB)] * 2
    # Hooks that need numbers or gradients get them.
    for handle in handles:
        handle.remove()
    model.lm_head.register_forward_hook(lambda module, args, out: calls.append(out.max().item()))
    model.lm_head.register_full_backward_hook(lambda module, dx, dy: calls.append(dy[0].shape))
    assert_same(step(model, **make_inputs()), step(make(), **make_inputs()))
    assert calls[-1] == (BATCH, LENGTH, VOCAB)


def test_linear_subclass_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_CHUNK_ELEMENTS", 16 * VOCAB)

    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, self.weight.square())

    model = make("gemma2")
    model.lm_head.__class__ = Squared
    inputs = make_inputs(length=60)
    stock = step(model, **inputs)
    install_head(model, FUSED)
    with LargestTensor() as largest:
        ours = step(model, **inputs)
    assert_same(ours, stock)
    assert num_fused(model.lm_head) == 1
    assert largest.numel == 16 * VOCAB


@pytest.mark.parametrize("loss", ["model", "own"])
def test_head_with_dropout(loss: str) -> None:
    class Noisy(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.dropout(input))

    model = make()
    model.lm_head.__class__ = Noisy
    model.lm_head.dropout = nn.Dropout(0.4)
    results = []
    for is_patched in (False, True):
        if is_patched:
            install_head(model, FUSED)
        model.zero_grad()
        torch.manual_seed(6)
        out = model(**make_inputs())
        if loss == "own":
            # Lazy logits draw the mask the stock head drew, now; the gradient has to meet it again.
            torch.manual_seed(6)
            target = make_inputs()["input_ids"].view(-1)
            out.loss = _OwnLoss.apply(out.logits.view(-1, VOCAB), target)
        torch.rand(7)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(results[1], results[0])


def test_all_labels_ignored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_linear_of", lambda pending: None)
    model = make()
    install_head(model, FUSED)
    inputs = make_inputs()
    loss, grads, _ = step(model, **{**inputs, "labels": torch.full_like(inputs["labels"], -100)})
    assert loss == 0.0
    assert all(grad is None or not grad.any() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast_case_8(family: str, dtype: torch.dtype) -> None:
    model = make(family)

    def run() -> Any:
        with torch.autocast("cpu", dtype):
            return step(model, **make_inputs())

    stock = run()
    install_head(model, FUSED)
    ours = run()
    assert num_fused(model.lm_head) == 1
    assert_same(ours, stock, tolerance=3e-2)
    assert all(grad.dtype == torch.float32 for grad in ours[1].values())
    # Read outside autocast, they are still what the model made inside.
    logits = ours[2].logits
    assert logits.dtype == stock[2].logits.dtype == (logits + 0).dtype
    assert torch.equal(logits + 0, stock[2].logits)


def test_loss_outside_autocast() -> None:
    model = make()
    target = make_inputs()["input_ids"].view(-1)
    losses = []
    for is_patched in (False, True):
        if is_patched:
            install_head(model, FUSED)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**make_inputs()).logits
        losses.append(F.cross_entropy(logits.float().view(-1, VOCAB), target))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", ["fused", "chunked", "real"])
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32-bf16", "bf16-fp32"],
)
def test_mixed_dtypes_case_80(
    hidden: torch.dtype, weight: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As preparing for k-bit training leaves it. Stock torch refuses; the reference casts by a hook.
    model = make().to(hidden)
    model.lm_head.to(weight)
    handle = model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].to(weight),))
    stock = step(model, **make_inputs())
    handle.remove()
    if kind == "chunked":
        monkeypatch.setattr(head_loss, "_linear_of", lambda pending: None)
    elif kind == "real":
        monkeypatch.setattr(head_ops, "loss_of", lambda *args, **kwargs: None)
    install_head(model, FUSED)
    ours = step(model, **make_inputs())
    assert_same(ours, stock, tolerance=2e-2)
    assert all(ours[1][n].dtype == p.dtype for n, p in model.named_parameters())
    assert ours[2].logits.dtype == weight
    assert model.eval()(**make_inputs()).logits.dtype == weight


# The patch.


def test_deepcopy_and_pickle_are_independent() -> None:
    model = make()
    patch = install_head(model, FUSED)
    stock = step(model, **make_inputs())
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert clone.forward.__self__ is clone
        assert type(clone.lm_head) is not nn.Linear
        assert_same(step(clone, **make_inputs()), stock)
        before = num_fused(model.lm_head)
        assert isinstance(step(clone, **make_inputs())[2].logits, LazyLogits)
        assert num_fused(model.lm_head) == before
        # Undoing a copy leaves the original, and the other way round.
        clone._head_patch.undo()
        assert type(clone.lm_head) is nn.Linear
        assert type(step(clone, **make_inputs())[2].logits) is Tensor
        assert isinstance(step(model, **make_inputs())[2].logits, LazyLogits)
    clone = copy.deepcopy(model)
    patch.undo()
    assert isinstance(step(clone, **make_inputs())[2].logits, LazyLogits)


def test_model_looks_stock() -> None:
    model = make()
    before = (
        repr(model),
        list(model.state_dict()),
        dict(model.__dict__),
        dict(model.lm_head.__dict__),
    )
    weight = model.lm_head.weight
    patch = install_head(model, FUSED)
    step(model, **make_inputs())
    assert repr(model) == before[0]
    assert list(model.state_dict()) == before[1]
    assert isinstance(model.lm_head, nn.Linear)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.lm_head.weight is weight
    patch.undo()
    assert model.__dict__ == before[2]
    assert model.lm_head.__dict__ == before[3]
    assert type(model.lm_head) is nn.Linear
    patch.undo()
    install_head(model, FUSED).undo()
    assert model.__dict__ == before[2]


def _wrap(model: Any) -> None:
    """Wrap a model's forward as accelerate's prepare does for mixed precision."""
    from types import MethodType

    inner = model.forward.__func__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    forward.__wrapped__ = inner  # type: ignore[attr-defined]
    model._original_forward = model.forward
    model.forward = MethodType(forward, model)


def test_undo_beneath_a_wrapper() -> None:
    model = make()
    patch = install_head(model, FUSED)
    _wrap(model)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    out = model(**make_inputs())
    assert type(out.logits) is Tensor
    assert type(model.lm_head) is nn.Linear
    # The wrapper still calls through it, so it comes back to life rather than lie there twice.
    patch = install_head(model, FUSED)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    model.forward = model._original_forward
    assert type(model(**make_inputs()).logits) is Tensor


def test_patch_and_undo_over_a_wrapper() -> None:
    model = make()
    _wrap(model)
    before = dict(model.__dict__)
    patch = install_head(model, FUSED)
    assert isinstance(model(**make_inputs()).logits, LazyLogits)
    patch.undo()
    assert model.__dict__ == before
    assert type(model(**make_inputs()).logits) is Tensor


@pytest.fixture
def accelerate() -> Any:
    module = pytest.importorskip("accelerate")
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_prepare_and_unwrap(accelerate: Any) -> None:
    model = make()
    install_head(model, FUSED)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    out = prepared(**make_inputs())
    assert isinstance(out.logits, LazyLogits)
    assert out.logits.dtype == torch.float32
    assert not was_made(out.logits)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert isinstance(unwrapped(**make_inputs()).logits, LazyLogits)


def test_accelerate_hook_on_the_head() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    stock = step(make(), **make_inputs())
    model = make()
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert "wrapped" in (head_problem(model) or "")
    with pytest.raises(ValueError, match="patch before wrapping"):
        install_head(model, FUSED)
    model = make()
    install_head(model, FUSED)
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    assert_same(step(model, **make_inputs()), stock)
    assert num_fused(model.lm_head) == 1


def test_refusals() -> None:
    model = make()
    with pytest.raises(ValueError, match="op must be one of fused_linear_cross_entropy, cross"):
        install_head(model, "flce")  # type: ignore[arg-type]
    install_head(model, FUSED)
    with pytest.raises(ValueError, match="LlamaForCausalLM is patched; undo that first"):
        install_head(model, "cross_entropy")
    with pytest.raises(ValueError, match="no output head"):
        install_head(model.model, FUSED)


def test_other_models_stay_stock() -> None:
    patched, other = make(), make()
    install_head(patched, FUSED)
    assert type(other.lm_head) is nn.Linear
    assert type(other(**make_inputs()).logits) is Tensor
    assert "forward" not in other.__dict__


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    model = make("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    assert_same(step(model, **make_inputs()), stock)


@pytest.fixture
def process_group(tmp_path: Any) -> Any:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
def test_ddp(find_unused: bool, process_group: Any) -> None:
    stock = step(make(), **make_inputs())
    model = make()
    install_head(model, FUSED)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    out = ddp(**make_inputs())
    # DDP clones outputs to find unused parameters, and that makes logits.
    assert type(out.logits) is (Tensor if find_unused else LazyLogits)
    (out.loss * 1.7).backward()
    assert_same((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}), stock)
    if find_unused:
        reference = make()
        torch.testing.assert_close(out.logits, reference(**make_inputs()).logits)
        # The clone's gradient finds its way back.
        results = []
        for each, call in ((model, ddp), (reference, reference)):
            each.zero_grad()
            call(**make_inputs()).logits.square().mean().backward()
            results.append((torch.zeros(()), {n: p.grad for n, p in each.named_parameters()}))
        assert_same(*results)


@pytest.mark.parametrize("head_alone", [False, True])
def test_fsdp2(head_alone: bool, process_group: Any) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    stock = step(make(), **make_inputs())
    model = make()
    install_head(model, FUSED)
    if head_alone:
        fsdp.fully_shard(model.lm_head)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    model.zero_grad()
    out = model(**make_inputs())
    assert num_fused(model.lm_head) == 1
    assert not was_made(out.logits)
    (out.loss * 1.7).backward()
    grads = {n: p.grad.full_tensor() for n, p in model.named_parameters()}
    assert_same((out.loss.detach(), grads), stock)


# torch.compile.

_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
_EXPERTS_TRACE = pytest.mark.skipif(
    _VERSION < (5, 24), reason="the loop over experts of this transformers cannot be traced"
)


@pytest.fixture
def compiled() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        pytest.param("mixtral", marks=_EXPERTS_TRACE),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("llama", "granite", "qwen3")),
    ],
)
def test_compile(family: str, compiled: Any) -> None:
    # transformers' own router-logits hooks take a lock when first called, which cannot be traced.
    settings = {"output_router_logits": False} if family == "mixtral" else {}
    model = make(family, **settings)
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    run = compiled(model)
    for count in range(3):
        ours = step(run, **make_inputs())
        named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
        assert_same((ours[0], named), stock)
        assert ours[2].logits is None
        assert num_fused(model.lm_head) == count + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compile_makes_logits_for_other_losses(compiled: Any) -> None:
    model = make()

    def loss_function(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
        # An unrecorded use, and a change in place that later uses of the same name must see.
        logits[..., :3] = -50.0
        return logits.logsumexp(-1).mean() + F.cross_entropy(
            logits.view(-1, VOCAB), labels.reshape(-1)
        )

    model.loss_function = loss_function
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    ours = step(compiled(model), **make_inputs())
    named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
    assert_same((ours[0], named), stock)
    assert num_fused(model.lm_head) == 0


def test_compile_in_pieces(compiled: Any) -> None:
    model = make()
    stock = step(model, **make_inputs())
    install_head(model, FUSED)
    # What cannot be traced as a whole runs as in eager code, around compiled pieces.
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    ours = step(compiled(model, fullgraph=False), **make_inputs())
    named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
    assert_same((ours[0], named), stock)
    assert isinstance(ours[2].logits, LazyLogits)
    assert not was_made(ours[2].logits)


def test_compiled_loss_on_lazy_logits(compiled: Any) -> None:
    assert_loss_is_stock(
        compiled(lambda x, y: F.cross_entropy(x.view(-1, VOCAB) * 2.0, y.view(-1)), fullgraph=False)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_on_a_gpu(backend: str | None) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = make("gemma2").cuda()
    inputs = {name: value.cuda() for name, value in make_inputs().items()}
    stock = step(model, **inputs)
    install_head(model, FUSED)
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    ours = step(run, **inputs)
    named = {n.removeprefix("_orig_mod."): g for n, g in ours[1].items()}
    assert_same((ours[0], named), stock, tolerance=1e-3)
    assert num_fused(model.lm_head) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m, out: m.lm_head.weight.data.add_(1.0), None),
        (lambda m, out: setattr(m.lm_head.weight, "data", m.lm_head.weight * 2), "weights"),
        (lambda m, out: m.to(torch.bfloat16), "weights"),
        (lambda m, out: out.hidden_states[-1].mul_(0.0), "input was written to"),
    ],
    ids=["through data", "data", "dtype", "hidden state"],
)
def test_what_logits_are_made_from_has_changed(change, words):
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs(), output_hidden_states=True)
    with torch.no_grad():
        change(model, out)
    if words is None:
        # Documented: nothing tells of it.
        assert torch.isfinite(out.logits.sum())
        return
    with pytest.raises(RuntimeError, match=f"can no longer be made: the head's {words}"):
        out.logits.sum()


def test_other_weights_of_a_functional_call_are_not_the_models():
    model = make()
    install_head(model, FUSED)
    values = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, values, (), make_inputs())
    with pytest.raises(RuntimeError, match="the head's weights have changed"):
        out.logits.sum()


@pytest.mark.parametrize("switch", ["disable", "other", "dropout"])
def test_adapters_of_the_head_are_switched(switch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.3)
    model = peft.get_peft_model(make(), config)
    model.add_adapter("other", config)
    install_head(model, FUSED)
    model.train()
    out, again = model(**make_inputs()), model(**make_inputs())
    assert torch.isfinite(out.logits.sum())
    if switch == "disable":
        with model.disable_adapter(), pytest.raises(RuntimeError, match="adapter or the dropout"):
            again.logits.sum()
        return
    model.eval() if switch == "dropout" else model.set_adapter("other")
    with pytest.raises(RuntimeError, match="adapter or the dropout"):
        again.logits.sum()


@pytest.mark.parametrize("ask", [Tensor.retain_grad, lambda x: x.register_hook(lambda grad: grad)])
def test_a_gradient_that_will_not_come_is_told(ask):
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs())
    with pytest.warns(UserWarning, match="computed without making these logits"):
        ask(out.logits)


def test_hooks_of_torch_itself_are_no_question():
    model = make()
    install_head(model, FUSED)
    out = model(**make_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # As FSDP sets them.
        out.logits.register_hook(functools.partial(functools.partial(F.relu), inplace=False))


def test_functional_transforms_have_the_stock_gradients():
    from liger_kernels.transformers import apply_liger_kernel

    model = make()
    patched = copy.deepcopy(model)
    apply_liger_kernel(patched)

    def gradients(module):
        values = {name: p.detach() for name, p in module.named_parameters()}

        def loss(values):
            return torch.func.functional_call(module, values, (), make_inputs()).loss

        return torch.func.grad(loss)(values)

    expected, found = gradients(model), gradients(patched)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_model_inside_a_module_is_told_and_not_passed_over():
    from liger_kernels.transformers import apply_liger_kernel

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

    plan = apply_liger_kernel(Policy()).plan
    (skip,) = [skip for skip in plan.skips if skip.op == FUSED]
    assert skip.name == "inner.lm_head"
    assert skip.reason == "its model is inside a Policy: pass model.inner instead"
