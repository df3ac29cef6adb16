"""The parts of a step: whatever the micro-batches, they add up to the same loss."""

from __future__ import annotations

import pytest
import torch
from objective_pairs import objective_of, tiny_experts
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from liger_cli.config.objectives import OBJECTIVES
from liger_cli.data.collate import Collator
from liger_cli.training.objectives.objective import Part, Totals
from liger_cli.training.objectives.reference import AdapterOff
from liger_cli.training.objectives.sft import NextToken
from liger_cli.training.result import STEP_FIELDS, StepMetrics

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


@pytest.mark.parametrize("name", sorted({*OBJECTIVES} - {"distill", "reward", "classify"}))
def test_every_mean_of_a_step_is_read_back(name):
    objective = objective_of(name, tiny_experts(balances=True))
    if name != "sft":
        assert objective.metrics[-1] == "aux_loss"
    means = dict.fromkeys(objective.metrics, 0.5)
    assert StepMetrics.from_row(dict.fromkeys(STEP_FIELDS, 1) | means).means == means


def test_reference_without_the_adapter_leaves_what_is_trained_alone():
    """FSDP takes requires_grad from a shard when it gathers it: in between it must not change."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2))
    ids = torch.arange(8)[None]
    wanted = model(ids).logits.detach()
    settings = LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"])
    model = get_peft_model(model, settings)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapted = model(ids).logits.detach()
    assert not torch.allclose(adapted, wanted)

    def score(adapted_model, batch):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
        return adapted_model(batch["input_ids"]).logits.detach()

    found = AdapterOff(model).sums(score, model, {"input_ids": ids})
    torch.testing.assert_close(found, wanted)
    assert torch.equal(model(ids).logits, adapted)
