"""Keys around adapters: quantised base models, ranks by name, exclusions and parameters."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from run_files import assert_same, metrics, stopped_copy, weights

from liger_cli.config import load_config
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.memory import Batch, estimate_memory
from liger_cli.training.model.adapters import attach_adapter, new_adapter, quantization
from liger_cli.training.model.source import (
    build_meta_model,
    load_model,
    load_tokenizer,
    resolve_model,
)

LORA = ("--adapter", "lora", "--lora-r", 4, "--learning-rate", 1e-2)
EXPERTS = "experts.gate_up_proj,experts.down_proj"
IDS = torch.arange(3, 40)[None]


def save_base(path, preset="qwen3"):
    source = resolve_model(preset)
    load_model(source, dtype=torch.float32, seed=7).save_pretrained(path)
    load_tokenizer(source).save_pretrained(path)
    return path


def config(**flags):
    return load_config(flags={"model": "qwen3", "adapter": "lora", **flags})


def test_ranks_are_a_mapping_or_text(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(
        "model: qwen3\nadapter: lora\nlora_rank_pattern: {q_proj: 8, 'layers.1.*': 2}\n"
    )
    found = load_config(file)
    assert found == config(lora_rank_pattern="q_proj=8,layers.1.*=2")
    assert found.rank_pattern == {"q_proj": 8, "layers.1.*": 2}
    file.write_text(found.to_yaml())
    assert load_config(file) == found


@pytest.mark.parametrize(
    "value",
    ["q_proj", "q_proj=0", "q_proj=8.5", "=8", ",", "q_proj=8,q_proj=4", "(=3"],
)
def test_ranks_that_are_none_are_refused(value):
    with pytest.raises(ConfigError, match="lora_rank_pattern (should|has)"):
        config(lora_rank_pattern=value)


@pytest.mark.parametrize("value", ["{q_proj: true}", "{q_proj: 1.5}", "{q_proj: [8]}", "{1: 8}"])
def test_mappings_that_are_not_of_names_to_ranks_are_refused(tmp_path, value):
    file = tmp_path / "train.yaml"
    file.write_text(f"model: qwen3\nadapter: lora\nlora_rank_pattern: {value}\n")
    with pytest.raises(ConfigError, match="lora_rank_pattern"):
        load_config(file)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--lora-rank-pattern", "q_proj=8"), 2, "lora_rank_pattern is for an adapter"),
        (("--lora-exclude-modules", "q_proj"), 2, "lora_exclude_modules is for an adapter"),
        (("--lora-target-parameters", "a.b"), 2, "lora_target_parameters is for an adapter"),
        ((*LORA, "--lora-rank-pattern", "qproj=8"), 2, "qproj matches no module with an adapter"),
        ((*LORA, "--lora-exclude-modules", "o_porj"), 2, "o_porj is the name of no module"),
        ((*LORA, "--lora-target-parameters", "experts.w1"), 2, "experts.w1 is the name of no"),
        ((*LORA, "--lora-exclude-modules", ","), 2, "should name a module"),
        ((*LORA, "--lora-target-parameters", ","), 2, "should name a parameter"),
        (
            (*LORA, "--lora-target-parameters", "mlp.w", "--lora-dropout", 0.1),
            2,
            "lora_target_parameters needs lora_dropout 0",
        ),
        (
            ("--adapter", "dora", "--lora-target-parameters", "mlp.w"),
            2,
            "peft has no dora of a parameter",
        ),
        (("--load-in-8bit",), 2, "load_in_8bit holds a frozen model in 8 bits"),
        ((*LORA, "--load-in-8bit"), 2, "those of qwen3 are random"),
        ((*LORA, "--load-in-8bit", "--load-in-4bit"), 2, "exclude each other"),
        ((*LORA, "--bnb-4bit-quant-type", "fp4"), 2, "bnb_4bit_quant_type is for load_in_4bit"),
        ((*LORA, "--no-use-bnb-nested-quant"), 2, "use_bnb_nested_quant is for load_in_4bit"),
        ((*LORA, "--load-in-4bit", "--bnb-4bit-quant-type", "nf5"), 2, "did you mean 'nf4'?"),
    ],
)
def test_case_99_wrong_input_of_adapter_keys(train, run_dir, words, code, message):
    done = train(*words)
    assert done.code == code
    assert message in done.err
    assert not run_dir.exists()


def test_unknown_names_come_with_those_there_are(train):
    done = train(*LORA, "--lora-rank-pattern", "qproj=8")
    assert "self_attn.q_proj" in done.err
    done = train("-m", "qwen3-moe", *LORA, "--lora-target-parameters", "experts.w1")
    assert "There are: experts.gate_up_proj, experts.down_proj" in done.err


def test_ranks_and_exclusions_are_trained_resumed_and_merged(train, liger, tmp_path, run_dir):
    base = save_base(tmp_path / "base-model")
    words = ("-m", base, *LORA, "--lora-exclude-modules", "o_proj", "--lora-rank-pattern")
    words += ("q_proj=8,layers.1.*up_proj=2", "--max-steps", 4, "--save-steps", 2)
    done = train(*words)
    assert done.code == 0, done.err
    assert "lora of rank 2 to 8 on 12 modules" in done.err
    adapter = weights(run_dir / "checkpoint-4")
    ranks = {name: len(x) for name, x in adapter.items() if "lora_A" in name}
    for name, rank in ranks.items():
        expected = 8 if "q_proj" in name else 2 if "layers.1.mlp.up_proj" in name else 4
        assert rank == expected, name
    assert len(ranks) == 12
    assert not any("o_proj" in name for name in ranks)

    stopped = stopped_copy(run_dir, tmp_path / "stopped", 2)
    done = train(*words, "--output-dir", stopped, "--resume", "auto")
    assert done.code == 0, done.err
    assert_same(run_dir, stopped)
    check_merge(liger, run_dir / "checkpoint-4", tmp_path / "merged")


def test_experts_train_as_stock_and_are_merged(train, liger, tmp_path, run_dir):
    base = save_base(tmp_path / "base-model", "qwen3-moe")
    words = ("-m", base, *LORA, "--lora-target-modules", "q_proj")
    words += ("--lora-target-parameters", EXPERTS)
    for name, ops in (("stock", "none"), ("patched", "all")):
        done = train(*words, "--ops", ops, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
    stock, patched = (
        metrics(tmp_path / name, "loss", "grad_norm") for name in ("stock", "patched")
    )
    assert patched == [pytest.approx(row, rel=1e-3) for row in stock]
    checkpoint = tmp_path / "patched" / "checkpoint-3"
    assert any(value.abs().max() > 0 for key, value in weights(checkpoint).items() if "_B" in key)
    check_merge(liger, checkpoint, tmp_path / "merged")


def check_merge(liger, checkpoint, out):
    """The merged model computes what the adapted one does, and not what the base does."""
    from transformers import AutoModelForCausalLM

    done = liger("merge", checkpoint, "-o", out)
    assert done.code == 0, done.err
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    base = json.loads((checkpoint / "adapter_config.json").read_text())["base_model_name_or_path"]
    models = [load_model(resolve_model(str(m)), dtype=torch.float32) for m in (checkpoint, base)]
    with torch.no_grad():
        expected, stock, found = (model(input_ids=IDS).logits for model in (*models, merged))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - stock).abs().max() > 1e-3


def test_a_quantised_parameter_has_no_adapter():
    """Its values are packed: a change added to them would be another weight."""
    model = build_meta_model(resolve_model("qwen3"))
    layer = model.model.layers[0].mlp.up_proj
    packed = torch.empty(layer.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    wanted = config(
        lora_target_modules="q_proj", lora_target_parameters="layers.0.mlp.up_proj.weight"
    )
    with pytest.raises(ConfigError, match="weight is quantised"):
        attach_adapter(model, new_adapter(wanted, model), base="")


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_few_bits_without_a_gpu_or_bitsandbytes_say_what_is_missing(
    train, tmp_path, monkeypatch, key
):
    base = save_base(tmp_path / "base-model")
    done = train("-m", base, *LORA, f"--{key.replace('_', '-')}")
    assert done.code == 3
    assert f"{key} needs a CUDA GPU, and this run is on cpu" in done.err
    assert "pip install 'liger-kernels[quant]'" in done.err
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EnvironmentProblem, match="bitsandbytes") as caught:
        quantization(config(**{key: True}), resolve_model(str(base)), torch.device("cuda"))
    assert caught.value.hint == "pip install 'liger-kernels[quant]'"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"load_in_4bit": True}, ("nf4", True)),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
                "use_bnb_nested_quant": False,
            },
            ("fp4", False),
        ),
        ({"load_in_8bit": True}, None),
    ],
    ids=["nf4", "fp4", "8bit"],
)
def test_bits_are_those_of_the_keys(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.49" if "bits" in name else version(name)
    )
    source = resolve_model(str(save_base(tmp_path / "base-model")))
    found = quantization(config(**flags), source, torch.device("cuda"))
    assert found.load_in_8bit is (expected is None)
    assert found.load_in_4bit is (expected is not None)
    if expected:
        assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == expected


def test_bits_are_counted(tmp_path):
    base = save_base(tmp_path / "base-model")
    source = resolve_model(str(base))

    def estimate(**more):
        wanted = config(model=str(base), dtype="bfloat16", **more)
        return estimate_memory(wanted, source, Batch(1, 8))

    parameters = build_meta_model(source).named_parameters()
    num_packed = sum(parameter.numel() for name, parameter in parameters if "proj" in name)
    whole = estimate().weights
    for flags, value_bytes in (
        ({"load_in_4bit": True}, 0.516),
        ({"load_in_4bit": True, "use_bnb_nested_quant": False}, 0.5625),
        ({"load_in_8bit": True}, 1.0),
    ):
        saved = whole - estimate(**flags).weights
        assert saved == pytest.approx(num_packed * (2 - value_bytes), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "bits",
    [("--load-in-8bit",), ("--load-in-4bit", "--bnb-4bit-quant-type", "fp4")],
    ids=["8bit", "fp4"],
)
def test_few_bits_train_and_resume(train, tmp_path, run_dir, bits):
    pytest.importorskip("bitsandbytes")
    base = save_base(tmp_path / "base-model")
    words = ("-m", base, *LORA, *bits, "--no-use-cpu", "--optim", "paged_adamw_8bit")
    words += ("--max-steps", 8, "--save-steps", 4, "--json")
    done = train(*words)
    assert done.code == 0, done.err
    assert done.json()["train"]["final_loss"] < done.json()["train"]["first_loss"]
    losses = metrics(run_dir, "loss")
    again = train(*words, "--resume", run_dir / "checkpoint-4")
    assert again.code == 0, again.err
    assert metrics(run_dir, "loss") == losses
