"""Adapters in inspect, verify and estimate: lora_linear is counted, compared and accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from liger_cli.config import load_config
from liger_cli.training.memory import Batch, estimate_memory
from liger_cli.training.model.source import resolve_model

pytest.importorskip("peft", reason="peft is not installed")
OP = "lora_linear"


def test_inspect_counts_the_layers_of_an_adapter(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "llama-8b", "--adapter", "lora", "--require", OP, "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert found["coverage"][OP] == {"patched": 224, "candidates": 224}
    # The layers around them count as before.
    assert found["coverage"]["swiglu"] == found["coverage"]["rope"]
    assert found["coverage"]["rope"] == {"patched": 32, "candidates": 32}
    assert found["config"] == {"model": "llama-8b", "ops": "auto", "adapter": "lora"}


@pytest.mark.parametrize(
    ("words", "counts", "reason"),
    [
        (["--lora-target-modules", "q_proj,v_proj"], (4, 4), None),
        (["--ops", "auto,-lora_linear"], (0, 14), "not requested: add lora_linear to ops"),
        (["--adapter", "dora"], (14, 14), None),
    ],
    ids=["some", "removed", "dora"],
)
def test_inspect_says_why_a_layer_is_left(
    words: list[str], counts: tuple[int, int], reason: str | None, liger: Callable[..., Any]
) -> None:
    found = liger("inspect", "--model", "mistral", "--adapter", "lora", *words, "--json").json()
    patched, candidates = counts
    assert found["coverage"][OP] == {"patched": patched, "candidates": candidates}
    rows = [row for row in found["modules"] if row["op"] == OP and row["status"] == "skipped"]
    assert len(rows) == candidates - patched
    assert all(reason in row["reason"] for row in rows)


def test_without_an_adapter_there_is_no_such_op(liger: Callable[..., Any]) -> None:
    assert OP not in liger("inspect", "--model", "mistral", "--json").json()["coverage"]
    ran = liger("inspect", "--model", "mistral", "--require", OP)
    assert ran.code == 7


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_bad_key_of_an_adapter_is_a_configuration_error(
    command: str, liger: Callable[..., Any]
) -> None:
    ran = liger(command, "--model", "mistral", "--adapter", "lora", "--lora-r", "0")
    assert ran.code == 2
    assert "lora_r" in ran.err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_compares_the_gradients_of_an_adapter(dtype: str, liger: Callable[..., Any]) -> None:
    words = ["--model", "mistral", "--adapter", "lora", "--lora-dropout", "0.1", "--dtype", dtype]
    ran = liger("verify", *words, "--use-cpu", "--json")
    assert ran.code == 0, ran.err
    found = ran.json()
    assert found["coverage"][OP] == {"patched": 14, "candidates": 14}
    gradients = {part["name"] for part in found["gradients"]}
    assert len(gradients) == 28
    assert all("lora_" in name for name in gradients)
    assert {part["op"] for part in found["ops"] if part["reason"] is None} >= {OP, "swiglu"}
    rows = [part for part in found["modules"] if part["op"] == OP]
    assert len(rows) == 14
    assert all(part["tensor"]["ok"] for part in rows)


def test_verify_finds_a_wrong_adapter(
    liger: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from liger_kernels.ops.adapted_linear import LayerGroup

    right = LayerGroup._matrices

    def wrong(self: LayerGroup) -> tuple[torch.Tensor, list[torch.Tensor]]:
        a, b = right(self)
        return 1.1 * a, b

    monkeypatch.setattr(LayerGroup, "_matrices", wrong)
    words = ["--model", "mistral", "--adapter", "lora", "--dtype", "float32", "--use-cpu"]
    # auto would leave the op out.
    ran = liger("verify", *words, "--ops", "all", "--json")
    assert ran.code == 7
    found = ran.json()
    assert not found["ok"]
    rows = [part for part in found["modules"] if part["op"] == OP]
    assert len(rows) == 14
    assert not any(part["tensor"]["ok"] for part in rows)


SHAPE = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 2048,
    "vocab_size": 256,
    "pad_token_id": 0,
}


def test_estimate_knows_what_the_layers_keep(tmp_path: Path) -> None:
    """A layer keeps x once, and what q, k and v share is kept once for the three."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(SHAPE), encoding="utf-8")

    def estimate(**keys: Any) -> Any:
        config = load_config(None, {"model": str(model), "adapter": "lora", "bf16": False, **keys})
        return estimate_memory(config, resolve_model(config.model), Batch(1, 256))

    ours, peft_own = estimate(), estimate(ops="auto,-lora_linear")
    tokens, layers, inner, width, rank, half = 256, 2, 2048, 512, 16, torch.bfloat16.itemsize
    # gate and up alone, and three small products.
    assert ours.activations["mlp"] == layers * tokens * (2 * inner + 3 * rank) * half
    assert ours.activations["attention"] < peft_own.activations["attention"]
    assert sum(ours.activations.values()) < 0.92 * sum(peft_own.activations.values())
    packed = estimate(load_in_4bit=True)
    assert packed.activations == ours.activations
    assert packed.weights < 0.7 * ours.weights
    # Beside what is kept, one weight at a time is dequantised.
    assert packed.peak - packed.weights < ours.peak - ours.weights + 2 * inner * width * half


@pytest.mark.parametrize("ops", ["auto", "none"])
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_estimate_of_dora_on_a_model_in_few_bits(key: str, ops: str, tmp_path: Path) -> None:
    """Its layers unpack their weights for the norms, patched and in peft's code."""
    model = tmp_path / "config.json"
    model.write_text(json.dumps(SHAPE), encoding="utf-8")

    def estimate(**keys: Any) -> Any:
        common = {"model": str(model), "adapter": "dora", "bf16": False, "ops": ops}
        config = load_config(None, {**common, **keys})
        return estimate_memory(config, resolve_model(config.model), Batch(1, 256))

    packed, whole = estimate(**{key: True}), estimate()
    assert packed.weights < 0.8 * whole.weights
    lora = estimate(**{key: True}, adapter="lora")
    assert sum(packed.activations.values()) > sum(lora.activations.values())


def test_shipped_lora_configuration_trains_with_the_op(
    liger: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["--model", "mistral", "--dataset", "synthetic", "--use-cpu", "--max-length", "16"]
    words += ["--adapter", "lora", "--max-steps", "1", "--require", OP, "--json"]
    ran = liger("train", *words, "-o", str(tmp_path / "run"))
    assert ran.code == 0, ran.err
    assert ran.json()["coverage"][OP] == {"patched": 14, "candidates": 14}
