"""In compiled code a loss that reads logits past the function mode is never a plausible number."""

from __future__ import annotations

import pytest
import torch
import zoo

from liger_kernels.transformers import apply_liger_kernel

_IDS = torch.arange(32).view(2, 16) % 7 + 1


def _hidden_loss(*, logits, labels, **rest):
    rows = logits.view(-1, logits.shape[-1])
    return torch._C._nn.cross_entropy_loss(rows, labels.view(-1), None, 1, -100, 0.0)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda model: torch.compile(model, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def test_a_function_that_dynamo_hides_gives_the_loss_or_nan(compiled):
    model = zoo.build("llama").train()
    model.loss_function = _hidden_loss
    stock = model(input_ids=_IDS, labels=_IDS).loss
    apply_liger_kernel(model, "fused_linear_cross_entropy")
    run = compiled(model)
    loss = run(input_ids=_IDS, labels=_IDS).loss
    assert loss.isnan() or torch.allclose(loss, stock, rtol=1e-4)
    # What the changelog tells who meets it.
    loss = run(input_ids=_IDS, labels=_IDS, skip_logits=False).loss
    torch.testing.assert_close(loss, stock, rtol=1e-4, atol=1e-5)
