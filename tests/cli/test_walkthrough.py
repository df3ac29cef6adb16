"""The ten commands of docs/tutorial.md are those of scripts/walkthrough.sh, and they run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script_commands() -> list[str]:
    lines = (ROOT / "scripts" / "walkthrough.sh").read_text().splitlines()
    return [line for line in lines if re.match(r"(make|liger) ", line)]


def test_tutorial_shows_the_commands_of_the_script():
    text = (ROOT / "docs" / "tutorial.md").read_text()
    shown = re.findall(r"^\$ (.*)$", text, re.MULTILINE)
    assert shown == script_commands()
    assert len(shown) == 10


def test_commands_run_in_turn(liger, data, tmp_path, monkeypatch):
    """With a small random model and a small dataset, which the flags put in the file's place."""
    monkeypatch.chdir(tmp_path)
    setup, *commands = script_commands()
    assert setup.startswith("make setup")
    outcomes = []
    for command in commands:
        words = [word.replace("llama", "qwen3") for word in shlex.split(command)[1:]]
        if "-c" in words:
            words += ["--dataset", data, "--use-cpu"]
            words += [] if "--model" in words else ["--model", "qwen3"]
        if words[0] == "generate":
            words.append("--use-cpu")
        outcomes.append(liger(*words))
        assert outcomes[-1].code == 0, (command, outcomes[-1].err)
    *_, merged, evaluated, answer = outcomes
    assert "modules merged into" in merged.out
    assert "perplexity" in evaluated.out
    assert answer.out
