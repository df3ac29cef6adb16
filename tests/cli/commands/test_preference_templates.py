"""The templates of preferences run as they are, and their sample is said to be of pairs."""

from __future__ import annotations

import math
import re

import pytest

from liger_cli.training.model.presets import configs_directory

TEMPLATES = configs_directory() / "train"
# The first pairs of the sample, and a small model of random weights.
SMALL = (
    *("-m", "qwen3", "--use-cpu", "--max-length", 96, "--max-steps", 2, "--logging-steps", 1),
    *("--set", "dataset=[{path: chitchat, max_samples: 60}]"),
)


@pytest.mark.parametrize("name", ["dpo", "orpo", "cpo", "simpo", "kto"])
def test_a_template_of_preferences_trains_on_the_sample(liger, tmp_path, name):
    path = TEMPLATES / f"{'cpo' if name == 'simpo' else name}.yaml"
    if name == "simpo":
        # The variant that stands in the comments of cpo.yaml, in place of its keys.
        text = re.sub(r"^(objective|beta|cpo_alpha):.*\n", "", path.read_text(), flags=re.MULTILINE)
        path = tmp_path / "simpo.yaml"
        path.write_text(re.sub(r"^# (\w+: [\w.]+)$", r"\1", text, flags=re.MULTILINE))
    done = liger("train", "-c", path, *SMALL, "-o", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    kind = "rows" if name == "kto" else "pairs"
    assert re.search(rf"data: chitchat .*: \d+ {kind}; .*the reply of another conv", done.err)
    report = done.json()
    assert report["config"]["objective"] == name
    assert report["train"]["steps"] == 2
    if name == "dpo":
        words = "48 pairs left out: an answer has no token to train on; 9 pairs cut to max_length"
        assert words in done.err
        # The adapter is new, so the model is its reference.
        assert report["train"]["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    if name == "kto":
        assert report["train"]["first_loss"] == pytest.approx(0.5, abs=1e-6)
