"""Heads that are frozen, tied, biased, adapted, hooked or of another class."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lazy_models import (
    BATCH,
    FUSED,
    LENGTH,
    VOCAB,
    LargestTensor,
    OwnLoss,
    assert_same,
    make,
    make_inputs,
    step,
    was_made,
)
from torch import Tensor, nn

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers.lazy_logits import loss as head_loss
from liger_kernels.transformers.lazy_logits import ops as head_ops
from liger_kernels.transformers.lazy_logits.head import install_head, num_fused

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


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
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 7 * VOCAB)
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
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 16 * VOCAB)

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
            out.loss = OwnLoss.apply(out.logits.view(-1, VOCAB), target)
        torch.rand(7)
        out.loss.backward()
        results.append((out.loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(results[1], results[0])


def test_all_labels_ignored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "linear_of", lambda pending: None)
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
        monkeypatch.setattr(head_loss, "linear_of", lambda pending: None)
    elif kind == "real":
        monkeypatch.setattr(head_ops, "loss_of", lambda *args, **kwargs: None)
    install_head(model, FUSED)
    ours = step(model, **make_inputs())
    assert_same(ours, stock, tolerance=2e-2)
    assert all(ours[1][n].dtype == p.dtype for n, p in model.named_parameters())
    assert ours[2].logits.dtype == weight
    assert model.eval()(**make_inputs()).logits.dtype == weight


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
