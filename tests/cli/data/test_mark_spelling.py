"""Names of marks in other letters: refused where the mark would be read, else named as not used."""

from __future__ import annotations

import json

import pytest

from liger_cli.config.datasets import read_datasets
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.formats import MESSAGE_FIELDS, OPTIONAL, ROW_FIELDS
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    },
    "conversations": {
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    },
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "instruction and output": {"instruction": "q", "output": "a"},
    "text": {"text": "q"},
    "token ids": {"input_ids": [5, 6, 7]},
}
MARKS = [
    *((form, name) for name, (_, forms) in ROW_FIELDS.items() for form in forms),
    *(("token ids", name) for name in OPTIONAL["token ids"]),
]


def load(path, row):
    path.write_text(json.dumps(row) + "\n")
    return load_examples(str(path), byte_tokenizer(), RowOptions(512, 264))


def spellings(name: str) -> list[str]:
    """Other spellings of a name: capitals, and other joints where it has some."""
    head, *tail = name.split("_")
    joined = [head + "".join(map(str.title, tail)), "-".join([head, *tail])] if tail else []
    return [name.title(), name.upper(), *joined]


@pytest.mark.parametrize(("form", "name"), MARKS)
def test_a_column_with_the_name_of_a_mark_in_other_letters_is_refused(tmp_path, form, name):
    for spelling in spellings(name):
        with pytest.raises(DataError) as error:
            load(tmp_path / "rows.jsonl", {**ROWS[form], spelling: 0})
        assert f"{spelling} is 0; " in str(error.value)
        assert f"written {name}," in str(error.value)


@pytest.mark.parametrize("form", ["messages", "conversations"])
@pytest.mark.parametrize("name", MESSAGE_FIELDS)
def test_a_field_with_the_name_of_a_mark_in_other_letters_is_refused(tmp_path, form, name):
    user, answer = ROWS[form][form]
    for spelling in spellings(name):
        with pytest.raises(DataError) as error:
            load(tmp_path / "rows.jsonl", {form: [user, {**answer, spelling: False}]})
        assert f"{form}[1].{spelling} is false; " in str(error.value)
        assert f"written {name}," in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("Label", "spam"), ("Loss", 1.7), ("Weight", None)])
def test_what_would_not_be_read_under_the_name_of_the_mark_is_no_mark(tmp_path, name, value):
    examples = load(tmp_path / "rows.jsonl", {**ROWS["instruction and output"], name: value})
    assert len(examples.examples) == 1
    assert examples.counts.unused_columns == ([] if value is None else [name])


def test_other_names_are_not_used_and_named(tmp_path):
    user, answer = ROWS["messages"]["messages"]
    row = {"messages": [user, {**answer, "train_on": False, "trained": False, "ignore": True}]}
    examples = load(tmp_path / "rows.jsonl", row)
    unused = {f"messages.{name}" for name in ("train_on", "trained", "ignore")}
    assert unused == set(examples.counts.unused_columns)


def test_a_mapping_reads_a_mark_under_another_name(tmp_path):
    user, answer = ROWS["messages"]["messages"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [user, answer, user, {**answer, "Weight": 0}]}) + "\n")
    entry = {"path": str(path), "message_fields": {"weight": "Weight"}}
    examples = load_examples(read_datasets([entry]), byte_tokenizer(), RowOptions(512, 264))
    labels = examples.examples[0]["labels"]
    assert sum(label != -100 for label in labels) == 2
