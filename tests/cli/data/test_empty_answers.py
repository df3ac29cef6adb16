"""Answers without a text: trained on the end of the turn and counted; null is an error."""

from __future__ import annotations

import json

import pytest
from data_rows import load, make_tokenizer, write

from liger_cli.data.answers import EMPTY
from liger_cli.errors import DataError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def counted(tmp_path, *turns: dict, **more) -> int:
    """Return how many answers of one conversation are counted as empty."""
    path = write(tmp_path / "d.jsonl", {"messages": list(turns), **more})
    return load(path, make_tokenizer(CHATML)).stats.left_out.get(EMPTY, 0)


USER = {"role": "user", "content": "a"}


def said(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize(
    ("turns", "number"),
    [
        ([USER, said("b")], 0),
        ([USER, said("")], 1),
        ([USER, said(" \n")], 1),
        ([USER, said("b"), USER, said(""), USER, said("")], 2),
        ([USER, said("", train=False), USER, said("b")], 0),
    ],
)
def test_empty_answers_are_counted(tmp_path, turns, number):
    assert counted(tmp_path, *turns) == number


def test_call_of_a_tool_is_no_empty_answer(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert counted(tmp_path, USER, said(None, tool_calls=[call]), tools=[{"name": "f"}]) == 0


def test_csv_with_an_empty_cell_says_so(liger, tmp_path):
    (tmp_path / "faq.csv").write_text("question,answer\nWhen?,At nine.\nWhere?,\n")
    mapping = ("--columns", "instruction=question,output=answer")
    data = ("data", "preview", "--model", "qwen3", "--dataset", tmp_path / "faq.csv", *mapping)
    done = liger(*data)
    assert done.code == 0, done.err
    assert f"1 {EMPTY}" in done.out.splitlines()
    assert json.loads(liger(*data, "--json").out)["stats"]["left_out"] == {EMPTY: 1}


@pytest.mark.parametrize(
    ("turn", "hint"),
    [
        ({"from": "human", "value": None}, "a null is as if it were not there"),
        ({"from": "human", "text": "q"}, "message_fields: "),
    ],
)
def test_turn_without_a_text_has_a_hint(tmp_path, turn, hint):
    path = write(tmp_path / "d.jsonl", {"conversations": [turn]})
    with pytest.raises(DataError, match=r"conversations\[0\] must have from and value") as error:
        load(path, make_tokenizer(CHATML))
    assert hint in error.value.hint
