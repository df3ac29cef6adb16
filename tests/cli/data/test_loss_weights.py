"""Weights of messages and rows: the weight that each token has, in every layout of a batch."""

from __future__ import annotations

import json

import pytest
import torch

from liger_cli.data import cache
from liger_cli.data.batches import PLACEHOLDER, count_weight, load_windows, without_nulls
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED, WEIGHTED, WEIGHTS
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.packing import PackedRows, weights_of
from liger_cli.data.stream import open_stream
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

END = "<|im_end|>"


def answered(*weights, row=None, user=None):
    """A conversation in which answer i is the letter i, with these fields."""
    messages = []
    for i, weight in enumerate(weights):
        messages.append({"role": "user", "content": "q", **(user or {})})
        fields = {} if weight is None else {"weight": weight}
        messages.append({"role": "assistant", "content": chr(ord("a") + i), **fields})
    return {"messages": messages, **(row or {})}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path, rows, max_length=512, **options):
    return load_examples(
        write(path, rows), byte_tokenizer(), RowOptions(max_length, 264, **options)
    )


def weighted(row):
    """The trained texts of a row, each with the weight of its tokens."""
    tokenizer = byte_tokenizer()
    found, before = [], None
    for token, label, weight in zip(row["input_ids"], row["labels"], weights_of(row), strict=True):
        assert (weight > 0) == (label != IGNORED)
        key = None if label == IGNORED else weight
        if key is not None:
            text = tokenizer.decode([token])
            if key == before:
                found[-1] = (found[-1][0] + text, key)
            else:
                found.append((text, key))
        before = key
    return found


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (answered(0.5, None), [(f"a{END}", 0.5), (f"b{END}", 1.0)]),
        (answered(0, 2), [(f"b{END}", 2.0)]),
        (answered(0.5, 2, row={"loss_weight": 3}), [(f"a{END}", 1.5), (f"b{END}", 6.0)]),
        (answered(None, 0.5, row={"loss_mask": [0, 1, 0, 1]}), [(f"a{END}", 1), (f"b{END}", 0.5)]),
        (answered(0.5, 0.5, row={"mask_history": True}), [(f"b{END}", 0.5)]),
        ({"prompt": "q", "completion": "a", "loss_weight": 0.5}, [(f"a{END}", 0.5)]),
        ({"text": "abc", "sample_weight": "0.5"}, [(f"bc{END}", 0.5)]),
        ({"instruction": "q", "output": "a", "weight": 4}, [(f"a{END}", 4.0)]),
        ({"input_ids": [3, 4, 5], "labels": [-100, -100, 5], "loss_weight": 2}, None),
        ({"conversations": [{"from": "human", "value": "q"},
                            {"from": "gpt", "value": "a", "loss_scale": 0.5}]}, [(f"a{END}", 0.5)]),
    ],
)  # fmt: skip
def test_tokens_have_the_weight_of_row_times_message(tmp_path, row, expected):
    found = load(tmp_path / "d.jsonl", [row])
    [made] = found.examples
    if expected is None:
        assert made[WEIGHTS] == [0, 0, 2]
    else:
        assert [(text, pytest.approx(weight)) for text, weight in expected] == weighted(made)
    assert found.stats.left_out[WEIGHTED] == 1


def test_whole_conversations_have_weights_at_their_answers(tmp_path):
    [row] = load(tmp_path / "d.jsonl", [answered(0.5, None)], assistant_only=False).examples
    parts = weighted(row)
    assert [part for part in parts if part[1] != 1] == [(f"a{END}", 0.5)]
    assert f"b{END}" in parts[-1][0]


def test_rows_whose_weights_are_0_and_1_have_no_column(tmp_path):
    rows = [answered(0, 1), answered(1.0, None), answered(2, row={"weight": 0.5})]
    found = load(tmp_path / "d.jsonl", rows)
    assert found.examples.column_names == ["input_ids", "labels"]
    assert WEIGHTED not in found.stats.left_out


@pytest.mark.parametrize("max_length", [16, 40, 60])
def test_a_row_that_is_cut_keeps_the_weights_of_what_is_left(tmp_path, max_length):
    rows = [answered(0.5, 2, 0.25)]
    [whole] = load(tmp_path / "d.jsonl", rows).examples
    num_left = sum(label != IGNORED for label in whole["labels"][:max_length])
    if not num_left:
        with pytest.raises(DataError, match="a token to train on"):
            load(tmp_path / "d.jsonl", rows, max_length)
        return
    [row] = load(tmp_path / "d.jsonl", rows, max_length).examples
    assert row[WEIGHTS] == whole[WEIGHTS][:max_length]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (answered(1, user={"weight": 0.5}), {}, "message 0 of user has the weight 0.5; only answ"),
        (
            answered(1, user={"weight": 0.5}),
            {"assistant_only": False},
            "message 0 of user has the weight 0.5; only answers have one",
        ),
        (answered(0.5, row={"train": False, "weight": 2}), {}, "train says not trained"),
        (answered(1, row={"weight": 2, "loss_weight": 3}), {}, "weight is 2 and loss_weight is 3"),
        ({"text": "abc", "weight": 0.5}, {"as_stream": True}, "text_mode stream joins all texts"),
        (answered(-1), {}, "weight is -1; allowed are 0 .not trained. and numbers from"),
        (answered(row={"loss_mask": [0.5]}), {}, "loss_mask.0. is 0.5; allowed are 0 .not trained"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "loss_weight": 0.5},
            {"pairs": True},
            "pairs have no loss weights but 0 and 1",
        ),
    ],
)  # fmt: skip
def test_weights_that_are_refused(tmp_path, row, options, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path / "d.jsonl", [row], **options)


