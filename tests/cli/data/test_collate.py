"""Truncation, synthetic rows, the sample, and padding."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from data_rows import CONVERSATION, SAID, check_labels, load, make_tokenizer, write

from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.samples import read_sample
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.model.source import load_tokenizer, resolve_model
from liger_cli.training.model.tokenizers import byte_tokenizer

# Counts, lengths, order.


def test_truncation_is_counted(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "abcdef", "completion": "xyz"},
        {"prompt": "abcdefgh", "completion": "xyz"},
        {"prompt": "a", "completion": "x"},
    )
    examples = load(path, max_length=8)
    stats = examples.stats
    assert (stats.rows, stats.dropped_rows, stats.truncated_rows) == (2, 1, 1)
    assert [len(row["input_ids"]) for row in examples.examples] == [8, 3]
    assert (stats.tokens, stats.trained_tokens) == (11, 4)


def test_synthetic():
    options = {"options": RowOptions(16, 50)}
    train = load_examples("synthetic", None, **options)
    assert [len(row["input_ids"]) for row in train.examples] == [16] * 1024
    assert train.stats.tokens == 1024 * 16
    assert train.stats.trained_tokens == 1024 * 15
    ids = torch.tensor(train.examples["input_ids"][:])
    assert 0 <= ids.min() <= ids.max() < 50
    for row in train.examples:
        check_labels(row)
    again = load_examples("synthetic", None, **options)
    assert again.examples[:] == train.examples[:]
    for other in ({"seed": 1}, {"split": "eval"}):
        assert load_examples("synthetic", None, **options, **other).examples[:] != train.examples[:]


def sample(**options):
    return load_examples("chitchat", byte_tokenizer(), RowOptions(256, 264), **options)


@pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("chitchat_dataset"),
    reason="needs the package chitchat-dataset: make setup",
)
def test_sample(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    read = "liger_cli.data.sources.read_sample"
    monkeypatch.setattr(read, lambda split: islice(read_sample(split), 20))
    train, evaluation = sample(), sample(split="eval")
    assert train.licence == "MIT"
    assert train.stats.rows + train.stats.dropped_rows == 20
    assert train.stats.columns == ("messages",)
    assert sample().examples[:] == train.examples[:]
    texts = [byte_tokenizer().decode(ids) for ids in train.examples["input_ids"]]
    assert not set(texts) & {byte_tokenizer().decode(x) for x in evaluation.examples["input_ids"]}
    assert all(text.startswith("<|im_start|>user\n") for text in texts)
    assert sum(text.count("<|im_start|>assistant") > 1 for text in texts) > 5


def test_sample_package_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="not installed") as caught:
        sample()
    assert "pip install chitchat-dataset==0.9.0" in caught.value.hint


# Batches.


def test_case_98_padding_is_a_place_and_not_a_token(tmp_path):
    tokenizer = make_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    path = write(tmp_path / "d.jsonl", {"text": "hello"}, {"text": "hello there, yes"})
    short, long = load(path, tokenizer).examples
    batch = Collator.for_tokenizer(tokenizer)([short, long])
    assert {value.dtype for value in batch.values()} == {torch.int64}
    length = len(short["input_ids"])
    assert batch["labels"][0, length - 1] == tokenizer.eos_token_id
    assert batch["input_ids"][0].tolist() == (
        short["input_ids"] + [tokenizer.eos_token_id] * (len(long["input_ids"]) - length)
    )
    assert (batch["labels"][0, length:] == IGNORED).all()
    assert batch["labels"][1].tolist() == long["labels"]
    assert batch["attention_mask"].sum(1).tolist() == [length, len(long["input_ids"])]


def test_padding_to_a_multiple():
    row = {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}
    batch = Collator(9, 8)([row])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9, 9, 9, 9, 9]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7, *[IGNORED] * 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]]
    assert Collator.for_tokenizer(None).pad_token_id == 0


def test_preset_tokenizer_trains_a_conversation(tmp_path):
    path = write(tmp_path / "d.jsonl", {"messages": CONVERSATION})
    source = resolve_model("llama-1b")
    examples = load(path, load_tokenizer(source), vocab_size=source.config["vocab_size"])
    assert examples.stats.trained_tokens == sum(len(text) + 1 for text in SAID)
