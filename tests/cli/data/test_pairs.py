"""Pairs of a chosen and a rejected answer: their forms, and rows that are refused or left out."""

from __future__ import annotations

import json
import pickle
import random
import re
from itertools import islice

import pyarrow.parquet
import pytest
from data_files import said, spoken
from data_rows import load, make_tokenizer, write

from liger_cli.config.datasets import DatasetEntry, read_datasets
from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples, open_source
from liger_cli.data.samples import read_sample_pairs
from liger_cli.data.shipped_templates import read_template
from liger_cli.data.sources import find_source
from liger_cli.data.stream import open_stream
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

PAIRS = {"pairs": True}
ASKED = (("system", "s"), ("user", "q"))
CHOSEN, REJECTED = said(("assistant", "yes")), said(("assistant", "no"))
GPT = [{"from": "gpt", "value": text} for text in ("yes", "no")]
WHOLE = [said(*ASKED, ("assistant", text)) for text in ("yes", "no")]
TALK = spoken(("system", "s"), ("human", "q"))

# What all of these rows say: after a system message and a question, yes is better than no.
CHATS = {
    "messages": {"prompt": said(*ASKED), "chosen": CHOSEN, "rejected": REJECTED},
    "texts of answers": {"prompt": said(*ASKED), "chosen": "yes", "rejected": "no"},
    "one message": {"prompt": said(*ASKED), "chosen": CHOSEN[0], "rejected": REJECTED[0]},
    "column system": {
        "system": "s",
        "prompt": said(ASKED[1]),
        "chosen": CHOSEN,
        "rejected": REJECTED,
    },
    "text of the prompt": {"system": "s", "prompt": "q", "chosen": CHOSEN, "rejected": REJECTED},
    "whole conversations": {"chosen": WHOLE[0], "rejected": WHOLE[1]},
    "whole, prompt as text": {"prompt": "q", "chosen": WHOLE[0], "rejected": WHOLE[1]},
    "whole, prompt": {"prompt": said(*ASKED), "chosen": WHOLE[0], "rejected": WHOLE[1]},
    "whole, messages": {"messages": WHOLE[0], "chosen": WHOLE[0], "rejected": WHOLE[1]},
    "LLaMA-Factory sharegpt": {"conversations": TALK, "chosen": GPT[0], "rejected": GPT[1]},
    "messages and answers": {"messages": said(*ASKED), "chosen": CHOSEN, "rejected": REJECTED},
    "LLaMA-Factory alpaca": {
        "instruction": "q",
        "input": "",
        "system": "s",
        "chosen": "yes",
        "rejected": "no",
    },
    "question": {"question": "q", "system": "s", "chosen": "yes", "rejected": "no"},
    "input": {"input": "q", "system": "s", "chosen": "yes", "rejected": "no"},
}
TEXTS = {
    "prompt": {"prompt": "the question is", "chosen": " yes", "rejected": " no"},
    "shared beginning": {"chosen": "the question is yes", "rejected": "the question is no"},
}


def answer(row, name: str) -> tuple[list[int], list[int]]:
    return row[f"{name}_input_ids"], row[f"{name}_labels"]


def sft(tmp_path, row, tokenizer, **options) -> tuple[list[int], list[int]]:
    """The ids and labels that sft makes of one answer."""
    [found] = load(write(tmp_path / "sft.jsonl", row), tokenizer, **options).examples
    return found["input_ids"], found["labels"]


@pytest.mark.parametrize("name", CHATS)
def test_every_form_of_chat_has_the_ids_of_sft(tmp_path, name):
    [row] = load(write(tmp_path / "d.jsonl", CHATS[name]), row_options=PAIRS).examples
    for which, messages in zip(("chosen", "rejected"), WHOLE, strict=True):
        assert answer(row, which) == sft(tmp_path, {"messages": messages}, byte_tokenizer())


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("name", TEXTS)
def test_every_form_of_text_has_the_ids_of_sft(tmp_path, name, metaspace, begin):
    # Without a chat template, and with tokens that would cross the border of the answer.
    tokenizer = make_tokenizer(metaspace=metaspace, begin=begin)
    [row] = load(write(tmp_path / "d.jsonl", TEXTS[name]), tokenizer, row_options=PAIRS).examples
    for which, completion in (("chosen", " yes"), ("rejected", " no")):
        alone = {"prompt": "the question is", "completion": completion}
        assert answer(row, which) == sft(tmp_path, alone, tokenizer)


