"""Labelled answers: their formats, mistakes in them, mismatched answers, and batches."""

from __future__ import annotations

import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from data_rows import load, make_tokenizer, write

from liger_cli.data.collate import Collator
from liger_cli.data.examples import RowOptions
from liger_cli.data.feed import identity
from liger_cli.data.packing import PackedRows
from liger_cli.data.stream import open_stream
from liger_cli.data.synthetic import make_synthetic
from liger_cli.data.unpaired_batches import UnpairedCollator, mismatch, partners
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
USER = {"role": "user", "content": "What is it?"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}
EARLIER = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
SHARED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "yes"}]


def read(path, **options):
    return load(path, make_tokenizer(CHATML), row_options={"unpaired": True}, **options)


def scored(row) -> str:
    ids = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    return make_tokenizer(CHATML).decode(ids)


BAD = {"prompt": "p ", "completion": "no", "label": False}
FORMS = {
    "text": [{"prompt": "p ", "completion": "yes", "label": True}, BAD],
    "messages": [
        {"prompt": [*EARLIER, USER], "completion": [YES], "label": True},
        {"prompt": [USER], "completion": [NO], "label": False},
    ],
    "conversation": [
        {"messages": [*EARLIER, USER, YES], "label": True},
        {"messages": [USER, NO], "label": False},
    ],
    "kto_tag": [
        {"conversations": SHARED, "kto_tag": True},
        {"conversations": [SHARED[0], {"from": "gpt", "value": "no"}], "kto_tag": False},
    ],
    "instruction": [
        {"instruction": "p", "output": "yes", "label": 1},
        {"instruction": "p", "input": "more", "output": "no", "label": "False"},
    ],
    "pairs": [{"prompt": [USER], "chosen": [YES], "rejected": [NO]}],
    "pairs of texts": [{"prompt": "p ", "chosen": "yes", "rejected": "no"}],
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_scored_with_their_labels(tmp_path, form):
    found = read(write(tmp_path / "rows.jsonl", *FORMS[form]))
    assert [row["desirable"] for row in found.examples] == [1, 0]
    # The last answer alone, and the end of its turn or of the text.
    ends = "(</s>|<\\|im_end\\|>)"
    for row, said in zip(found.examples, ("yes", "no"), strict=True):
        assert re.fullmatch(f" ?{said}{ends}", scored(row))
    assert found.stats.left_out == {"answers labelled true": 1, "answers labelled false": 1}


def test_columns_and_dataset_info_name_the_label(tmp_path):
    rows = [{"q": "p", "a": "yes", "good": True}, {"q": "p", "a": "no", "good": False}]
    path = write(tmp_path / "rows.jsonl", *rows)
    info = '{"d": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a", "kto_tag"'
    (tmp_path / "dataset_info.json").write_text(f'{info}: "good"}}}}}}')
    found = read(tmp_path / "dataset_info.json")
    assert [row["desirable"] for row in found.examples] == [1, 0]
    assert found.stats.columns == ("q as instruction", "a as output", "good as kto_tag")
    assert path.exists()


def test_a_csv_has_labels_as_text(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\np,yes,True\np,no,false\n")
    assert [row["desirable"] for row in read(tmp_path / "rows.csv").examples] == [1, 0]


GOOD = {"prompt": "p ", "completion": "yes", "label": True}
MISTAKES = {
    "a score": ([GOOD, {**BAD, "label": 0.7}], "rows.jsonl:2: label is 0.7; a label is true"),
    "a word": ([{**GOOD, "label": "good"}], "rows.jsonl:1: label is 'good'; a label is true"),
    "null": ([GOOD, {**BAD, "label": None}], "rows.jsonl:2: label is null; a label is true"),
    "a list": ([GOOD, {**BAD, "label": [1]}], "rows.jsonl:2: label is a list; a label is true"),
    "missing": ([GOOD, {"prompt": "p", "completion": "no"}], "rows.jsonl:2: the label is missing"),
    "none": ([{"prompt": "p", "completion": "no"}], "none says whether the answer is good"),
    "contrary": ([{**GOOD, "kto_tag": False}], "label and kto_tag contradict each other"),
    "text": ([{"text": "yes", "label": True}], "rows of text do not say where their prompt ends"),
    "good alone": ([GOOD, GOOD], "all 2 answers are labelled true; objective kto learns from good"),
    "bad alone": ([BAD], "all 1 answers are labelled false"),
    "a weight": ([{**GOOD, "weight": 0.5}, BAD], "no loss weights but 0 and 1"),
    "a margin": (
        [{"prompt": "p ", "chosen": "yes", "rejected": "no", "margin": 1}],
        "the pairs have a margin",
    ),
    "half a pair": (
        [GOOD, {"prompt": "p ", "chosen": "yes"}],
        "rows.jsonl:2: the label is missing",
    ),
    "same answers": (
        [{"prompt": "p ", "chosen": "yes", "rejected": "yes"}] * 2,
        "in 2 of 2 pairs chosen and rejected are the same",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_place(tmp_path, name):
    rows, text = MISTAKES[name]
    with pytest.raises(DataError, match=re.escape(text)):
        read(write(tmp_path / "rows.jsonl", *rows))


def test_what_is_left_out_is_counted(tmp_path):
    rows = [GOOD, BAD, {**GOOD, "train": False}, {**BAD, "prompt": "p" * 99}]
    found = read(write(tmp_path / "rows.jsonl", *rows), max_length=40)
    assert found.stats.rows == 2
    assert found.stats.dropped_rows == 2
    pairs = [{"prompt": "p ", "chosen": "yes", "rejected": said} for said in ("no", "yes", "not")]
    found = read(write(tmp_path / "rows.jsonl", *pairs))
    assert found.stats.rows == 4
    assert found.stats.left_out["pairs left out: chosen and rejected are the same"] == 1
    # A prompt that fills the row leaves no answer: that is not two answers that are the same.
    pairs += [{"prompt": "p" * 99, "chosen": "yes", "rejected": "no"}] * 4
    found = read(write(tmp_path / "rows.jsonl", *pairs), max_length=40)
    assert (found.stats.rows, found.stats.dropped_rows) == (4, 8)


def test_values_of_a_pair_are_said_not_to_be_used(tmp_path):
    pair = {"prompt": "p ", "chosen": "yes", "rejected": "no"}
    values = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    found = read(write(tmp_path / "rows.jsonl", {**pair, **values}))
    assert found.stats.columns == ("prompt", "chosen", "rejected")
    assert found.stats.unused_columns == tuple(values)


# Mismatched answers.


@pytest.mark.parametrize(
    "prompts",
    ["ab", "aabb", "abcabc", "aab", "aaab", "aaaabb", "abcdefg", "aabbccddee", "abbbbcccd"],
)
def test_a_partner_has_another_prompt(prompts):
    found = partners(prompts)
    assert all(prompts[i] != prompts[int(other)] for i, other in enumerate(found))
    if 2 * max(Counter(prompts).values()) <= len(prompts):
        # Each answer is taken once.
        assert sorted(found) == list(range(len(prompts)))


def test_one_prompt_has_no_partner():
    assert partners("aaa") is None
    assert partners("a") is None


def answers(tmp_path, count: int, max_length: int = 40):
    draw = random.Random(count)

    def text(longest: int) -> str:
        return "".join(draw.choice("ab ") for _ in range(draw.randint(1, longest)))

    prompts = [text(20) for _ in range(3 * count // 4)]
    rows = [
        {"prompt": draw.choice(prompts), "completion": f"x{text(30)}", "label": bool(i % 2)}
        for i in range(count)
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    rows = load(path, row_options={"unpaired": True}, max_length=max_length).examples
    return rows, mismatch(rows, max_length)


def parts(ids, labels) -> tuple[list[int], list[int]]:
    start = next(i for i, label in enumerate(labels) if label != -100)
    return list(ids[:start]), list(ids[start:])


def test_a_mismatched_answer_is_that_of_another_row(tmp_path):
    rows, mismatched = answers(tmp_path, 24)
    for i in range(24):
        row, other = mismatched[i], rows[int(mismatched.others[i])]
        prompt, own = parts(row["input_ids"], row["labels"])
        shown, answer = parts(row["kl_input_ids"], row["kl_labels"])
        theirs, wanted = parts(other["input_ids"], other["labels"])
        assert shown == prompt != theirs
        assert answer == wanted[: 40 - len(prompt)] != own
        longest = max(len(row["input_ids"]), len(row["kl_input_ids"]))
        assert mismatched.lengths[i] == longest <= 40
    assert identity(mismatched) == identity(rows)


def unbatched(batch) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each answer of a batch; positions checked."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    names = ("input_ids", "labels", "answer_ids")
    for row in zip(*(batch[name] for name in names), positions, strict=True):
        for token, label, number, place in zip(*(x.tolist() for x in row), strict=True):
            if number < 0:
                assert label == -100
                continue
            ids, labels = found.setdefault(number, ([], []))
            assert place == len(ids)
            ids.append(token)
            labels.append(label)
    assert sorted(found) == list(range(int(batch["num_answers"])))
    return [found[number] for number in range(len(found))]


LAYOUTS = {
    "padded": {},
    "padding-free": {"padding_free": True},
    "lengths": {"padding_free": True, "flatten": True, "has_lengths": True},
}


@pytest.mark.parametrize("packs", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_answers(tmp_path, layout, packs):
    _, rows = answers(tmp_path, 24)
    if packs:
        packed = PackedRows.of(rows, 40, "bfd")
        order, sources = packed.order.tolist(), [packed[i] for i in range(len(packed))]
        assert max(len(row[name]) for row in sources for name in ("input_ids", "kl_labels")) <= 40
    else:
        order, sources = list(range(24)), [rows[i] for i in range(24)]
    batch = UnpairedCollator(Collator(0, **LAYOUTS[layout]), has_kl=True)(sources)
    wanted = [rows[i] for i in order]
    assert unbatched(batch) == [(row["input_ids"], row["labels"]) for row in wanted]
    assert unbatched(batch["kl"]) == [(row["kl_input_ids"], row["kl_labels"]) for row in wanted]
    assert batch["desirable"].tolist() == [row["desirable"] for row in wanted]


def test_a_stream_mismatches_the_rows_of_a_block(tmp_path):
    rows = [{"prompt": f"p{i} ", "completion": f"x{i}", "label": bool(i % 2)} for i in range(7)]
    path = write(tmp_path / "rows.jsonl", *rows)

    def opened(data, buffer_size, packing=None):
        options = RowOptions(40, 10**6, unpaired=True)
        return open_stream(
            str(data),
            byte_tokenizer(),
            options,
            buffer_size=buffer_size,
            seed=0,
            packing=packing,
            mismatches=True,
        ).examples

    stream = opened(path, 3)
    found = [read.row for read in islice(stream.rows(stream.start()), 7)]
    # The last block has one row, and no prompt beside its own.
    assert sum("kl_labels" in row for row in found) == 6
    assert all(row.get("kl_labels") != row["labels"] for row in found)
    batch = UnpairedCollator(Collator(0), has_kl=True)(found)
    assert (batch["num_answers"], batch["kl"]["num_answers"]) == (7, 6)
    packed = opened(path, 7, "bfd")
    first = next(packed.rows(packed.start())).row
    assert len(first["desirable"]) == len(np.unique(first["kl_answer_ids"])) > 1
    same = write(tmp_path / "same.jsonl", *({**row, "prompt": "p "} for row in rows))
    stream = opened(same, 3)
    with pytest.raises(DataError, match="all 3 answers are to one prompt"):
        next(stream.rows(stream.start()))
    good = write(tmp_path / "good.jsonl", *({**row, "label": True} for row in rows))
    stream = opened(good, 3)
    with pytest.raises(DataError, match="all 7 answers are labelled true"):
        list(islice(stream.rows(stream.start()), 8))


def test_a_preview_shows_labels_and_contradictions(liger, tmp_path):
    rows = [GOOD, BAD, {**BAD, "label": True}, GOOD]
    words = ("data", "preview", "--model", "qwen3", "--objective", "kto", "--dataset")
    # Its loss takes no KL, for which all have one prompt.
    words += (write(tmp_path / "rows.jsonl", *rows), "--loss-type", "apo_zero_unpaired", "-n", 2)
    done = liger(*words)
    assert done.code == 0, done.err
    assert re.search(r"row 1: .* trained on .*; label true\n", done.out)
    assert re.search(r"row 2: .* trained on .*; label false\n", done.out)
    assert "1 answers are there twice" in done.out
    assert "2 answers are there with the other label too: 2 and 3" in done.out
    found = liger(*words, "--json").json()
    assert found["labelled"] == {"repeated": 1, "contradicting": 2, "places": [[2, 3]]}
    assert [row["figures"] for row in found["rows"]] == [{"label": True}, {"label": False}]


@pytest.mark.parametrize("num_rows", [4, 5])
def test_synthetic_answers_are_good_and_bad_in_turn(monkeypatch, num_rows):
    """Rows longer than 32 768 tokens are fewer, and may be of an odd number."""
    monkeypatch.setattr("liger_cli.data.synthetic._NUM_ROWS", {"train": num_rows})
    options = RowOptions(max_length=8, vocab_size=16, unpaired=True)
    made = make_synthetic("train", options, seed=0)
    assert list(made.rows["desirable"]) == [1, 0, 1, 0, 1][:num_rows]
    num_good = (num_rows + 1) // 2
    counted = {"answers labelled true": num_good, "answers labelled false": num_rows - num_good}
    assert made.counts.left_out == counted
