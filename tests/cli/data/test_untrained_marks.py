"""Fields that say what of a row is not trained: each is honoured, or refused by its name."""

from __future__ import annotations

import json
from itertools import product

import pytest

from liger_cli.data.encode import IGNORED
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.data.formats import FORMATS, MESSAGE_FIELDS, ROW_FIELDS
from liger_cli.errors import DataError
from liger_cli.training.model.tokenizers import byte_tokenizer

END = "<|im_end|>"


def load(path, rows, *, has_template=True, **options):
    tokenizer = byte_tokenizer()
    if not has_template:
        tokenizer.chat_template = None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_examples(str(path), tokenizer, RowOptions(512, 264, **options))


def trained(examples) -> list[list[str]]:
    """The trained texts of each row."""
    tokenizer = byte_tokenizer()
    found = []
    for row in examples.examples:
        text = "".join(
            "\0" if label == IGNORED else tokenizer.decode([token])
            for token, label in zip(row["input_ids"], row["labels"], strict=True)
        )
        found.append([part for part in text.split("\0") if part])
    return found


def row_of(form: str, fields=({}, {}), row=None) -> dict:
    """A row of two answers, bad and good, where the format has turns; else of one, good."""
    said = [("q", "bad", fields[0]), ("p", "good", fields[1])]
    if form == "messages":
        turns = [
            message
            for asked, answer, more in said
            for message in (
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer, **more},
            )
        ]
        content = {"messages": turns}
    elif form == "conversations":
        turns = [
            turn
            for asked, answer, more in said
            for turn in (
                {"from": "human", "value": asked},
                {"from": "gpt", "value": answer, **more},
            )
        ]
        content = {"conversations": turns}
    elif form == "instruction and output":
        content = {"instruction": "p", "output": "good", "history": [["q", "bad"]]}
    elif form == "prompt and completion":
        content = {"prompt": "p", "completion": "good"}
    else:
        content = {"text": "good"}
    return content | (row or {})


TURNS = ("messages", "conversations")
# Rows of token ids have a test of their columns.
TEXT_FORMATS = [form for form in FORMATS if form != "token ids"]
# By kind: values that say no, values that say yes, and values that are refused.
VALUES = {
    "weight": ((0, 0.0, False, "0"), (1, 1.0, True, 0.5, "2"), (-1, 2e6, 1e-9, "much", "nan", [0])),
    "train": ((False, 0, "false"), (True, 1, "True"), (0.5, "no", [1, 0], {"a": 1})),
    "train?": ((False, 0), (True, 1), ()),
    "masked": ((True, 1), (False, 0), (0.3, "some")),
    "good": ((), (True, 1), (False, 0, "false", "False")),
    "last": ((), (), ("yes", 3)),
    "refuse": ((), (), (True, False, [0, 1], 1)),
    "list": ((), (), (True, 1, "all")),
}


@pytest.mark.parametrize("form", TURNS)
@pytest.mark.parametrize("name", MESSAGE_FIELDS)
def test_case_223_fields_of_messages(tmp_path, form, name):
    no, yes, refused = VALUES[MESSAGE_FIELDS[name]]
    path = tmp_path / "d.jsonl"
    for value in no:
        rows = [row_of(form, ({name: value}, {}))]
        assert trained(load(path, rows)) == [[f"good{END}"]], value
    for value in (*yes, None):
        rows = [row_of(form, ({name: value}, {name: value}))]
        assert trained(load(path, rows)) == [[f"bad{END}", f"good{END}"]], value
    for value in refused:
        with pytest.raises(DataError, match=rf"d.jsonl:1: {form}\[1\].{name} ") as error:
            load(path, [row_of(form, ({name: value}, {}))])
        assert error.value.hint
        assert error.value.exit_code == 4


