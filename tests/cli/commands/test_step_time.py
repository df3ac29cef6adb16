"""The time of a step before the run: beside steps of one and two cards, and by hand."""

from __future__ import annotations

import json

import pytest

from liger_cli.commands.estimate.machine import Machine, RankGroup
from liger_cli.commands.estimate.step_time import layouts_of, step_time
from liger_cli.commands.estimate.work import work_of
from liger_cli.config import load_config
from liger_cli.training.memory import Batch, MemoryEstimate
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.model.source import build_meta_model, resolve_model
from liger_cli.training.parallel.mesh import ParallelPlan

ONE, DDP, FSDP2 = ParallelPlan(), ParallelPlan(2, 1), ParallelPlan(1, 2)
MIXED = {"dtype": "float32", "bf16": True}


def work(model, size, **keys):
    """The work of a step of rows of 2048 tokens, with AdamW in the dtype of the parameters."""
    model = str(model)
    keys["per_device_train_batch_size"] = size
    config = load_config(flags={"model": model, "max_length": 2048, **keys})
    source = resolve_model(model)
    itemsize = 4 if config.dtype == "float32" else 2
    weights = itemsize * sum(p.numel() for p in build_meta_model(source).parameters())
    found = MemoryEstimate(
        weights=weights,
        optimizer=2 * weights,
        gradients=weights,
        activations={},
        logits=0,
        head_buffers=0,
        kept_for_loss=0,
        of_ranks={},
        offloaded={},
        at_peak={},
        phases={},
    )
    return work_of(RunMemory(config, source, Batch(size, 2048), on_gpu=True), found)


@pytest.fixture(scope="module")
def llama_1b():
    return work("llama-1b", 8)


@pytest.fixture(scope="module")
def llama_8b():
    return work("llama-8b", 4, gradient_checkpointing=True)


# Tokens a second of all cards, on one and two H200 in one run: liger's patch, 2048 tokens a row.
MEASURED = {
    "1b-one": ("llama_1b", ONE, 71_081),
    "1b-ddp": ("llama_1b", DDP, 132_915),
    "1b-fsdp2": ("llama_1b", FSDP2, 132_675),
    "8b-one": ("llama_8b", ONE, 10_060),
    "8b-fsdp2": ("llama_8b", FSDP2, 18_827),
}


@pytest.mark.parametrize("case", MEASURED)
def test_rates_are_those_of_one_and_two_cards(case, request):
    name, plan, rate = MEASURED[case]
    found = request.getfixturevalue(name)
    total = step_time(found, Machine(), plan).total
    assert found.tokens * plan.num_processes / total == pytest.approx(rate, rel=0.02)


def test_float32_shards_that_compute_in_bfloat16():
    found = work("llama-8b", 4, gradient_checkpointing=True, **MIXED)
    total = step_time(found, Machine(), FSDP2).total
    assert 2 * found.tokens / total == pytest.approx(17_944, rel=0.04)


# Milliseconds of 8 x 2048 tokens on one card.
@pytest.mark.parametrize(
    ("model", "layers", "ms"), [("qwen3-30b-a3b", 6, 213), ("mixtral-8x7b", 2, 190)]
)
def test_a_mixture_computes_with_the_experts_that_a_token_goes_to(tmp_path, model, layers, ms):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**resolve_model(model).config, "num_hidden_layers": layers}))
    assert step_time(work(path, 8), Machine(), ONE).total * 1e3 == pytest.approx(ms, rel=0.06)


def test_a_collective_takes_its_slowest_link_and_its_hops():
    machine = Machine(intra=100e9, inter=10e9, per_host=4, intra_hop=1e-6, inter_hop=10e-6)
    assert machine.neighbours(2) == RankGroup(2, 2)
    assert machine.neighbours(8) == RankGroup(8, 4)
    assert machine.spread(16, 4) == RankGroup(16, 1)
    assert machine.spread(16, 2) == RankGroup(16, 2)
    assert machine.gather(1e9, RankGroup(1, 1)) == 0
    assert machine.gather(1e9, RankGroup(4, 4)) == pytest.approx(0.75e9 / 100e9 + 3e-6)
    # Half of it enters a host, by the network cards of four ranks.
    across = 0.5e9 / (4 * 10e9)
    assert machine.gather(1e9, RankGroup(8, 4)) == pytest.approx(across + 6e-6 + 10e-6)
    alone = machine.all_reduce(1e9, RankGroup(2, 1))
    assert alone == pytest.approx(2 * (0.5e9 / 10e9 + 10e-6))


