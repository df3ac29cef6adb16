"""Memory and placements of a launch, said before it: without ranks, weights or a GPU."""

from __future__ import annotations

import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from liger_cli.commands.inspect.layout import describe_layout
from liger_cli.config import load_config
from liger_cli.report.inspection import inspect_source
from liger_cli.training.memory import Batch, estimate_memory, meta_model_of
from liger_cli.training.model.source import resolve_model
from liger_cli.training.parallel.mesh import Layout, ParallelPlan
from liger_kernels.transformers.wrappers import inner_model

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
TABLE, ROOT = 1000 * 64, 1000 * 64 + 64
ALL = TABLE + 3 * LAYER + ROOT


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def is_tied(request):
    return request.param


def model_file(tmp_path, *, is_tied=False, **shape):
    path = tmp_path / "config.json"
    values = {**SHAPE, "tie_word_embeddings": is_tied, **shape}
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


def estimate(model, plan, **keys):
    config = load_config(flags={"model": model, "dp_shard_size": plan.dp_shard, **keys})
    return estimate_memory(config, resolve_model(model), Batch(1, 64), plan=plan)


SHARDS = ParallelPlan(1, 8)


def test_each_part_of_a_rank_follows_the_layout(tmp_path):
    model = model_file(tmp_path)
    alone = estimate(model, ParallelPlan(), optim="adamw_torch_fused")
    assert not alone.of_ranks
    copies = estimate(model, ParallelPlan(8, 1), optim="adamw_torch_fused")
    assert copies.of_ranks == {"buckets of DDP": alone.gradients}
    assert copies.peak == alone.peak + alone.gradients
    for plan in (SHARDS, ParallelPlan(2, 8)):
        found = estimate(model, plan, optim="adamw_torch_fused")
        for part in ("weights", "gradients", "optimizer"):
            assert getattr(found, part) == pytest.approx(getattr(alone, part) / 8, rel=0.1)
        # bfloat16 as on a GPU. Between forward and backward the root and, last, a layer's buffer.
        gathered = found.of_ranks["gathered weights"]
        assert 2 * (ROOT + 2 * TABLE) <= gathered <= 2 * (ROOT + 2 * TABLE + LAYER) + 10_000


@pytest.mark.parametrize(
    ("keys", "gathered", "to_sum"),
    [
        ({}, 2, 2),
        ({"bf16": True}, 2, 4),
        ({"bf16": True, "reduce_dtype": "bfloat16"}, 2, 2),
        ({"dtype": "float32"}, 4, 4),
        ({"dtype": "float32", "reduce_dtype": "bfloat16"}, 4, 2),
    ],
    ids=str,
)
def test_dtypes_of_gathers_and_sums_are_those_of_the_engine(tmp_path, keys, gathered, to_sum):
    found = estimate(model_file(tmp_path), SHARDS, reshard_after_forward=False, **keys)
    # All groups are there, and the buffer of the last.
    held = gathered * (ALL + LAYER)
    assert found.of_ranks["gathered weights"] == pytest.approx(held, rel=0.03)
    # In the end the gradients of root and table, and one of them once more to be summed.
    most = gathered * (ROOT + TABLE) + to_sum * ROOT
    assert found.of_ranks["gradients to sum"] == pytest.approx(most, rel=0.01)


def test_offloaded_shards_are_on_the_host(tmp_path):
    model = model_file(tmp_path)
    on_card, on_host = (estimate(model, SHARDS, cpu_offload=offload) for offload in (False, True))
    assert on_host.weights == on_host.gradients == on_host.optimizer == 0
    assert not on_card.offloaded
    for part, size in on_host.offloaded.items():
        assert size == pytest.approx(getattr(on_card, part), rel=0.1)
    assert on_host.peak < on_card.peak


def test_the_copy_of_async_save_is_weights_and_optimizer_on_the_host(tmp_path):
    model = model_file(tmp_path)
    assert estimate(model, ParallelPlan()).checkpoint_copy == 0
    for plan in (SHARDS, ParallelPlan(8, 1)):
        found, waits = (estimate(model, plan, async_save=on) for on in ("auto", False))
        assert found.checkpoint_copy == pytest.approx(found.weights + found.optimizer, rel=0.01)
        assert waits.checkpoint_copy == 0
        assert found.peak == waits.peak
    adapter = estimate(model, SHARDS, adapter="lora", lora_r=2)
    assert 0 < adapter.checkpoint_copy < found.checkpoint_copy / 100
    config = load_config(flags={"model": model, "async_save": True})
    on_cpu = [
        estimate_memory(keys, resolve_model(model), Batch(1, 64), on_gpu=False)
        for keys in (config, config.model_copy(update={"async_save": False}))
    ]
    assert on_cpu[0].peak - on_cpu[1].peak == on_cpu[0].checkpoint_copy > 0
    assert on_cpu[0].at_peak["copy for a checkpoint"] == on_cpu[0].checkpoint_copy


def test_of_an_adapter_only_its_own_gradients_are_summed(tmp_path):
    model = model_file(tmp_path)
    whole, adapter = estimate(model, SHARDS), estimate(model, SHARDS, adapter="lora", lora_r=2)
    assert adapter.of_ranks["gradients to sum"] < whole.of_ranks["gradients to sum"] / 10
    assert adapter.of_ranks["gathered weights"] > 2 * ALL / 2


