"""Lazy logits: the loss and every gradient are the stock model's, and logits are not made."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_models import (
    BATCH,
    FAMILIES,
    FUSED,
    LENGTH,
    VOCAB,
    LargestTensor,
    assert_same,
    make,
    make_inputs,
    step,
    was_made,
)
from torch import Tensor

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits.head import install_head, num_fused
from liger_kernels.transformers.lazy_logits.tensor import LazyLogits

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


# The model's own loss.


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("family", FAMILIES)
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


@pytest.mark.parametrize("family", FAMILIES)
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
