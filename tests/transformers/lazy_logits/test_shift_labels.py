"""shift_labels alone, on a model that does not read them: its own loss shifts labels by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from liger_kernels.ops.backend import INTERPRETED
from liger_kernels.transformers import apply_liger_kernel

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs without the interpreter")


class ShiftsItself(transformers.LlamaForCausalLM):
    """A causal model as older classes and remote code have it: kwargs are not for its loss."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            rows = logits[..., :-1, :].reshape(-1, logits.shape[-1])
            loss = F.cross_entropy(rows.float(), labels[..., 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def build() -> Any:
    torch.manual_seed(0)
    return ShiftsItself(transformers.LlamaConfig(**zoo._text())).train()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


# The call with shift_labels, each way in which labels may be passed or left out.
CALLS = {
    "left-out": lambda model, ids, mask, shifted: model(ids, mask, shift_labels=shifted),
    "keyword": lambda model, ids, mask, shifted: model(
        input_ids=ids, attention_mask=mask, labels=None, shift_labels=shifted
    ),
    "positional": lambda model, ids, mask, shifted: model(ids, mask, None, shift_labels=shifted),
}


@pytest.mark.parametrize("call", CALLS)
def test_case_263_the_token_after_each_position_is_its_label(call):
    ids, mask, labels = zoo.text_inputs().values()
    # Labels other than the ids.
    labels = torch.where(labels == -100, labels, (labels + 7) % zoo.VOCAB_SIZE)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    stock, patched = build(), build()
    apply_liger_kernel(patched)
    wanted = F.cross_entropy(stock(ids, mask).logits.flatten(0, 1), shifted.flatten())
    loss = CALLS[call](patched, ids, mask, shifted).loss
    torch.testing.assert_close(loss, wanted, rtol=2e-5, atol=2e-5)
    stock_gradients = gradients(stock, wanted)
    for name, grad in gradients(patched, loss).items():
        torch.testing.assert_close(grad, stock_gradients[name], rtol=2e-4, atol=2e-6, msg=name)
    # And without gradients, where real logits are made.
    with torch.no_grad():
        torch.testing.assert_close(
            CALLS[call](patched.eval(), ids, mask, shifted).loss, wanted.detach()
        )
