"""A model that is an adapter already: its count is printed, and it is what training changes."""

from __future__ import annotations

import torch
from safetensors.torch import load_file


def test_case_228_an_adapter_that_is_trained_on_is_counted_and_changes(train, tmp_path):
    first = train("--adapter", "lora", "--lora-r", 4, "--output-dir", tmp_path / "first")
    assert first.code == 0, first.err
    [line] = [line for line in first.err.splitlines() if line.startswith("model:")]
    count = line.split("model: ")[1].split(" of ")[0]
    assert int(count.replace(" ", "")) > 0
    checkpoint = tmp_path / "first" / "checkpoint-3"

    second = train("--model", checkpoint, "--output-dir", tmp_path / "second")
    assert second.code == 0, second.err
    assert f"model: {count} of " in second.err
    name = "adapter_model.safetensors"
    before = load_file(checkpoint / name)
    after = load_file(tmp_path / "second" / "checkpoint-3" / name)
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[key], after[key]) for key in before)
