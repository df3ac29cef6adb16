"""New tokens beside an adapter, wherever the weights lie in memory."""

from __future__ import annotations

import pytest
import torch

from liger_cli.config import load_config
from liger_cli.training.model.adapters import attach_adapter, new_adapter
from liger_cli.training.model.extended import extend_source
from liger_cli.training.model.source import load_model, resolve_model


@pytest.mark.parametrize("name", ["qwen3", "mistral"])
def test_rows_of_new_tokens_are_trained_wherever_the_weights_lie(name):
    """A file of weights is mapped, and what is computed from it is rounded by its place."""
    keys = {"model": name, "adapter": "lora", "add_tokens": "look,find,act"}
    config = load_config(None, keys)
    source = extend_source(config, resolve_model(name))
    for offset in range(16):
        model = load_model(source)
        for parameter in model.parameters():
            place = torch.empty(parameter.numel() + offset)[offset:].view(parameter.shape)
            parameter.data = place.copy_(parameter.data)
        adapted = attach_adapter(
            model, new_adapter(config, model, source.tokens), base="", trains=True
        )
        rows = [n for n, p in adapted.named_parameters() if "tokens_delta" in n and p.requires_grad]
        assert rows


def test_run_of_an_odd_number_of_rows_is_resumed(tmp_path, liger):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "look and find"}\n{"text": "find it and act on it"}\n')
    words = ["train", "--model", "qwen3", "--dataset", texts, "--use-cpu", "--max-length", 32]
    words += ["--add-tokens", "look,find,act", "--adapter", "lora", "--output-dir", tmp_path / "r"]
    assert liger(*words, "--max-steps", 1).code == 0
    done = liger(*words, "--max-steps", 2, "--resume", "auto")
    assert done.code == 0, done.err
