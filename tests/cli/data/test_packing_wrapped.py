"""Packing with a model inside of a wrapper, whose own forward hides the arguments it passes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BloomForCausalLM

from liger_cli.data.packing import check_packed, refuse_packing
from liger_cli.errors import ConfigError
from liger_cli.training.model.source import build_meta_model, load_model, resolve_model
from liger_kernels.transformers.wrappers import forward_parameters, forward_takes, inner_model

LORA = ("--adapter", "lora", "--lora-r", 4)
SMALL = ("--per-device-train-batch-size", 1, "--max-steps", 2)


def metrics(run_dir: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [
        LORA,
        ("--adapter", "dora", "--lora-r", 4),
        (*LORA, "--lora-modules-to-save", "embed_tokens,lm_head"),
    ],
    ids=["lora", "dora", "saved"],
)
def test_case_221_packed_adapter_equals_unpatched(train, tmp_path, words):
    for name, ops in (("eager", "none"), ("patched", "all")):
        out = ("--output-dir", tmp_path / name, "--ops", ops, "--learning-rate", 1e-2)
        done = train(*words, *out, "--packing", *SMALL)
        assert done.code == 0, done.err
        assert "packed into" in done.err
    for key in ("loss", "grad_norm"):
        eager, patched = (metrics(tmp_path / name, key) for name in ("eager", "patched"))
        assert patched == pytest.approx(eager, rel=1e-3)
        assert len(set(eager)) == 2


def test_case_221_packed_adapter_has_the_loss_of_single_documents(train, tmp_path):
    """All 23 rows in one step: their mean loss does not depend on how they are put into rows."""
    words = ("--max-steps", 1, "--ops", "all", "--per-device-train-batch-size", 23)
    losses = []
    for name, packing in (("single", "--no-packing"), ("packed", "--packing")):
        done = train(*LORA, *words, packing, "--output-dir", tmp_path / name)
        assert done.code == 0, done.err
        losses += metrics(tmp_path / name, "loss")
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "words", [("--dry-run",), ("--streaming", "--ops", "none", "--max-steps", 1)]
)
def test_case_221_dry_runs_and_streams_pack_under_an_adapter(train, words):
    done = train(*LORA, "--packing", *words)
    assert done.code == 0, done.err


class Generic(nn.Module):
    """A wrapper that says nothing about its arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def peft_around(model):
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "query_key_value"]}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))


WRAPPERS = {
    "peft": peft_around,
    "generic": Generic,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled-peft": lambda model: torch.compile(peft_around(model), backend="eager"),
    "generic-compiled": lambda model: Generic(torch.compile(model, backend="eager")),
    "generic-peft": lambda model: Generic(peft_around(model)),
}


@pytest.fixture
def bloom():
    from transformers import BloomConfig

    config = BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)
    with torch.device("meta"):
        return BloomForCausalLM(config)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_case_221_checks_look_through_wrappers(wrap):
    model = build_meta_model(resolve_model("qwen3"))
    wrapped = wrap(model)
    assert inner_model(wrapped) is model
    assert list(forward_parameters(wrapped)) == list(forward_parameters(model))
    refuse_packing(wrapped, 64)


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_case_221_a_model_without_positions_is_refused_in_any_wrapper(wrap, bloom):
    with pytest.raises(ConfigError, match="bloom cannot train on packed rows: its forward takes"):
        refuse_packing(wrap(bloom), 64)


def test_case_221_a_forward_that_hides_its_arguments_is_asked_in_memory():
    model = load_model(resolve_model("qwen3"), dtype=torch.float32, seed=3)
    forward = model.forward
    model.forward = lambda **given: forward(**given)
    assert forward_takes(model, "position_ids") is None
    refuse_packing(model, 64)
    check_packed(Generic(model))

    def forget(**given):
        given.pop("position_ids", None)
        return forward(**given)

    model.forward = forget
    refuse_packing(model, 64)
    with pytest.raises(ConfigError, match="a document in a row sees the one before it"):
        check_packed(Generic(model))
