"""liger bench --nproc and liger verify --nproc: figures and comparisons of several processes."""

from __future__ import annotations

import pytest

import liger_cli.commands.bench.models.scaling as scaling
from liger_cli.commands.bench.models.scaling import exposed_share
from liger_cli.commands.verify import ranks
from liger_cli.training.runtime.arms import ArmResult


def kernel(name, begin, end, kind="kernel"):
    return {"ph": "X", "cat": kind, "name": name, "ts": begin, "dur": end - begin}


NCCL = "ncclDevKernel_AllGather_RING_LL"


@pytest.mark.parametrize(
    ("events", "share"),
    [
        ([], None),
        ([kernel("aten::mm", 0, 10, "cpu_op"), {"ph": "M", "name": "process_name"}], None),
        ([kernel("gemm", 0, 10)], 0.0),
        ([kernel(NCCL, 0, 10)], 1.0),
        # Hidden, in part hidden, and after the rest with a gap in which nothing runs.
        ([kernel("gemm", 0, 10), kernel(NCCL, 2, 8)], 0.0),
        ([kernel("gemm", 0, 10), kernel(NCCL, 5, 20)], 0.5),
        ([kernel("gemm", 0, 4), kernel(NCCL, 6, 10)], 0.4),
        (
            [kernel("gemm", 0, 4), kernel("gemm", 3, 6), kernel(NCCL, 1, 8), kernel(NCCL, 7, 8)],
            0.25,
        ),
        ([kernel("Memcpy DtoH", 0, 5, "gpu_memcpy"), kernel(NCCL, 0, 10)], 0.5),
    ],
)
def test_the_share_of_collectives_that_nothing_hides(events, share):
    assert exposed_share(events) == (None if share is None else pytest.approx(share))


def test_rates_of_processes_against_the_fewest(monkeypatch, liger):
    """Each process has the same batch: twice the tokens a second on two are an efficiency of 1."""
    asked, copies = [], []

    def run_arm(config, *, name, ops, steps, ranks):
        asked.append((ranks.nproc, ranks.is_traced, config.dp_shard_size, steps))
        copies.append(config.dp_replicate_size)
        rate = {1: 100.0, 2: 190.0, 4: 300.0}[ranks.nproc]
        first = {"tokens_per_s": 1.0, "peak_memory_bytes": 7}
        return ArmResult(name, [first, *[{**first, "tokens_per_s": rate}] * 2], {}, [])

    monkeypatch.setattr(scaling, "run_arm", run_arm)
    words = ("bench", "--model", "qwen3", "--use-cpu", "--repeats", 2, "--dp-shard-size", -1)
    ran = liger(*words, "--nproc", "4,1,2", "--json")
    assert ran.code == 0, ran.err
    found = {row["nproc"]: row for row in ran.json()["rows"]}
    assert [(n, round(row["efficiency"], 3)) for n, row in found.items()] == [
        (1, 1.0),
        (2, 0.95),
        (4, 0.75),
    ]
    assert set(copies) == {1}
    liger(*words, "--nproc", "1,2,4", "--dp-replicate-size", 2)
    assert copies[-6:] == [1, 2, 2] * 2
    del asked[6:]
    # On a CPU nothing is traced, and the report says so.
    assert all(row["exposed"] is None for row in found.values())
    assert asked == [(1, False, None, 3), (2, False, -1, 3), (4, False, -1, 3)] * 2
    assert "not measured on a CPU" in liger(*words, "--nproc", "1,2").out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nproc", "2"), "--nproc 1,2"),
        (("--nproc", "1,x"), "numbers of processes"),
        (("--nproc", "1,2", "--ablate"), "Leave out --against"),
        (("--nproc", "1,2", "--dp-shard-size", 2), "--dp-shard-size -1"),
        (("--nproc", "1,3", "--dp-shard-size", -1, "--dp-replicate-size", 2), "which divides"),
        (("--nproc", "1,2", "--dp-replicate-size", 2), "which divides"),
        (("--nproc", "1,2", "--nnodes", 2), "one host"),
    ],
)
def test_what_bench_cannot_compare_is_refused(liger, words, said):
    ran = liger("bench", "--model", "qwen3", "--use-cpu", *words)
    assert ran.code == 2
    assert said in ran.err


def test_verify_takes_a_layout_for_several_ranks_alone(liger):
    ran = liger("verify", "--model", "qwen3", "--use-cpu", "--dp-shard-size", 2)
    assert ran.code == 2
    assert "add --nproc" in ran.err


def test_errors_of_ranks_are_relative_and_miss_nothing():
    import torch

    true = ([2.0], {"a": torch.tensor([3.0, 4.0]), "zero": torch.tensor([1e-9, 0.0])})
    found = ([2.2], {"a": torch.tensor([3.0, 4.5]), "zero": torch.tensor([-1e-9, 0.0])})
    errors = ranks._errors(true, found)
    assert errors["loss of step 1"] == pytest.approx(0.1)
    assert errors["gradient of a"] == pytest.approx(0.1)
    # Zero but for rounding: small beside all gradients.
    assert errors["gradient of zero"] < 1e-6
    found[1].pop("a")
    assert ranks._errors(true, found)["gradient of a"] == float("inf")
    # Half of a gradient, as of a rank that is missing, is over any limit.
    halved = ([2.0], {name: g / 2 for name, g in true[1].items()})
    assert not ranks._compared([true, true], halved, 1e-5)["ok"]
    assert ranks._compared([true, true], true, 1e-5)["ok"]