def test_checkpointing_gathers_no_more(tmp_path):
    model = model_file(tmp_path)
    plain, again = (
        estimate(model, SHARDS, gradient_checkpointing=on).of_ranks["gathered weights"]
        for on in (False, True)
    )
    assert plain == again


@pytest.mark.parametrize("sizes", [(1, 8), (2, 4)])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_inspect_says_what_the_engine_does(tmp_path, is_tied, sizes, adapter):
    """On eight ranks that are not there, of which this process is the first."""
    from liger_cli.training.parallel.wrapping import shard_model

    name = model_file(tmp_path, is_tied=is_tied)
    keys = {"dp_replicate_size": sizes[0], "dp_shard_size": sizes[1], "adapter": adapter}
    config = load_config(flags={"model": name, **keys})
    source = resolve_model(name)
    report = inspect_source(source, "auto", config)
    layout = describe_layout(config, source, report.modules, 8)
    model = meta_model_of(config, source)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        plan = ParallelPlan(*sizes)
        shard_model(model, Layout(config, plan, torch.device("cpu")))
        inner = inner_model(model)
        groups = {
            id(part.sharded_param): "" if module is model else name
            for name, module in [("", model), *inner.named_modules()]
            if isinstance(module, FSDPModule)
            for part in module._get_fsdp_state()._fsdp_param_group.fsdp_params
        }
        found = {
            key: (
                ", ".join(map(repr, x.placements)).replace("(dim=", "("),
                x.to_local().numel() * x.element_size(),
                groups[id(x)],
            )
            for key, x in inner.named_parameters()
        }
    finally:
        dist.destroy_process_group()
    said = {row.name: (row.placement, row.bytes_per_rank, row.group) for row in layout.parameters}
    assert said == found
    assert {row.op for row in layout.parameters if "norm" in row.name} == {"rms_norm"}
    tables = {row.group for row in layout.parameters if "embed_tokens" in row.name}
    assert tables == ({""} if is_tied else {"model.embed_tokens"})
    assert layout.bytes_per_rank == sum(size for _, size, _ in found.values())


def test_estimate_of_eight_ranks(liger, tmp_path):
    common = ("estimate", "--model", model_file(tmp_path), "--seq-len", 64, "--json")
    by_keys = liger(*common, "--nproc", 8, "--dp-shard-size", -1).json()
    by_alias = liger(*common, "--fsdp", 8).json()
    assert by_keys == by_alias
    assert by_keys["ranks"]["dp_shard_size"] == 8
    alone = liger(*common).json()
    assert alone["ranks"] is None
    assert alone["peak"] > by_keys["peak"]
    mixed = liger(*common, "--nproc", 8, "--dp-replicate-size", 2).json()
    assert (mixed["ranks"]["dp_replicate_size"], mixed["ranks"]["dp_shard_size"]) == (2, 4)


def test_fit_shards_finds_the_fewest_that_fit(liger, tmp_path):
    model = model_file(tmp_path, vocab_size=200_000, hidden_size=1024)
    common = ("estimate", "--model", model, "--seq-len", 2048, "--json", "--gpu", 6, "--nproc", 8)
    found = liger(*common, "--fit", "shards").json()
    ranks, room = found["ranks"], found["card"]["usable"]
    assert ranks["dp_shard_size"] * ranks["dp_replicate_size"] == 8
    assert found["fit"]["key"] == "per_device_train_batch_size"
    assert 1 <= found["fit"]["value"] == found["batch_size"]
    assert found["peak"] <= room
    fewer = ranks["dp_shard_size"] // 2
    layout = ("--dp-shard-size", fewer, "--dp-replicate-size", 8 // fewer, "--batch-size", 1)
    assert liger(*common, *layout).json()["peak"] > room


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fsdp", 8, "--nproc", 8), "--fsdp 8 is short for"),
        (("--fsdp", 8, "--dp-shard-size", 2), "--fsdp 8 is short for"),
        (("--nproc", 8, "--dp-shard-size", 3), "this launch has 8 ranks"),
        (
            ("--nproc", 8, "--dp-shard-size", 8, "--adapter", "lora", "--load-in-8bit"),
            "cannot be gathered",
        ),
        (("--fit", "shards"), "fit needs a card"),
        (("--fit", "shards", "--gpu", 80, "--dp-shard-size", 2), "--fit shards finds"),
        (("--fit", "shards", "--gpu", 1.611, "--nproc", 2), "shared among 2 ranks"),
    ],
    ids=str,
)
def test_what_a_layout_cannot_be_is_refused(liger, tmp_path, words, said):
    outcome = liger("estimate", "--model", model_file(tmp_path), *words)
    assert outcome.code in (2, 3, 5)
    assert said in outcome.err


def test_weights_of_four_bits_are_gathered_packed(tmp_path):
    keys = {"adapter": "lora", "lora_r": 2}
    half, packed = (
        estimate(model_file(tmp_path), SHARDS, load_in_4bit=on, **keys) for on in (False, True)
    )
    # Embedding and head stay as they are; a layer takes about a quarter.
    saved = half.of_ranks["gathered weights"] - packed.of_ranks["gathered weights"]
    assert packed.weights < half.weights
    assert saved >= 0
    kept = [
        estimate(
            model_file(tmp_path), SHARDS, load_in_4bit=on, reshard_after_forward=False, **keys
        ).of_ranks["gathered weights"]
        for on in (False, True)
    ]
    assert kept[0] - kept[1] >= 3 * LAYER * 2 * 0.65
