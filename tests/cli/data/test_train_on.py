"""train_on names what is trained; data preview --ids shows it token by token."""

from __future__ import annotations

import json

import pytest

from liger_cli.config import load_config
from liger_cli.data.encode import IGNORED
from liger_cli.errors import ConfigError
from liger_cli.training.checkpoints import resume
from liger_cli.training.model.tokenizers import byte_tokenizer

CHAT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "b"},
    ]
}
ALPACA = {"instruction": "p", "output": "b", "history": [["q", "a"]]}
PROMPT = {"prompt": "q", "completion": "b"}
END = "<|im_end|>"


@pytest.fixture
def rows(liger, tmp_path):
    """Return the trained texts of a row."""

    def of(row: dict, *words: object) -> list[str]:
        path = tmp_path / "d.jsonl"
        path.write_text(json.dumps(row) + "\n")
        done = liger("data", "preview", "-m", "qwen3", "-d", path, "--json", *words)
        assert done.code == 0, done.err
        [shown] = done.json()["rows"]
        return [piece["text"] for piece in shown["pieces"] if piece["is_trained"]]

    return of


@pytest.mark.parametrize("row", [CHAT, ALPACA])
def test_of_answers(rows, row):
    both = [f"a{END}", f"b{END}"]
    assert rows(row) == rows(row, "--train-on", "assistant") == both
    assert rows(row, "--train-on", "last") == [f"b{END}"]
    [whole] = rows(row, "--train-on", "all")
    assert whole == rows(row, "--no-assistant-only-loss")[0]
    assert whole.startswith("user\nq")
    assert whole.endswith(f"b{END}\n")


def test_of_prompts(rows):
    for value in ("assistant", "last"):
        assert rows(PROMPT, "--train-on", value) == [f"b{END}"]
    # The first token has nothing before it that could predict it.
    assert rows({"prompt": "xq", "completion": "b"}, "--train-on", "all") == [f"qb{END}"]


def test_last_and_a_mark_are_both_honoured(rows):
    row = {"messages": [*CHAT["messages"][:3], {**CHAT["messages"][3], "train": True}]}
    assert rows(row, "--train-on", "last") == [f"b{END}"]


@pytest.mark.parametrize("key", ["assistant_only_loss", "completion_only_loss"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_the_older_keys_beside_it_are_refused(key, value):
    with pytest.raises(ConfigError, match=f"train_on says what {key} says; keep one of them"):
        load_config(None, {"model": "m"}, ["train_on=assistant", f"{key}={value}"])


def test_a_run_from_before_null_can_be_resumed(monkeypatch):
    config = load_config(None, {"model": "m"})
    old = config.model_dump(mode="json") | {"assistant_only_loss": True}
    assert resume._changes({"config": old}, config) == {}
    old["completion_only_loss"] = False
    assert set(resume._changes({"config": old}, config)) == {"completion_only_loss"}


def test_ids_pieces_and_labels_of_one_row(liger, tmp_path):
    path = tmp_path / "d.jsonl"
    words = ("data", "preview", "-m", "qwen3", "--ids", "--index", 2, "-d")
    path.write_text("".join(json.dumps(PROMPT | {"prompt": p}) + "\n" for p in ("other", "q")))
    done = liger(*words, path)
    lines = [line.split() for line in done.out.splitlines()]
    tokenizer = byte_tokenizer()
    [q], [b] = tokenizer("q")["input_ids"], tokenizer("b")["input_ids"]
    end = tokenizer.eos_token_id
    assert lines[0][:2] == ["row", "2:"]
    assert [
        ["place", "id", "piece", "label"],
        ["0", str(q), "q", str(IGNORED)],
        ["1", str(b), "b", str(b)],
        ["2", str(end), END, str(end)],
    ] == lines[2:6]
    [row] = liger(*words, path, "--json").json()["rows"]
    assert row["listed"][1] == {"id": b, "piece": "b", "label": b}
    done = liger(*words, path, "--index", 3)
    assert done.code == 2
    assert "--index 3: there are 2 rows to train on" in done.err