@pytest.mark.parametrize("length", [2, 3, 14, 15, 17, 18, 60])
def test_answers_are_cut_as_sft_cuts_them(tmp_path, length):
    pair = {"prompt": "the question ", "chosen": "yes, it is so", "rejected": "no"}
    path = write(tmp_path / "d.jsonl", *[pair] * 3, {**pair, "prompt": ""})
    found = load(path, row_options=PAIRS, max_length=length)
    wanted = []
    for row in [pair] * 3 + [{**pair, "prompt": ""}]:
        both = []
        for which in ("chosen", "rejected"):
            alone = {"prompt": row["prompt"], "completion": row[which]}
            ids, labels = sft(tmp_path, alone, byte_tokenizer())
            both.append((ids[:length], labels[:length]))
        if all(any(label != IGNORED for label in labels) for _, labels in both):
            wanted.append(both)
    assert [[answer(row, w) for w in ("chosen", "rejected")] for row in found.examples] == wanted
    assert (found.stats.rows, found.stats.dropped_rows) == (len(wanted), 4 - len(wanted))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_train_on_chooses_what_of_an_answer_is_scored(tmp_path, train_on):
    tail = (("user", "p"), ("assistant", "b"))
    options = {
        "assistant": {},
        "last": {"last_only": True},
        "all": {"completion_only": False, "assistant_only": False},
    }[train_on]
    rows = [said(("assistant", text), *tail) for text in ("yes", "no")]
    path = write(
        tmp_path / "d.jsonl", {"prompt": said(*ASKED), "chosen": rows[0], "rejected": rows[1]}
    )
    [row] = load(path, row_options={**PAIRS, **options}).examples
    for which, completion in zip(("chosen", "rejected"), rows, strict=True):
        alone = {"prompt": said(*ASKED), "completion": completion}
        assert answer(row, which) == sft(tmp_path, alone, byte_tokenizer(), row_options=options)


def test_history_is_prompt(tmp_path):
    row = {"instruction": "q", "history": [["p", "old"]], "chosen": "yes", "rejected": "no"}
    [found] = load(write(tmp_path / "d.jsonl", row), row_options=PAIRS).examples
    scored = [label for label in found["chosen_labels"] if label != IGNORED]
    assert byte_tokenizer().decode(scored) == "yes<|im_end|>"
    # Without a chat template it is written in Alpaca's words, and old is no answer there either.
    [found] = load(tmp_path / "d.jsonl", make_tokenizer(), row_options=PAIRS).examples
    scored = [label for label in found["rejected_labels"] if label != IGNORED]
    assert make_tokenizer().decode(scored) == "no</s>"


def test_tools_and_calls(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "look", "arguments": {"at": "sky"}}]}
    turns = [call, {"role": "tool", "content": "blue"}, *said(("assistant", "it is blue"))]
    shared = {"prompt": said(ASKED[1]), "tools": [{"name": "look"}]}
    row = {**shared, "chosen": turns, "rejected": said(("assistant", "green"))}
    tokenizer = make_tokenizer(read_template("chatml"))
    [found] = load(write(tmp_path / "d.jsonl", row), tokenizer, row_options=PAIRS).examples
    alone = {**shared, "completion": turns}
    assert answer(found, "chosen") == sft(tmp_path, alone, tokenizer)


