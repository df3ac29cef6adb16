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
