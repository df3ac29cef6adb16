"""The tutorials on templates, tokens and thoughts: their commands run and print what is shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from liger_cli.training.model.source import load_model, resolve_model

PAGES = next(path for path in Path(__file__).parents if (path / "docs").is_dir())
PAGES = PAGES / "docs" / "tutorials"
NAMES = ("own-template", "new-tokens", "reasoning")

_FILE = re.compile(r"^`([\w.-]+)`:\n\n```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a page, and the lines that it shows."""
    for block in _CONSOLE.findall(page):
        for part in block.removeprefix("$ ").split("\n$ "):
            command, _, shown = part.partition("\n")
            yield command, [line for line in shown.splitlines() if line not in ("[...]", "")]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model: without a chat template, and with no special token but two."""
    words = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=numbers, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in words[:2]]
    )
    directory = tmp_path / "base"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    model = load_model(resolve_model("qwen3"))
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id = 0, 1
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_commands_print_what_the_page_shows(name, liger, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (PAGES / f"{name}.md").read_text("utf-8")
    for file, text in _FILE.findall(page):
        Path(file).write_text(text, encoding="utf-8")
    found = list(commands(page))
    assert len(found) >= 4
    for command, shown in found:
        words = shlex.split(command)
        assert words[0] == "liger"
        is_run = words[1] in ("train", "eval", "generate")
        done = liger(*words[1:], *(["--use-cpu"] if is_run else []))
        fails = any(line.startswith("error:") for line in shown)
        assert (done.code != 0) == fails, (command, done.err)
        lines = [line.rstrip() for line in (done.out + done.err).splitlines()]
        for line in shown:
            assert line in lines, (command, line, lines)