ROWS = [answered(0.5, None), answered(None), answered(2, row={"weight": 3}), answered(None, 0, 1)]


def total(rows):
    return sum(sum(weights_of(row)) for row in rows)


def pairs_of(ids, weights):
    """The tokens that have a weight, each with it."""
    return sorted(pair for pair in zip(ids, weights, strict=True) if pair[1])


@pytest.mark.parametrize("layout", ["padded", "padding free", "packed", "packed flat"])
@pytest.mark.parametrize("multiple", [1, 8])
def test_batches_have_the_weight_of_each_token(tmp_path, layout, multiple):
    examples = load(tmp_path / "d.jsonl", ROWS).examples
    rows = list(map(without_nulls, examples))
    packed = PackedRows.of(examples, 512, "bfd")
    given = [packed[i] for i in range(len(packed))] if "packed" in layout else rows
    options = {"padding_free": layout == "padding free", "flatten": layout == "packed flat"}
    batch = Collator(0, multiple, **options)(given)
    assert batch[WEIGHTS].shape == batch["labels"].shape
    assert batch[WEIGHTS].dtype == torch.float32
    assert torch.equal(batch[WEIGHTS] > 0, batch["labels"] != IGNORED)
    assert count_weight(batch) == pytest.approx(total(rows))
    # Every token has its weight in every layout.
    found = pairs_of(batch["input_ids"].flatten().tolist(), batch[WEIGHTS].flatten().tolist())
    assert found == sorted(
        pair for row in rows for pair in pairs_of(row["input_ids"], weights_of(row))
    )


def test_every_batch_of_data_with_weights_has_them(tmp_path):
    """Of a mixture and of packed rows too: processes that share a model then compute alike."""
    write(tmp_path / "plain.jsonl", ROWS[1:2] * 3)
    write(tmp_path / "weighted.jsonl", ROWS)
    options = RowOptions(512, 264)
    names = f"{tmp_path / 'plain.jsonl'},{tmp_path / 'weighted.jsonl'}"
    joined = load_examples(names, byte_tokenizer(), options).examples
    packed = PackedRows.of(load(tmp_path / "d.jsonl", ROWS).examples, 80, "sequential")
    assert len(packed) > 2
    for rows in (joined, packed):
        windows = iter([[[number]] for number in (*range(len(rows)), PLACEHOLDER)])
        found = [batch for [batch] in load_windows(rows, windows, Collator())]
        assert all(WEIGHTS in batch for batch in found)
        assert sum(map(count_weight, found[:-1])) == pytest.approx(
            total(rows[i] for i in range(len(rows)))
        )
        assert count_weight(found[-1]) == 0


def test_batches_of_rows_without_weights_have_none(tmp_path):
    rows = list(map(without_nulls, load(tmp_path / "d.jsonl", ROWS).examples))
    batch = Collator()([row for row in rows if WEIGHTS not in row])
    assert WEIGHTS not in batch
    assert count_weight(batch) == int((batch["labels"] != IGNORED).sum())


@pytest.mark.parametrize("has_weights", [True, False])
def test_the_cache_keeps_weights_that_only_later_rows_have(tmp_path, monkeypatch, has_weights):
    from liger_cli.data import examples

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 0)
    monkeypatch.setattr(examples, "BATCH", 2)
    rows = [answered(None), answered(None), answered(None), answered(0.5 if has_weights else None)]
    found = [load(tmp_path / "d.jsonl", rows) for _ in range(2)]
    for one in found:
        assert (WEIGHTS in one.examples.column_names) == has_weights
        assert weighted(one.examples[3]) == [(f"a{END}", 0.5 if has_weights else 1.0)]


@pytest.mark.parametrize("packing", [None, "bfd"])
def test_streamed_rows_have_their_weights(tmp_path, packing):
    path = write(tmp_path / "d.jsonl", ROWS)
    options = RowOptions(512, 264)
    stream = open_stream(
        path, byte_tokenizer(), options, buffer_size=4, seed=0, packing=packing
    ).examples
    rows = stream.rows(stream.start())
    made = [next(rows).row for _ in range(1 if packing else 4)]
    expected = load(tmp_path / "d.jsonl", ROWS).examples
    assert total(made) == pytest.approx(total(expected))


def test_preview_lists_the_weight_of_each_token(liger, tmp_path):
    path = write(tmp_path / "d.jsonl", [answered(0.5, None), answered(None)])
    words = ("data", "preview", "--model", "qwen3", "--chat-template", "chatml", "--dataset", path)
    done = liger(*words, "--ids", "--json")
    assert done.code == 0, done.err
    first, second = done.json()["rows"]
    assert len(first["weights"]) == len(first["listed"])
    assert set(first["weights"]) == {0, 0.5, 1}
    assert "weights" not in second
    done = liger(*words, "--ids")
    assert any(line.split()[-1:] == ["weight"] for line in done.out.splitlines())
    assert f"1 {WEIGHTED}" in done.out
