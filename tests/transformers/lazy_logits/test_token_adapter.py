"""A head whose rows of some tokens are trained by PEFT: fused loss, and the stock gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from liger_kernels.transformers.api import apply_liger_kernel

peft = pytest.importorskip("peft")

SIZES = {"vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_of_a_head_with_trained_rows(is_tied):
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, tie_word_embeddings=is_tied)
    model = AutoModelForCausalLM.from_config(config)
    rows = {name: [300, 303] for name in ("model.embed_tokens", "lm_head")[: 2 - is_tied]}
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules="all-linear", trainable_token_indices=rows
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patched = peft.get_peft_model(model, settings)
    stock = copy.deepcopy(patched)
    record = apply_liger_kernel(patched, "all")
    assert record.coverage["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}
    ids = torch.randint(304, (2, 9))
    ids[0, 3], ids[1, 4] = 300, 303
    labels = torch.where(torch.rand(2, 9) < 0.3, -100, ids)
    found = []
    for each in (stock, patched):
        out = each.train()(input_ids=ids, labels=labels)
        (2.5 * out.loss).backward()
        found.append((out.loss, {n: p.grad for n, p in each.named_parameters() if p.requires_grad}))
    (loss, gradients), (fused, others) = found
    torch.testing.assert_close(fused, loss)
    assert sum("tokens_delta" in name for name in gradients) == 2 - is_tied
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    # The logits were never there as a whole.
    head = patched.get_base_model().lm_head
    assert head._num_losses == 1
