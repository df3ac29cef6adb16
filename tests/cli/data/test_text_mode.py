"""text_mode: stream trains every token of texts that follow each other."""

from __future__ import annotations

import json
from itertools import chain, islice

import pytest

from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.stream import open_stream
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

TEXTS = ["a", "some words\n\nand more", "x" * 50, "the end"]
STREAM = RowOptions(16, 264, as_stream=True)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    return file


def all_ids(tokenizer, texts=TEXTS) -> list[int]:
    end = tokenizer.eos_token_id
    return list(chain.from_iterable([*tokenizer(text)["input_ids"], end] for text in texts))


@pytest.mark.parametrize("max_length", [2, 16, 1000])
def test_rows_joined_are_the_texts_joined(path, max_length):
    tokenizer = byte_tokenizer()
    found = load_examples(str(path), tokenizer, RowOptions(max_length, 264, as_stream=True))
    rows = list(found.examples)
    ids = list(chain.from_iterable(row["input_ids"] for row in rows))
    wanted = all_ids(tokenizer)
    # A last token alone would have nothing to predict.
    assert ids == wanted[: len(wanted) - (len(wanted) % max_length == 1)]
    assert {len(row["input_ids"]) for row in rows[:-1]} <= {max_length}
    for row in rows:
        assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    stats = found.stats
    assert (stats.rows, stats.tokens) == (len(rows), len(ids))
    assert (stats.trained_tokens, stats.truncated_rows) == (len(ids) - len(rows), 0)
    assert stats.unused_columns == ("id",)


def test_a_text_file_is_one_text(tmp_path):
    file = tmp_path / "d.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\n")
    tokenizer = byte_tokenizer()
    found = load_examples(str(file), tokenizer, STREAM)
    ids = list(chain.from_iterable(row["input_ids"] for row in found.examples))
    assert ids == all_ids(tokenizer, ["one\r\n\r\n  two\n"])
    assert load_examples(str(file), tokenizer, RowOptions(16, 264)).stats.rows == 2


def test_streamed_in_one_block_the_rows_are_the_same(path):
    tokenizer = byte_tokenizer()
    rows = [row["input_ids"] for row in load_examples(str(path), tokenizer, STREAM).examples]
    stream = open_stream(str(path), tokenizer, STREAM, buffer_size=10, seed=0).examples
    found = [row.row["input_ids"] for row in islice(stream.rows(stream.start()), len(rows))]
    assert sorted(found) == sorted(rows)


def test_other_rows_and_packing_are_refused(liger, tmp_path, path):
    other = tmp_path / "p.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="text_mode stream is for rows of text, and these are pro"):
        load_examples(str(other), byte_tokenizer(), STREAM)
    words = ("data", "preview", "-m", "qwen3", "-d", path, "--text-mode", "stream")
    done = liger(*words, "--packing")
    assert done.code == 2
    assert "text_mode stream fills rows by itself" in done.err
    assert liger(*words, "--max-length", 16).code == 0
