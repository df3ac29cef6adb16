"""The count of labels that a forward starts bounds a loss on those labels alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import zoo

from liger_kernels.transformers import apply_liger_kernel


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5])
def test_case_264_a_loss_with_another_ignore_index_counts_its_own_labels(ignore_index):
    """The labels hold few that are not -100; the loss ignores another number, which is rare."""
    ids = torch.arange(1, 33).view(2, 16) % 7 + 1
    labels = ids.clone()
    labels[:, 3:] = -100

    def loss_of(*, logits, labels, vocab_size, **rest):
        target = ids.reshape(-1).masked_fill(labels.reshape(-1) == -100, 4)
        if ignore_index == -100:
            target = labels.reshape(-1)
        return F.cross_entropy(logits.view(-1, vocab_size), target, ignore_index=ignore_index)

    results = []
    for is_patched in (False, True):
        model = zoo.build("llama")
        model.loss_function = loss_of
        if is_patched:
            apply_liger_kernel(model, "fused_linear_cross_entropy")
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad))
    for stock, patched in zip(*results, strict=True):
        torch.testing.assert_close(patched, stock, rtol=1e-4, atol=1e-5)


def _by_subclass(model, more):
    class Model(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, labels=labels, **kwargs)
            logits = out.logits.view(-1, out.logits.shape[-1])
            out.loss = out.loss + F.cross_entropy(logits, more.reshape(-1))
            return out

    model.__class__ = Model


def _by_other_labels(model, more):
    class Model(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            return super().forward(*args, labels=more, **kwargs)

    model.__class__ = Model


def _by_loss_function(model, more):
    stock = model.loss_function

    def loss_of(*, logits, labels, vocab_size, **rest):
        other = stock(logits=logits, labels=more, vocab_size=vocab_size)
        return other + stock(logits=logits, labels=labels, vocab_size=vocab_size)

    model.loss_function = loss_of


def _by_hook(model, more):
    losses = []

    def aux(module, inputs, logits):
        losses.append(F.cross_entropy(logits.view(-1, logits.shape[-1]), more.reshape(-1)))

    def add(module, inputs, out):
        out.loss = out.loss + losses.pop()
        return out

    model.lm_head.register_forward_hook(aux)
    model.register_forward_hook(add)


@pytest.mark.parametrize("add", [_by_subclass, _by_other_labels, _by_loss_function, _by_hook])
def test_a_loss_in_the_forward_may_have_more_labels_than_the_forward(add):
    ids = torch.arange(1, 33).view(2, 16) % 7 + 1
    labels = ids.clone()
    labels[:, 3:] = -100
    results = []
    for is_patched in (False, True):
        model = zoo.build("llama")
        add(model, ids)
        if is_patched:
            apply_liger_kernel(model, "fused_linear_cross_entropy")
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), model.lm_head.weight.grad))
    assert results[0][0].isfinite()
    for stock, patched in zip(*results, strict=True):
        torch.testing.assert_close(patched, stock, rtol=1e-4, atol=1e-5)
