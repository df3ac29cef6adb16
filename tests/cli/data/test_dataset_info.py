"""A dataset_info.json of LLaMA-Factory, read as it is."""

from __future__ import annotations

import json

import pytest

from liger_cli.config.datasets import read_datasets
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.errors import LigerError
from liger_cli.training.model.tokenizers import byte_tokenizer

U, A, E = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>"
FULL = {"instruction": "do", "input": "it", "output": "a", "system": "s", "history": [["q", "b"]]}
CHAT = {
    "talk": [
        {"who": "human", "text": "q"},
        {"who": "model", "text": "a"},
    ]
}
# Each: the description, the rows, and the rendered rows or the error, in which INFO is the file.
CASES = {
    "defaults": ({}, [FULL], f"{U}do\nit{E}\n{A}a{E}\n"),
    "named": (
        {"columns": {"prompt": "instruction", "response": "output", "system": "system"}},
        [FULL],
        f"<|im_start|>system\ns{E}\n{U}do{E}\n{A}a{E}\n",
    ),
    "history": (
        {"columns": {"prompt": "instruction", "response": "output", "history": "history"}},
        [FULL],
        f"{U}q{E}\n{A}b{E}\n{U}do{E}\n{A}a{E}\n",
    ),
    "text": ({"columns": {"prompt": "instruction"}}, [FULL], f"do{E}"),
    "sharegpt": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {
                "role_tag": "who",
                "content_tag": "text",
                "user_tag": "human",
                "assistant_tag": "model",
            },
        },
        [CHAT],
        f"{U}q{E}\n{A}a{E}\n",
    ),
    "num_samples": ({"num_samples": 1}, [FULL, {"instruction": 3}], f"{U}do\nit{E}\n{A}a{E}\n"),
    "ranking": (
        {"ranking": True},
        [FULL],
        "INFO: d: with ranking, columns must name chosen and rejected",
    ),
    "ranking in sft": (
        {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
        [{"q": "q", "good": "a", "bad": "b"}],
        "FILE:1: columns: chosen is of pairs, and objective sft does not compare answers",
    ),
    "no ranking": (
        {"columns": {"prompt": "q", "chosen": "good"}},
        [{"q": "q", "good": "a", "bad": "b"}],
        "INFO: d: columns.chosen is for preferences, and ranking is not true",
    ),
    "unknown": (
        {"script_url": "x"},
        [FULL],
        "INFO: d: script_url is not read here (read are file_name, hf_hub_url, subset, split, "
        "formatting, columns, tags, num_samples, ranking)",
    ),
    "images": (
        {"columns": {"images": "images"}},
        [FULL],
        "INFO: d: columns.images is not read here (read are prompt, query, response, history, "
        "system, kto_tag, chosen, rejected)",
    ),
    "formatting": (
        {"formatting": "csv"},
        [FULL],
        "INFO: d: formatting is 'csv'; allowed are alpaca, sharegpt and openai",
    ),
    "a role": (
        {
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
            "tags": {
                "role_tag": "who",
                "content_tag": "text",
                "user_tag": "human",
                "assistant_tag": "gpt",
            },
        },
        [CHAT],
        "FILE:1: talk[1].who is 'model'; allowed are human, gpt, system, user, assistant, tool, "
        "function_call",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_an_entry(tmp_path, name):
    description, rows, wanted = CASES[name]
    info, file = tmp_path / "dataset_info.json", tmp_path / "rows.json"
    info.write_text(json.dumps({"d": {"file_name": "rows.json", **description}}))
    file.write_text(json.dumps(rows))
    tokenizer = byte_tokenizer()
    try:
        found = load_examples(f"{info}:d", tokenizer, RowOptions(512, 264))
        shown = tokenizer.decode(found.examples[0]["input_ids"])
        assert len(found.examples) == 1
        assert load_examples(str(info), tokenizer, RowOptions(512, 264)).stats == found.stats
    except LigerError as error:
        shown = error.message.replace(str(info), "INFO").replace(str(file), "FILE")
    assert shown == wanted


def test_names_and_keys_of_ours(tmp_path):
    info = tmp_path / "dataset_info.json"
    (tmp_path / "a.json").write_text(json.dumps([FULL] * 3))
    info.write_text(
        json.dumps({"first": {"file_name": "a.json"}, "other": {"file_name": "b.json"}})
    )

    def load(name: str, **keys):
        entries = read_datasets([{"path": f"{info}{name}", **keys}])
        return load_examples(entries, byte_tokenizer(), RowOptions(512, 264))

    assert load(":first", max_samples=2).stats.rows == 2
    for name, message in (
        (":fist", "which of its datasets. first, other; did you mean .*:first"),
        ("", "which of its datasets"),
        (":other", "there is no data file .*b.json"),
    ):
        with pytest.raises(LigerError, match=message):
            load(name)
    with pytest.raises(LigerError, match="is a folder of LLaMA-Factory") as error:
        load_examples(str(tmp_path), byte_tokenizer(), RowOptions(512, 264))
    assert f"{info}:NAME" in str(error.value.hint)
    with pytest.raises(LigerError, match="columns, roles, fields and split are those of the file"):
        load(":first", columns={"text": "output"})