@pytest.mark.parametrize(("name", "form"), list(product(ROW_FIELDS, TEXT_FORMATS)))
def test_case_223_fields_of_rows(tmp_path, name, form):
    kind, forms = ROW_FIELDS[name]
    path, plain = tmp_path / "d.jsonl", row_of(form)
    if form not in forms:
        found = load(path, [plain | {name: False}])
        assert found.stats.unused_columns == (name,)
        return
    no, yes, refused = VALUES[kind]
    whole = trained(load(path, [plain]))
    for value in no:
        found = load(path, [plain | {name: value}, plain])
        assert trained(found) == whole
        assert (found.stats.rows, found.stats.dropped_rows) == (1, 1)
        assert name in found.stats.columns
    for value in (*yes, None):
        assert trained(load(path, [plain | {name: value}])) == whole
    for value in refused:
        with pytest.raises(DataError, match=f"d.jsonl:1: {name} (is|marks) ") as error:
            load(path, [plain | {name: value}])
        assert error.value.hint
        assert error.value.exit_code == 4


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("form", ROW_FIELDS["mask_history"][1])
def test_case_223_mask_history_trains_the_last_answer(tmp_path, form, has_template):
    if not has_template and form in TURNS:
        pytest.skip("a conversation needs a template")
    path = tmp_path / "d.jsonl"
    options = {"has_template": has_template}
    both, last = (
        trained(load(path, [row_of(form, row={"mask_history": value})], **options))
        for value in (False, True)
    )
    assert [part.removesuffix(END) for part in both[0]] == ["bad", "good"]
    assert last == [[f"good{END}"]]


@pytest.mark.parametrize("value", ["dog", 3, 7.5, ["a"]])
def test_case_223_a_label_that_is_a_class_is_not_used(tmp_path, value):
    found = load(tmp_path / "d.jsonl", [row_of("prompt and completion", row={"label": value})])
    assert found.stats.unused_columns == ("label",)


def test_case_223_a_label_of_false_says_what_it_means(tmp_path):
    rows = [row_of("prompt and completion", row={"label": value}) for value in (True, False)]
    with pytest.raises(DataError, match="d.jsonl:2: label is false: rows labelled false are exa"):
        load(tmp_path / "d.jsonl", rows)


def test_case_223_tables_have_the_words_as_text(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text("prompt,completion,train\na,one,True\nb,two,False\nc,three,\n")
    found = load_examples(str(path), byte_tokenizer(), RowOptions(64, 264))
    assert trained(found) == [[f"one{END}"], [f"three{END}"]]


def test_case_223_marks_that_contradict_each_other(tmp_path):
    fields = ({"train": True, "weight": 0}, {})
    with pytest.raises(DataError, match=r"messages\[1\].weight says not trained and .*train says"):
        load(tmp_path / "d.jsonl", [row_of("messages", fields)])
    with pytest.raises(DataError, match="train says trained and masked says not trained"):
        load(tmp_path / "d.jsonl", [row_of("text", row={"train": True, "masked": True})])


def test_case_223_marks_in_whole_conversations(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [row_of("messages", ({"train": False}, {}))]
    [parts] = trained(load(path, rows, assistant_only=False))
    assert "bad" not in "".join(parts)
    assert "q" in "".join(parts)
    assert f"good{END}" in "".join(parts)


def test_case_223_marks_of_others_than_the_assistant(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [row_of("messages")]
    rows[0]["messages"][0]["train"] = True
    with pytest.raises(DataError, match="message 0 of user is marked to be trained; only answers"):
        load(path, rows)
    assert load(path, rows, assistant_only=False).stats.rows == 1
    rows[0]["messages"][0]["train"] = False
    assert trained(load(path, rows)) == [[f"bad{END}", f"good{END}"]]
    with pytest.raises(DataError, match="message 0 of user is marked not to be trained"):
        load(path, rows, assistant_only=False)


def test_case_223_train_says_so_and_ends_with_4(train, tmp_path):
    path = tmp_path / "kto.jsonl"
    path.write_text(json.dumps(row_of("conversations", row={"kto_tag": False})) + "\n")
    done = train("--dataset", path, "--dry-run")
    assert done.code == 4
    assert "kto_tag is false: rows labelled false are examples of bad answers" in done.err