def test_what_hides_and_what_does_not(llama_8b):
    fast, slow = Machine(), Machine(intra=20e9)
    hidden, exposed = (step_time(llama_8b, machine, FSDP2) for machine in (fast, slow))
    assert hidden.exposed < 0.12 * hidden.collectives
    # Gathers alone take longer than the forward then.
    assert exposed.exposed > 0.25 * exposed.collectives
    assert exposed.total - hidden.total > exposed.exposed - hidden.exposed
    keys = {"dp_shard_size": -1, "reshard_after_forward": False}
    kept = work("llama-8b", 4, gradient_checkpointing=True, **keys)
    assert step_time(kept, fast, FSDP2).collectives < 0.75 * hidden.collectives


def test_copies_are_summed_once_a_step(llama_1b):
    four = work("llama-1b", 8, gradient_accumulation_steps=4)
    sent = [step_time(found, Machine(), DDP).collectives for found in (llama_1b, four)]
    assert sent[0] == pytest.approx(sent[1])
    sent = [step_time(found, Machine(), FSDP2).collectives for found in (llama_1b, four)]
    assert 4 * sent[0] == pytest.approx(sent[1])


def test_shards_of_all_pay_on_few_hosts_and_copies_on_many(llama_8b):
    def fastest(num_ranks):
        plans = [plan for plan in layouts_of(num_ranks, 8) if plan.is_sharded]
        return min(plans, key=lambda plan: step_time(llama_8b, Machine(), plan).total)

    assert fastest(64) == ParallelPlan(1, 64)
    assert fastest(512) == ParallelPlan(8, 64)
    assert fastest(4096) == ParallelPlan(64, 64)


def test_layouts_are_copies_hosts_and_all():
    assert layouts_of(2, 8) == [DDP, FSDP2]
    assert layouts_of(24, 8) == [ParallelPlan(24, 1), ParallelPlan(3, 8), ParallelPlan(1, 24)]
    assert len(layouts_of(4096, 8)) == 5


def test_estimate_shows_the_time_of_each_layout(liger):
    words = ("estimate", "--model", "mistral", "--nproc", 16, "--seq-len", 128)
    done = liger(*words, "--dp-shard-size", -1, "--json")
    assert done.code == 0, done.err
    rows = done.json()["times"]
    assert [(row["dp_replicate_size"], row["dp_shard_size"]) for row in rows] == [
        *((16, 1), (2, 8), (1, 16)),
    ]
    assert rows[-1]["peak"] == done.json()["peak"]
    done = liger(*words, "--gpus-per-node", 4, "--dp-replicate-size", 4)
    assert done.code == 0, done.err
    assert "the fastest, whatever its memory: " in done.out
    assert "HSDP, 4 copies sharded over 4 ranks each " in done.out
    for more in (("--dtype", "float32"), ("--use-cpu",)):
        assert liger(*words, *more, "--json").json()["times"] == []


def test_memory_of_other_layouts_is_about_theirs(tmp_path, liger):
    shape = resolve_model("llama-1b").config
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**shape, "num_hidden_layers": 4, "tie_word_embeddings": False}))

    def estimated(*sizes):
        words = ("--nproc", 16, "--dp-replicate-size", sizes[0], "--dp-shard-size", sizes[1])
        return liger("estimate", "--model", path, "--seq-len", 512, *words, "--json").json()

    for row in estimated(1, 16)["times"]:
        peak = estimated(row["dp_replicate_size"], row["dp_shard_size"])["peak"]
        assert row["peak"] == pytest.approx(peak, rel=0.15), row
