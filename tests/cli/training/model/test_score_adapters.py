"""Adapters beside a score head, which is trained whole: in half precision and in few bits."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from run_files import weights
from safetensors.torch import load_file

from liger_cli.commands.train import prepare
from liger_cli.config import load_config
from liger_cli.training.memory.packed import packed_layers
from liger_cli.training.model import loading
from liger_cli.training.model.adapters import attach_adapter, new_adapter, quantization
from liger_cli.training.model.classifiers import with_labels
from liger_cli.training.model.source import (
    build_meta_model,
    load_model,
    load_tokenizer,
    resolve_model,
)

LORA = ("--adapter", "lora", "--lora-r", 4, "--learning-rate", 1e-2)
CUDA = torch.device("cuda")


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base-model"
    source = resolve_model("qwen3")
    load_model(source, dtype=torch.bfloat16, seed=7).save_pretrained(path)
    load_tokenizer(source).save_pretrained(path)
    return path


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"say {i} " * (1 + i % 4), "label": "abc"[i % 3]} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(**flags):
    return load_config(flags={"model": "qwen3", "adapter": "lora", **flags})


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_few_bits_leave_out_the_head(base, monkeypatch, key):
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace())
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "0.49" if "bits" in name else version(name)
    )
    source = resolve_model(str(base))
    scored = with_labels(source, ["a", "b"])
    found = [quantization(config(**{key: True}), one, CUDA) for one in (scored, source)]
    assert [one.llm_int8_skip_modules for one in found] == [["score"], None]


@pytest.mark.parametrize("key", ["llm_int8_skip_modules", "modules_to_not_convert"])
def test_a_new_head_of_quantised_files_is_left_out(key):
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, key: ["lm_head"]}
    source = resolve_model("qwen3")
    source.config["quantization_config"] = packed
    found = with_labels(source, ["a", "b"]).config["quantization_config"]
    assert found == {**packed, key: ["lm_head", "score"]}
    assert packed[key] == ["lm_head"]


def test_the_estimate_packs_no_head():
    source = with_labels(resolve_model("qwen3"), ["a", "b"])
    model = build_meta_model(source)
    model = attach_adapter(model, new_adapter(config(), model), base="")
    packed = set(map(id, packed_layers(model)))
    assert len(packed) == 14
    assert not packed & {id(layer) for layer in model.base_model.model.score.modules()}


@pytest.mark.parametrize("name", ["nope", "lm_head"])
def test_a_module_that_a_classifier_has_not_is_named(train, texts, name):
    done = train(*LORA, "-d", texts, "--objective", "classify", "--lora-modules-to-save", name)
    assert done.code == 2
    assert f"lora_modules_to_save: {name} is the name of no module" in done.err


def check_run(train, liger, base, texts, run_dir, merged, *more):
    """Train a head beside an adapter, and merge it."""
    words = ("-m", base, "-d", texts, *LORA, "--objective", "classify", "--seed", 3, *more)
    done = train(*words, "--max-steps", 4, "--eval-dataset", texts, "--json")
    assert done.code == 0, done.err
    names = [name for name in weights(run_dir / "checkpoint-4") if "score" in name]
    assert len(names) == 1
    head = weights(run_dir / "checkpoint-4")[names[0]]
    assert head.dtype == torch.float32
    first = train(*words, "--max-steps", 1, "--learning-rate", 0, "-o", run_dir / "first")
    assert first.code == 0, first.err
    assert (weights(run_dir / "first" / "checkpoint-1")[names[0]] - head).abs().mean() > 1e-3
    done = liger("merge", run_dir / "checkpoint-4", "-o", merged)
    assert done.code == 0, done.err
    saved = load_file(merged / "model.safetensors")
    assert torch.equal(saved["score.weight"], head.to(torch.bfloat16))
    assert json.loads((merged / "config.json").read_text())["id2label"]["2"] == "c"


def test_a_head_beside_a_model_in_half_precision(train, liger, base, texts, run_dir, tmp_path):
    check_run(train, liger, base, texts, run_dir, tmp_path / "merged", "--dtype", "bfloat16")


def test_a_head_beside_a_model_in_4_bits(train, liger, base, texts, run_dir, tmp_path, monkeypatch):
    """On a CPU, which bitsandbytes computes for: a run asks for a GPU."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    kept = []

    def on_cpu(config, source, device):
        return quantization(config, source, CUDA)

    def attached(model, settings, **options):
        kept.append(model)
        return attach_adapter(model, settings, **options)

    for module in (loading, prepare):
        monkeypatch.setattr(module, "quantization", on_cpu)
    monkeypatch.setattr(loading, "attach_adapter", attached)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    words = ("--load-in-4bit", "--dtype", "bfloat16")
    check_run(train, liger, base, texts, run_dir, tmp_path / "merged", *words)
    model = kept[0]
    assert type(model.model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    assert type(model.score.original_module) is torch.nn.Linear
    assert model.score.original_module.weight.dtype == torch.bfloat16