def test_answers_that_go_on_have_the_longest_shared_prompt(tmp_path):
    start = said(("user", "q"), ("assistant", "a"), ("user", "p"), ("assistant", "b"))
    other = [*start[:3], *said(("assistant", "c"))]
    longer = [*start, *said(("user", "r"), ("assistant", "d"))]
    path = write(
        tmp_path / "d.jsonl",
        {"chosen": start, "rejected": other},
        {"chosen": start, "rejected": longer},
    )
    for row, scored in zip(
        load(path, row_options=PAIRS).examples,
        [("b<|im_end|>", "c<|im_end|>"), ("b<|im_end|>", "b<|im_end|>d<|im_end|>")],
        strict=True,
    ):
        found = [
            byte_tokenizer().decode([label for label in row[f"{which}_labels"] if label != IGNORED])
            for which in ("chosen", "rejected")
        ]
        assert tuple(found) == scored


def test_a_dialog_in_one_text_is_cut_before_its_last_answer(tmp_path):
    start = "\n\nHuman: q\n\nAssistant: a b\n\nHuman: p\n\nAssistant:"
    row = {"chosen": f"{start} a b c", "rejected": f"{start} a b d"}
    [found] = load(write(tmp_path / "d.jsonl", row), row_options=PAIRS).examples
    scored = [label for label in found["chosen_labels"] if label != IGNORED]
    assert byte_tokenizer().decode(scored) == " a b c<|im_end|>"


def test_figures_are_kept(tmp_path):
    given = {"margin": 2, "ref_chosen_logps": -1.5, "ref_rejected_logps": 0}
    rows = [{**TEXTS["prompt"], **given}, {**TEXTS["prompt"], **given, "margin": 0.0}]
    found = load(write(tmp_path / "d.jsonl", *rows), row_options=PAIRS)
    assert [found.examples[i]["margin"] for i in (0, 1)] == [2.0, 0.0]
    assert found.examples[0]["ref_chosen_logps"] == -1.5
    assert found.stats.columns == ("prompt", "chosen", "rejected", *given)
    entries = _entries(
        write(tmp_path / "n.jsonl", {**PROMPT, "gap": 3}), {"columns": {"margin": "gap"}}
    )
    named = load_examples(entries, byte_tokenizer(), RowOptions(64, 264, **PAIRS))
    assert named.examples["margin"][:] == [3.0]
    assert named.stats.columns[-1] == "gap as margin"


def _entries(path, keys):
    return read_datasets([{"path": str(path), **keys}])


