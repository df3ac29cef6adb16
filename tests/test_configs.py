"""Every file of configs/ loads."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("path", sorted((CONFIGS / "train").glob("*.yaml")), ids=lambda p: p.name)
def test_train_config_loads(path):
    from liger_cli.config import load_config

    config = load_config(path, flags={}, sets=[])
    assert config.model
    # It is a file to start from: what it is for stands above.
    assert path.read_text().startswith("# ")


def test_every_kind_of_training_has_a_file():
    names = {path.stem for path in (CONFIGS / "train").glob("*.yaml")}
    kinds = {"sft", "full", "pretrain", "eval", "ddp", "fsdp2", "dpo", "orpo", "cpo", "kto"}
    kinds |= {"distill", "reward", "classify"}
    assert kinds <= names


def test_every_folder_has_a_loader():
    folders = {path.parent.name for path in CONFIGS.rglob("*.yaml")}
    assert folders <= {"models", "train"}, "a new kind of configuration needs a test that loads it"
