"""The layout of a run follows from its keys, and sizes that do not fit are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.memory import choice
from liger_cli.training.model.presets import ModelSource
from liger_cli.training.parallel.groups import has_separate_experts
from liger_cli.training.parallel.mesh import ParallelPlan, explicit_plan, refitted
from liger_cli.training.parallel.refusals import check_model, check_sharded

SOURCE = ModelSource("random", "qwen3", None, {}, "", "qwen3")


@pytest.mark.parametrize(
    ("num_ranks", "replicate", "shard", "plan"),
    [
        (1, 1, None, (1, 1)),
        (1, 1, -1, (1, 1)),
        (4, 1, None, None),
        (4, 1, -1, (1, 4)),
        (4, 1, 4, (1, 4)),
        (4, 2, -1, (2, 2)),
        (4, 2, None, (2, 2)),
        (4, 4, None, (4, 1)),
        (4, 4, 1, (4, 1)),
        (6, 2, 3, (2, 3)),
    ],
)
def test_sizes_make_the_layout(num_ranks, replicate, shard, plan):
    config = RunConfig(model="qwen3", dp_replicate_size=replicate, dp_shard_size=shard)
    found = explicit_plan(config, num_ranks)
    assert found == (None if plan is None else ParallelPlan(*plan))


@pytest.mark.parametrize(
    ("num_ranks", "replicate", "shard"), [(1, 2, None), (4, 1, 1), (4, 3, -1), (4, 2, 4), (2, 4, 1)]
)
def test_sizes_that_do_not_make_up_the_ranks_are_refused_with_those_that_do(
    num_ranks, replicate, shard
):
    config = RunConfig(model="qwen3", dp_replicate_size=replicate, dp_shard_size=shard)
    with pytest.raises(EnvironmentProblem, match=f"this launch has {num_ranks} rank") as caught:
        explicit_plan(config, num_ranks)
    assert f"--dp-replicate-size 1 --dp-shard-size {num_ranks}" in caught.value.hint
    assert f"--dp-replicate-size {num_ranks} --dp-shard-size 1" in caught.value.hint


@pytest.mark.parametrize(
    ("sizes", "was", "now", "wanted"),
    [
        ((1, 2), 2, 1, (1, 1)),
        ((1, 2), 2, 4, (1, 4)),
        ((1, -1), 2, 4, (1, 4)),
        ((2, 2), 4, 8, (2, 4)),
        ((2, 2), 4, 2, (1, 2)),
        ((2, None), 4, 3, (1, 3)),
        ((2, None), 2, 1, (1, 1)),
        ((2, 1), 2, 4, (4, 1)),
        ((1, None), 2, 4, None),
    ],
)
def test_sizes_follow_a_launch_of_other_ranks(sizes, was, now, wanted):
    config = RunConfig(model="qwen3", dp_replicate_size=sizes[0], dp_shard_size=sizes[1])
    found = explicit_plan(refitted(config, was, now), now)
    assert found == (None if wanted is None else ParallelPlan(*wanted))


@pytest.mark.parametrize(("asked", "found"), [(2, -1), (3, 3), (None, None)])
def test_a_resumed_run_changes_no_size_that_is_asked_for(asked, found, monkeypatch):
    manifest = {"config": {"dp_replicate_size": 1, "dp_shard_size": 2}, "num_processes": 2}
    monkeypatch.setattr(choice, "read_manifest", lambda checkpoint: manifest)
    config = RunConfig(model="qwen3", dp_shard_size=asked)
    resumed = choice.with_sizes_of_launch(Path("checkpoint-2"), config, 1)
    assert (resumed.dp_replicate_size, resumed.dp_shard_size) == (1, found)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fp16": True}, "fp16 .* --bf16"),
        ({"optim": "adamw_8bit"}, "optim adamw_8bit .* --optim adamw_torch_fused"),
        ({"optim": "paged_adamw_8bit"}, "optim paged_adamw_8bit"),
        ({"adapter": "lora", "load_in_8bit": True}, "quantised .*--load-in-4bit.*DDP"),
        ({"adapter": "lora", "load_in_4bit": True, "cpu_offload": True}, "4 bits.*cpu_offload"),
        ({"adapter": "lora", "lora_target_parameters": "experts.down_proj"}, "DDP"),
        ({"auto_fit": True}, "auto_fit"),
        ({"objective": "dpo", "sync_ref_model": True}, "sync_ref_model.*DDP"),
        ({"optim": "muon", "cpu_offload": True}, "optim muon .*--optim adamw_torch"),
    ],
)
def test_what_shards_cannot_do_is_refused_with_the_nearest(keys, words):
    config = RunConfig(model="qwen3", dp_shard_size=-1, **keys)
    with pytest.raises(ConfigError) as caught:
        check_sharded(config, SOURCE, torch.device("cuda"))
    assert re.search(words, f"{caught.value.message} {caught.value.hint}")


def test_experts_in_separate_modules_are_found():
    """A rank that does not call a module would leave the others waiting for it."""
    shape = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)
    model = LlamaForCausalLM(config)
    assert not has_separate_experts(model)
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    assert has_separate_experts(model)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_copies_of_both_ends_of_a_tied_model_are_refused(names, is_tied):
    shape = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, tie_word_embeddings=is_tied))
    settings = LoraConfig(target_modules=["q_proj"], modules_to_save=names)
    model = get_peft_model(model, settings)
    if is_tied and len(names) == 2:
        with pytest.raises(ConfigError, match="one matrix in two places"):
            check_model(model)
    else:
        check_model(model)


def test_a_sharded_run_does_the_rest():
    check_sharded(
        RunConfig(model="qwen3", dp_shard_size=-1, optim="muon"), SOURCE, torch.device("cuda")
    )


@pytest.mark.parametrize("key", ["reshard_after_forward=false", "cpu_offload=true"])
def test_keys_of_shards_need_shards(key, liger):
    outcome = liger("config", "show", "--model", "qwen3", "--set", key)
    assert outcome.code == 2
    assert "set dp_shard_size" in outcome.err


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("tp_size=2", "tensor"),
        ("tensor_parallel_size=2", "tensor"),
        ("context_parallel_size=2", "context"),
        ("expert_parallel_degree=2", "expert"),
    ],
)
def test_keys_of_other_parallelisms_are_refused_by_their_word(key, kind, liger):
    outcome = liger("config", "show", "--model", "qwen3", "--set", key)
    assert outcome.code == 2
    assert f"{kind} parallelism is not there yet" in outcome.err


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("fsdp=full_shard", "dp_shard_size -1 shards"),
        ("fsdp_config={version: 2}", "dp_shard_size -1 shards"),
        ("deepspeed=zero3.json", "dp_shard_size -1 shards"),
        ("nproc=2", "give --nproc"),
        ("num_processes=2", "give --nproc"),
        ("num_machines=2", "give --nnodes"),
    ],
)
def test_keys_of_other_launches_name_what_to_give(key, advice, liger):
    outcome = liger("config", "show", "--model", "qwen3", "--set", key)
    assert outcome.code == 2
    assert advice in outcome.err