def test_tables_of_pairs(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,chosen,rejected,margin\nthe question is, yes, no,2.5\n")
    [row] = load(path, row_options=PAIRS).examples
    assert row == {**load(write(tmp_path / "d.jsonl", PROMPT), row_options=PAIRS).examples[0]} | {
        "margin": 2.5
    }
    for name, text, hint in (
        ("d.csv", "prompt;chosen;rejected\na;b;c\n", "delimiter: ';'"),
        ("d.json", json.dumps({"chosen": ["a"], "rejected": ["b"]}), "each column is one list"),
        ("d.json", json.dumps({"data": [PROMPT, PROMPT]}), "data_key: data"),
        ("d.csv", "question,good,bad\na,b,c\n", "--columns prompt=X,chosen=Y,rejected=Z"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as error:
            load(tmp_path / name, row_options=PAIRS)
        assert hint in error.value.hint


def test_rows_of_parquet_have_nulls(tmp_path):
    rows = [{**CHATS["whole, messages"], "margin": None, "extra": [{"a": None}]}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    found = load(tmp_path / "d.parquet", row_options=PAIRS)
    assert answer(found.examples[1], "rejected") == sft(
        tmp_path, {"messages": WHOLE[1]}, byte_tokenizer()
    )
    assert found.stats.unused_columns == ("messages", "extra")


def test_names_are_mapped_as_those_of_sft_are(tmp_path):
    row = {
        "talk": [{"who": "customer", "says": "q"}],
        "good": [{"who": "bot", "says": "yes"}],
        "bad": [{"who": "bot", "says": "no"}],
        "idle": 1,
    }
    keys = {
        "columns": {"prompt": "talk", "chosen": "good", "rejected": "bad"},
        "message_fields": {"role": "who", "content": "says"},
        "roles": {"user": ["customer"], "assistant": ["bot"]},
    }
    path = write(tmp_path / "d.jsonl", row)
    found = load_examples(_entries(path, keys), byte_tokenizer(), RowOptions(64, 264, **PAIRS))
    whole = said(("user", "q"), ("assistant", "yes"))
    assert answer(found.examples[0], "chosen") == sft(
        tmp_path, {"messages": whole}, byte_tokenizer()
    )
    assert found.stats.columns == ("talk as prompt", "good as chosen", "bad as rejected")
    assert found.stats.unused_columns == ("idle",)
    texts = write(tmp_path / "t.jsonl", {"talk": "q", "good": "yes", "bad": "no"})
    keys = {"columns": keys["columns"], "message_fields": keys["message_fields"]}
    with pytest.raises(DataError, match=r"d.jsonl:1: good\[0\].role is 'bot'"):
        load_examples(_entries(path, keys), byte_tokenizer(), RowOptions(64, 264, **PAIRS))
    keys = {"columns": keys["columns"]}
    assert load_examples(_entries(texts, keys), byte_tokenizer(), RowOptions(64, 264, **PAIRS))


RANKINGS = {
    "alpaca": (
        {"columns": {"prompt": "instruction", "query": "input", "system": "s"}},
        {"instruction": "q", "input": "", "s": "s", "chosen": "yes", "rejected": "no"},
    ),
    "sharegpt": (
        {"formatting": "sharegpt", "columns": {"messages": "conversations"}},
        {"conversations": TALK, "chosen": GPT[0], "rejected": GPT[1]},
    ),
    "openai": (
        {"formatting": "openai", "columns": {"messages": "talk"}},
        {"talk": said(*ASKED), "chosen": CHOSEN[0], "rejected": REJECTED[0]},
    ),
}


@pytest.mark.parametrize("name", RANKINGS)
def test_a_ranking_of_llama_factory(tmp_path, name):
    description, row = RANKINGS[name]
    info = tmp_path / "dataset_info.json"
    columns = {**description["columns"], "chosen": "chosen", "rejected": "rejected"}
    one = {"file_name": "d.jsonl", "ranking": True, **description, "columns": columns}
    info.write_text(json.dumps({"d": one}))
    write(tmp_path / "d.jsonl", row)
    [found] = load(info, row_options=PAIRS).examples
    for which, messages in zip(("chosen", "rejected"), WHOLE, strict=True):
        assert answer(found, which) == sft(tmp_path, {"messages": messages}, byte_tokenizer())


PROMPT = TEXTS["prompt"]
REFUSED = {
    "no rejected": ([{"prompt": "q", "chosen": "a"}], "found the columns prompt, chosen; pairs"),
    "sft data": ([{"messages": said(*ASKED, ("assistant", "a"))}], "found the columns messages; p"),
    "null": ([PROMPT, {**PROMPT, "rejected": None}], ":2: the column rejected is null"),
    "gone": ([PROMPT, {"prompt": "q", "chosen": "a"}], ":2: the column rejected is missing"),
    "a number": ([{**PROMPT, "chosen": 3}], ":1: chosen[0] must be an object, found a number"),
    "an empty list": ([{**PROMPT, "chosen": []}], ":1: chosen is empty"),
    "a user's answer": (
        [{"prompt": "q", "chosen": said(("user", "a")), "rejected": "b"}],
        "chosen and rejected share no turn before an answer",
    ),
    "two prompts": (
        [{"chosen": WHOLE[0], "rejected": said(("user", "other"), ("assistant", "no"))}],
        "chosen and rejected share no turn before an answer",
    ),
    "another prompt": (
        [{"prompt": "other", "chosen": WHOLE[0], "rejected": WHOLE[1]}],
        "prompt is not the beginning that chosen and rejected share",
    ),
    "an unknown role": (
        [{"prompt": "q", "chosen": [{"role": "bot", "content": "a"}], "rejected": "b"}],
        "chosen[0].role is 'bot'",
    ),
    "NaN": (
        [{**PROMPT, "ref_chosen_logps": float("nan"), "ref_rejected_logps": -1}],
        "JSON has no NaN|ref_chosen_logps must be a finite number, found nan",
    ),
    "a text for a figure": (
        [{**PROMPT, "margin": "two"}],
        "margin must be a finite number, found a",
    ),
    "a huge number": (
        [{**PROMPT, "margin": 1e305}],
        "margin must be a finite number, found 1e+305",
    ),
    "a boolean": ([{**PROMPT, "margin": True}], "margin must be a finite number, found a boolean"),
    "half a reference": (
        [{**PROMPT, "ref_chosen_logps": -1}],
        "ref_chosen_logps is there without the other",
    ),
    "a positive log-probability": (
        [{**PROMPT, "ref_chosen_logps": 1, "ref_rejected_logps": -1}],
        "ref_chosen_logps is 1; the logarithm of a probability is 0 at most",
    ),
    "a late figure": ([PROMPT, {**PROMPT, "margin": 0}], ":2: margin is there, and the data start"),
    "a lacking figure": (
        [{**PROMPT, "margin": 1}, PROMPT],
        ":2: margin must be a finite number, found null",
    ),
    "images": (
        [
            {
                "prompt": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}],
                "chosen": CHOSEN,
                "rejected": REJECTED,
            }
        ],
        "pairs with images are not trained on|a.png",
    ),
    "the same": (
        [{"prompt": "q", "chosen": "a", "rejected": "a"}] * 2 + [PROMPT],
        "in 2 of 3 pairs chosen and rejected are the same",
    ),
    "a weight": ([{**PROMPT, "weight": 0.5}], ":1: pairs have no loss weights but 0 and 1"),
    "other text": (["[1, 2]"], "a row must be an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_is_no_pair_is_refused(tmp_path, name):
    rows, message = REFUSED[name]
    path = write(tmp_path / "d.jsonl", *rows)
    with pytest.raises(DataError) as error:
        load(path, row_options=PAIRS)
    assert str(path) in error.value.message
    assert any(re.search(re.escape(part), error.value.message) for part in message.split("|"))


HOSTILE = [
    *(None, "", " ", "a", 0, -1.5, True, [], {}, [[]], [None], ["a"], [{}], {"role": "user"}),
    *(said(("assistant", "a")), said(("assistant", "b")), said(("user", "q")), {"a": "b"}),
    *(said(("user", "q"), ("assistant", "a")), said(("user", "q"), ("assistant", "b"))),
    *([{"role": "assistant", "content": None}], [{"role": "assistant", "content": [{}]}]),
    *([{"from": "gpt", "value": "a"}], [{"from": "gpt", "value": 3}], "\ud800", "a\0b", 10**400),
    *([{"role": "assistant", "content": "a", "weight": 0}], said(("tool", "t"))),
]
HOSTILE_COLUMNS = [
    *(
        "prompt",
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "instruction",
        "input",
        "system",
    ),
    *("history", "tools", "margin", "ref_chosen_logps", "output", "completion", "label", "train"),
]


@pytest.mark.parametrize("seed", range(3))
def test_random_values_are_pairs_or_errors_with_their_place(tmp_path, seed):
    draw = random.Random(seed)
    num_good, messages = 0, []
    for _ in range(120):
        rows = [
            {
                "chosen": draw.choice([" yes", CHOSEN, WHOLE[0]]),
                "rejected": draw.choice([" no", REJECTED, WHOLE[1]]),
                **{
                    draw.choice(HOSTILE_COLUMNS): draw.choice(HOSTILE)
                    for _ in range(draw.randint(0, 3))
                },
            }
            for _ in range(draw.randint(1, 2))
        ]
        path = write(tmp_path / "d.jsonl", *rows)
        try:
            found = load(path, row_options=PAIRS, max_length=100)
        except DataError as error:
            messages.append((error.message, str(path)))
            continue
        num_good += 1
        known = {*found.stats.columns, *found.stats.unused_columns}
        for row in rows:
            given = {name for name, value in row.items() if value not in (None, "", [])}
            assert given <= known
        for row in found.examples:
            both = answer(row, "chosen"), answer(row, "rejected")
            assert both[0] != both[1]
            for ids, labels in both:
                assert len(ids) == len(labels) <= 100
                assert any(label != IGNORED for label in labels)
    assert num_good > 10
    assert all(path in message and message.isprintable() for message, path in messages)


def test_a_mapped_column_is_the_prompt(tmp_path):
    row = {"prompt": "q", "system": "s", "label": 0, "completion": "x", **PROMPT}
    row |= {"prompt": "q", "chosen": "yes", "rejected": "no"}
    path = write(tmp_path / "d.jsonl", row)
    entries = _entries(path, {"columns": {"instruction": "prompt"}})
    found = load_examples(entries, byte_tokenizer(), RowOptions(512, 10**6, **PAIRS))
    assert answer(found.examples[0], "chosen") == sft(
        tmp_path, {"messages": WHOLE[0]}, byte_tokenizer()
    )
    assert set(found.stats.unused_columns) == {"label", "completion"}
    found = load(path, row_options=PAIRS)
    assert set(found.stats.unused_columns) == {"label", "completion", "system"}


def test_sft_refuses_pairs_and_says_what_reads_them(tmp_path):
    with pytest.raises(DataError, match="found the columns prompt, chosen, rejected") as error:
        load(write(tmp_path / "d.jsonl", PROMPT))
    assert "--objective dpo" in error.value.hint
    with pytest.raises(DataError, match="found the columns text; pairs are wanted") as error:
        load(write(tmp_path / "d.jsonl", {"text": "a"}), row_options=PAIRS)
    assert "--objective sft" in error.value.hint


def test_pairs_without_a_difference_are_left_out_and_counted(tmp_path):
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    late = {"prompt": "q", "chosen": "a" * 60 + "b", "rejected": "a" * 60 + "c"}
    gone = {"prompt": "q" * 60, "chosen": "a", "rejected": "b"}
    rows = [same, late, gone, PROMPT, PROMPT]
    found = load(write(tmp_path / "d.jsonl", *rows), row_options=PAIRS, max_length=40)
    assert (found.stats.rows, found.stats.dropped_rows) == (2, 1)
    assert found.stats.left_out == {
        "pairs left out: chosen and rejected are the same": 1,
        "pairs left out: chosen and rejected are the same within max_length": 1,
    }


@pytest.mark.parametrize("packing", [None, "bfd", "sequential"])
def test_a_stream_of_pairs_has_the_same_pairs(tmp_path, packing):
    rows = [
        {"prompt": "q " * (i % 7), "chosen": f" a{i}" * (i % 5 + 1), "rejected": f" b{i}"}
        for i in range(40)
    ]
    path = write(tmp_path / "d.jsonl", *rows)
    options = RowOptions(48, 264, **PAIRS)
    whole = load_examples(str(path), byte_tokenizer(), options).examples
    stream = open_stream(
        str(path), byte_tokenizer(), options, buffer_size=16, seed=1, packing=packing
    ).examples
    found: list[list[int]] = []
    for row in stream.rows(stream.start()):
        if row.epoch:
            break
        if packing is None:
            found += [row.row["chosen_input_ids"], row.row["rejected_input_ids"]]
            continue
        assert len(row.row["input_ids"]) <= 2 * 48
        for number in range(max(row.row["answer_ids"]) + 1):
            tokens = zip(row.row["input_ids"], row.row["answer_ids"], strict=True)
            found.append([token for token, n in tokens if n == number])
    wanted = [ids for row in whole for ids in (row["chosen_input_ids"], row["rejected_input_ids"])]
    assert sorted(found) == sorted(wanted)


def test_a_stream_of_the_same_answers_is_refused(tmp_path):
    same = {"prompt": "q", "chosen": "a", "rejected": "a"}
    path = write(tmp_path / "d.jsonl", *[same] * 3, PROMPT)
    options = RowOptions(48, 264, **PAIRS)
    stream = open_stream(str(path), byte_tokenizer(), options, buffer_size=2, seed=1).examples
    with pytest.raises(DataError, match="in 3 of 4 pairs chosen and rejected are the same"):
        for _ in zip(range(9), stream.rows(stream.start()), strict=False):
            pass


def test_datasets_of_a_run_have_the_same_figures(tmp_path):
    plain = write(tmp_path / "a.jsonl", PROMPT)
    scored = write(tmp_path / "b.jsonl", {**PROMPT, "margin": 1})
    with pytest.raises(DataError, match=r"b.jsonl has margin, and .*a.jsonl has not"):
        load(f"{plain},{scored}", row_options=PAIRS)
    assert load(f"{plain}", row_options=PAIRS).stats.rows == 1


def test_pairs_are_cached_and_made_in_other_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("liger_cli.data.cache.MIN_BYTES", 0)
    rows = [{**PROMPT, "chosen": f" yes {i}", "margin": i / 3} for i in range(30)]
    path = write(tmp_path / "d.jsonl", *rows)
    made = load(path, row_options=PAIRS)
    # Another process gets the maker as bytes.
    source = find_source(str(path))
    options = RowOptions(512, 10**6, **PAIRS)
    maker = open_source(source, byte_tokenizer(), options, DatasetEntry(str(path)))
    table, counts = pickle.loads(pickle.dumps(maker))(list(source.read()))
    assert (table.to_pylist(), counts.rows) == (made.examples.to_list(), 30)
    monkeypatch.setattr("liger_cli.data.pair_maker.PairMaker.__call__", None)
    again = load(path, row_options=PAIRS)
    assert again.examples.to_list() == made.examples.to_list()
    assert again.stats == made.stats


def test_the_sample_is_of_pairs():
    entries = read_datasets([{"path": "chitchat", "max_samples": 60}])
    found = load_examples(entries, byte_tokenizer(), RowOptions(400, 264, **PAIRS), split="eval")
    stats = found.stats
    assert stats.rows + stats.dropped_rows == 60
    assert stats.rows > 5 * stats.dropped_rows
    assert not any("same" in name for name in stats.left_out)
    assert "reply of another conversation" in found.notes[0]
    pairs = [row for _, row in islice(read_sample_pairs("train"), 200)]
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    assert all(pair["prompt"][-1]["role"] == "user" for pair in pairs)


def test_synthetic_pairs_share_their_prompt():
    found = load_examples("synthetic", None, RowOptions(9, 264, **PAIRS), seed=3)
    row = found.examples[0]
    chosen, rejected = answer(row, "chosen"), answer(row, "rejected")
    assert chosen[0][:4] == rejected[0][:4]
    assert chosen[0][4:] != rejected[0][4:]
    assert chosen[1] == [IGNORED] * 4 + chosen[0][4:]
    assert found.stats.trained_tokens == 10 * len(found)


def test_pairs_without_a_token_of_an_answer_say_so(tmp_path):
    empty = {"prompt": "q", "chosen": "yes", "rejected": ""}
    path = write(tmp_path / "d.jsonl", *[empty] * 3)
    wanted = "none of the 3 pairs of .* has tokens to train on in both answers"
    with pytest.raises(DataError, match=wanted):
        load(path, row_options=PAIRS)
    options = RowOptions(48, 264, **PAIRS)
    stream = open_stream(str(path), byte_tokenizer(), options, buffer_size=2, seed=1).examples
    with pytest.raises(DataError, match=wanted):
        next(stream.rows(stream.start()))
