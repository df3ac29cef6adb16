"""The parts of a step: whatever the micro-batches, they add up to the same loss."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from liger_cli.data.collate import Collator
from liger_cli.training.objectives.objective import Part, Totals
from liger_cli.training.objectives.sft import NextToken

CPU = torch.device("cpu")
ROWS = [
    {"input_ids": [3 + i] * (2 + 3 * i), "labels": [-100] + [3 + i] * (1 + 3 * i)} for i in range(4)
]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_add_up_to_the_mean_over_all_trained_tokens(size):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    objective = NextToken(model, CPU)
    batches = [Collator()(ROWS[i : i + size]) for i in range(0, len(ROWS), size)]
    totals = sum(map(objective.count, batches), Totals())
    assert totals == Totals(tokens=26, labels=22, weight=22)
    parts = [objective.part(model, batch, totals) for batch in batches]
    total = parts[0]
    for part in parts[1:]:
        total = Part.plus(total, part)
    whole = model(**Collator()(ROWS), use_cache=False).loss
    assert total.loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert total.metrics.numel() == len(objective.metrics) == 0
