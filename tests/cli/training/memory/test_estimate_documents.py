"""The memory of steps on packed and padding-free rows: no mask, no padding, no scores."""

from __future__ import annotations

import pytest

from liger_cli.config import load_config
from liger_cli.training.memory.limits import RunMemory
from liger_cli.training.model.source import resolve_model
from liger_cli.training.parallel.mesh import ParallelPlan

MIB = 1 << 20


def peak(model: str = "qwen3", *, is_padded: bool = False, **keys) -> int:
    flags = {"model": model, "per_device_train_batch_size": 2, "max_length": 2048, **keys}
    config = load_config(flags=flags)
    memory = RunMemory.assumed(config, resolve_model(model), ParallelPlan(), is_padded=is_padded)
    return memory.estimate().peak


def test_packed_rows_take_what_rows_of_one_document_take():
    plain = peak()
    assert peak(packing=True) == pytest.approx(plain, rel=0.01)
    # The mask of documents, its copy in bfloat16, and keys for every head.
    assert peak(packing=True, attn_implementation="sdpa") > plain + 16 * MIB


def test_padding_free_rows_need_no_mask():
    plain = peak()
    assert peak(is_padded=True) == pytest.approx(plain, rel=0.01)
    assert peak(is_padded=True, padding_free="false") > plain + 16 * MIB


def test_flex_attention_makes_no_scores():
    """Of gemma2, whose capped scores eager attention makes whole."""
    eager = peak("gemma2", packing=True, attn_implementation="eager")
    assert peak("gemma2", packing=True) < eager - 100 * MIB


def test_on_a_cpu_it_is_the_mask():
    keys = {"use_cpu": True, "dtype": "float32"}
    plain = peak(packing=True, **keys)
    assert peak(packing=True, attn_implementation="liger_varlen", **keys) == pytest.approx(
        plain, rel=0.02
    )


def test_command_takes_the_keys(liger):
    words = ("estimate", "--model", "qwen3", "--seq-len", 64, "--json")
    assert liger(*words, "--packing").code == 0
    free = liger(*words, "--padded")
    padded = liger(*words, "--padded", "--no-padding-free")
    assert free.json()["peak"] < padded.json()["peak"]
