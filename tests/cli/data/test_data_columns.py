"""Columns: those that a format defines are used, and others are named."""

from __future__ import annotations

import json

import pytest

from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

FULL = {
    "instruction": "do",
    "input": "it",
    "output": "done",
    "system": "be kind",
    "history": [["q1", "a1"], ["q2", "a2"]],
}


def load(path, rows, tokenizer=None):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), tokenizer or byte_tokenizer(), RowOptions(512, 264))


def conversation(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_case_227_an_instruction_is_the_conversation_of_its_columns(tmp_path):
    turns = [
        *(("system", "be kind"), ("user", "q1"), ("assistant", "a1"), ("user", "q2")),
        *(("assistant", "a2"), ("user", "do\n\nit"), ("assistant", "done")),
    ]
    found = load(tmp_path / "a.jsonl", [FULL])
    wanted = load(tmp_path / "b.jsonl", [conversation(*turns)])
    assert found.examples[:] == wanted.examples[:]
    assert set(found.stats.columns) == set(FULL)
    assert found.stats.unused_columns == ()


@pytest.mark.parametrize("left_out", ["input", "system", "history"])
@pytest.mark.parametrize("empty", [None, ""])
def test_case_227_an_empty_column_is_one_that_is_not_there(tmp_path, left_out, empty):
    rows = [FULL | {left_out: empty}]
    without = [{key: value for key, value in FULL.items() if key != left_out}]
    found, wanted = load(tmp_path / "a.jsonl", rows), load(tmp_path / "b.jsonl", without)
    assert found.examples[:] == wanted.examples[:]
    assert left_out not in found.stats.columns


def test_case_227_without_a_template_the_words_are_those_of_alpaca(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    [row] = load(tmp_path / "a.jsonl", [FULL], tokenizer).examples
    text = (
        "be kind\n\n### Instruction:\nq1\n\n### Response:\na1\n\n### Instruction:\nq2\n\n"
        "### Response:\na2\n\n### Instruction:\ndo\n\n### Input:\nit\n\n### Response:\ndone"
    )
    assert tokenizer.decode(row["input_ids"]) == f"{text}<|im_end|>"
    labels = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(labels) == "a1a2done<|im_end|>"


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([["q"]], r"history\[0\] must be a list of question and answer, found 1 items"),
        ([["q", "a"], "x"], r"history\[1\] must be a list of question and answer, found a string"),
        ([["q", 3]], r"history\[0\] must be a string, found a number"),
        ({"q": "a"}, "history must be a list, found an object"),
        ("q", "history is not JSON"),
    ],
)
def test_case_227_a_history_of_another_form_is_refused(tmp_path, history, message):
    with pytest.raises(DataError, match=f"d.jsonl:1: {message}"):
        load(tmp_path / "d.jsonl", [FULL | {"history": history}])


def test_case_227_a_history_in_csv_is_json(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('instruction,output,history\np,a,"[[""q"", ""b""]]"\np,a,\n')
    found = load_examples(str(path), byte_tokenizer(), RowOptions(512, 264))
    rows = [
        conversation(("user", "q"), ("assistant", "b"), ("user", "p"), ("assistant", "a")),
        conversation(("user", "p"), ("assistant", "a")),
    ]
    assert found.examples[:] == load(tmp_path / "b.jsonl", rows).examples[:]


def test_case_227_the_column_system_of_conversations(tmp_path):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    turns = (("user", "q"), ("assistant", "a"))
    wanted = load(tmp_path / "w.jsonl", [conversation(("system", "s"), *turns)])
    for row in (
        {"conversations": said, "system": "s"},
        {"conversations": [{"from": "system", "value": "s"}, *said], "system": "s"},
        conversation(*turns) | {"system": "s"},
    ):
        assert load(tmp_path / "d.jsonl", [row]).examples[:] == wanted.examples[:]
    with pytest.raises(DataError, match="d.jsonl:1: the column system and the first message"):
        load(tmp_path / "d.jsonl", [conversation(("system", "t"), *turns) | {"system": "s"}])


ROWS = {
    "text": {"text": "a"},
    "prompt": {"prompt": "a", "completion": "b", "system": "s"},
    "alpaca": {"instruction": "a", "output": "b", "text": "c"},
    "messages": conversation(("user", "q"), ("assistant", "a")),
    "conversations": {
        "conversations": [{"from": "human", "value": "q", "at": 3}, {"from": "gpt", "value": "a"}]
    },
}
UNUSED = {
    "prompt": ("system",),
    "alpaca": ("text",),
    "conversations": ("conversations.at",),
}


@pytest.mark.parametrize("form", ROWS)
def test_case_227_other_columns_are_named(tmp_path, form):
    rows = [ROWS[form] | {"id": 1, "empty": None}, ROWS[form] | {"source": "web"}]
    found = load(tmp_path / "d.jsonl", rows)
    assert set(found.stats.unused_columns) == {"id", "source", *UNUSED.get(form, ())}
    assert not set(found.stats.columns) & set(found.stats.unused_columns)


def test_case_227_train_and_preview_name_the_columns_that_are_not_used(train, liger, tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [ROWS["prompt"] | {"id": i} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = train("--dataset", path, "--dry-run", "--json")
    assert done.code == 0, done.err
    [line] = [line for line in done.err.splitlines() if line.startswith("data: ")]
    assert "; not used: system, id" in line
    assert done.json()["data"]["unused_columns"] == ["system", "id"]
    done = liger("data", "preview", "--model", "qwen3", "--dataset", path)
    assert "columns prompt, completion; not used: system, id" in done.out
