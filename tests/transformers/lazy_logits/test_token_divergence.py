"""token_divergence: the divergence of models' logits, by every kind of head, and without logits."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from liger_kernels.compare import error
from liger_kernels.ops.divergence import divergence_ref
from liger_kernels.transformers import apply_liger_kernel, token_divergence
from liger_kernels.transformers.lazy_logits import divergence as lazy

SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(width: int, seed: int, vocab: int = 30):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "vocab_size": vocab}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **sizes, initializer_range=0.3))


def gemma2(width: int, seed: int):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": width, "vocab_size": 30, "head_dim": 8}
    config = Gemma2Config(**SIZES, **sizes, initializer_range=0.3, final_logit_softcapping=2.0)
    return Gemma2ForCausalLM(config)


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 30, (2, 7), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, 5:] = -100
    return {"input_ids": ids}, labels


def truth(model, teacher, inputs, labels, beta, temperature):
    """The sums and the gradients of all parameters, by the stock logits."""
    is_label = labels[:, 1:] != -100
    z, t = (m(**inputs).logits[:, :-1][is_label] for m in (model, teacher))
    total = divergence_ref(z, t, beta=beta, temperature=temperature).sum()
    nll = -z.log_softmax(-1).gather(1, labels[:, 1:][is_label][:, None]).sum()
    return total, nll, torch.autograd.grad(total + 0.5 * nll, list(model.parameters()))


KINDS = {
    "plain": (llama, llama, 1),
    # A softcap is no part of the fused op.
    "softcap": (gemma2, llama, 0),
    "teacher-softcap": (llama, gemma2, 0),
}


@pytest.mark.parametrize("patched", ["both", "student", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_gradients_are_those_of_all_logits(kind, patched, monkeypatch):
    make, make_teacher, num_fused = KINDS[kind]
    model, teacher = make(16, 0), make_teacher(24, 1).eval()
    inputs, labels = batch()
    wanted = truth(model, teacher, inputs, labels, 0.4, 1.5)
    if patched != "none":
        apply_liger_kernel(model, ops="auto")
    if patched == "both":
        apply_liger_kernel(teacher, ops="auto")
    fused, op = [], lazy.fused_linear_divergence
    monkeypatch.setattr(
        lazy, "fused_linear_divergence", lambda x, *a, **k: fused.append(len(x)) or op(x, *a, **k)
    )
    monkeypatch.setattr(lazy.loss, "CHUNK_ELEMENTS", 90)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = token_divergence(model, teacher, inputs, labels, beta=0.4, temperature=1.5)
    makes_logits = any("makes all logits" in str(one.message) for one in said)
    assert makes_logits == (patched != "both")
    # Of the tokens with a label alone.
    assert fused == [int((labels[:, 1:] != -100).sum())] * (num_fused * (patched == "both"))
    loss = found.divergence + 0.5 * found.nll
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for ours, true in zip((*found[:2], *grads), (*wanted[:2], *wanted[2]), strict=True):
        assert error(ours.detach(), true.detach()) < 2e-5
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_no_label_gives_0_with_a_gradient_of_0():
    model, teacher = llama(16, 0), llama(24, 1).eval()
    for one in (model, teacher):
        apply_liger_kernel(one, ops="auto")
    inputs, labels = batch()
    found = token_divergence(model, teacher, inputs, torch.full_like(labels, -100))
    assert [x.item() for x in found[:2]] == [0.0, 0.0]
    assert found.aux_loss is None
    (found.divergence + found.nll).backward()
    assert all((p.grad == 0).all() for p in model.parameters())


def test_another_vocabulary_is_refused():
    model, teacher = llama(16, 0), llama(24, 1, vocab=31).eval()
    for one in (model, teacher):
        apply_liger_kernel(one, ops="auto")
    with pytest.raises(ValueError, match=r"vocabulary \(2, 7, 30\), got \(2, 7, 31\)"):
        token_divergence(model, teacher, *batch())
