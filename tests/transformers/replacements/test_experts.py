"""Experts that run moe_experts: equal to stock, also where options and settings are others."""

from __future__ import annotations

import pytest
import torch
import transformers
import zoo
from checks import assert_same, run

from liger_kernels.transformers import apply_liger_kernel

# Of version 4: its gpt_oss is no candidate, and nobody chooses how experts are computed.
v5 = pytest.mark.skipif(not zoo.IS_V5, reason="transformers 5 alone has this")

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Class of the configuration, its sizes, patched modules of moe_experts and of swiglu.
MODELS = {
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 4, "head_dim": 8, "output_router_logits": True},
        2,
        0,
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "output_router_logits": True,
        },
        2,
        2,
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "output_router_logits": True}, 2, 0),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        1,
        2,
    ),
}  # fmt: skip


def build(name: str, **options) -> transformers.PreTrainedModel:
    prefix, sizes, _, _ = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **sizes, **options})
    return zoo.spread(getattr(transformers, f"{prefix}ForCausalLM")(config)).train()


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[v5] if name == "gpt_oss" else []) for name in MODELS]
)
def test_step_equals_stock_router_and_auxiliary_loss_too(name):
    _, _, num_experts, num_mlps = MODELS[name]
    model = build(name)
    stock, outputs = run(model, inputs()), model(**inputs())
    routers = [n for n, g in stock.grads.items() if "router" in n or n.endswith("gate.weight")]
    assert all(stock.grads[n].abs().max() > 0 for n in routers if "bias" not in n)
    record = apply_liger_kernel(model, "all")
    assert record.coverage["moe_experts"] == {"patched": num_experts, "candidates": num_experts}
    found = record.coverage.get("swiglu", {"patched": 0})
    assert found["patched"] == num_mlps
    with record.count_calls():
        assert_same(run(model, inputs()), stock)
    assert not record.unused
    if getattr(outputs, "aux_loss", None) is not None:
        torch.testing.assert_close(model(**inputs()).aux_loss, outputs.aux_loss)


def test_other_ops_leave_experts_as_they_are():
    model = build("qwen2_moe")
    experts = model.model.layers[0].mlp.experts
    cls = type(experts)
    record = apply_liger_kernel(model, "swiglu,rms_norm")
    assert type(experts) is cls
    assert record.coverage["moe_experts"] == {"patched": 0, "candidates": 2}
    assert record.coverage["swiglu"]["patched"] == 2


def test_memory_between_forward_and_backward():
    sizes = {}
    for save_memory in (True, False):
        model = build("olmoe")
        stock = run(model, inputs())
        apply_liger_kernel(model, "moe_experts", save_memory=save_memory)
        assert_same(run(model, inputs()), stock)
        kept = []

        def pack(x, kept=kept):
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(**inputs())
        sizes[save_memory] = sum(kept)
    # Of each of 14 tokens and 2 choices the gathered token and the activation, in 2 layers.
    assert sizes[False] - sizes[True] == 2 * 14 * 2 * (32 + 48)


@v5
def test_settings_that_the_gate_reads_may_change():
    model, stock = build("gpt_oss"), build("gpt_oss")
    record = apply_liger_kernel(model, "moe_experts")
    for each in (model, stock):
        for layer in each.model.layers:
            layer.mlp.experts.alpha, layer.mlp.experts.limit = 1.1, 0.4
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    assert not record.unused


@v5
def test_a_parallel_plan_of_experts_runs_stock_code():
    model = build("olmoe")
    stock = run(model, inputs())
    record = apply_liger_kernel(model, "moe_experts")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with record.count_calls():
        assert_same(run(model, inputs()), stock)
    assert len(record.unused) == 1


@v5
@pytest.mark.parametrize("chosen", ["eager", "grouped_mm", "batched_mm"])
def test_an_implementation_chosen_after_patching_runs(chosen):
    model, stock = build("qwen2_moe"), build("qwen2_moe")
    record = apply_liger_kernel(model, "all")
    usual = model.config._experts_implementation
    for each in (model, stock):
        each.set_experts_implementation(chosen)
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    unused = {f"model.layers.{i}.mlp.experts" for i in range(2)} if chosen != usual else set()
    assert record.unused == unused


# Cases that a block of experts may be built as: no choice, one expert, widths of no kernel.
ODD = {
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "every-expert": {"num_experts_per_tok": 4},
    "odd-width": {"moe_intermediate_size": 7, "shared_expert_intermediate_size": 5},
}


@pytest.mark.parametrize("frozen", [None, "experts", "gate.weight", "down_proj"])
@pytest.mark.parametrize("name", ODD)
def test_odd_configurations_and_frozen_parts(name, frozen):
    options = {"experts_implementation": "eager"} if zoo.IS_V5 else {}
    model, stock = (build("qwen2_moe", **ODD[name], **options) for _ in range(2))
    for each in (model, stock):
        for parameter_name, parameter in each.named_parameters():
            parameter.requires_grad_(frozen is None or frozen not in parameter_name)
    record = apply_liger_kernel(model, "all")
    with record.count_calls():
        assert_same(run(model, inputs()), run(stock, inputs()))
    assert not record.unused


def test_generation_follows_what_transformers_chooses():
    model = build("qwen2_moe", output_router_logits=False).eval()
    ids = inputs()["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    apply_liger_kernel(model, "all")
    assert torch.equal(model.generate(ids, **options), wanted)
