"""Sides of a comparison on long rows: each has of tiles and offloading what its model can have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from liger_cli.config import load_config
from liger_cli.errors import LigerError
from liger_cli.training.runtime import arms

LONG = {"gradient_checkpointing": True, "activation_offloading": True, "tile_tokens": 64}


@pytest.mark.parametrize(
    ("ops", "is_compiled", "tiles", "offloads"),
    [
        ("auto", False, "64", True),
        ("none", False, "none", True),
        ("rope", False, "none", True),
        ("geglu", False, "64", True),
        ("auto", True, "none", False),
        ("none", True, "none", False),
    ],
)
def test_a_side_has_what_its_model_can_have(monkeypatch, ops, is_compiled, tiles, offloads):
    found = []

    def run(command, environment):
        # As the process reads it, which refuses what does not go together.
        found.append(load_config(Path(command[3])))
        return subprocess.CompletedProcess(command, 1, "", "error: enough")

    monkeypatch.setattr(arms, "_run", run)
    config = load_config(flags={"model": "qwen3", **LONG})
    with pytest.raises(LigerError, match="enough"):
        arms.run_arm(config, name="side", ops=ops, steps=2, torch_compile=is_compiled)
    (side,) = found
    assert (side.tile_tokens, side.activation_offloading) == (tiles, offloads)
    assert side.ops == ops
