"""Errors about data name the key that the data were given by."""

from __future__ import annotations

import json

import pytest

# A value that is wrong, and words of the message behind its key.
WRONG = {
    "nothing": ("chitchatt", "'chitchatt' is neither one of chitchat, synthetic nor a file"),
    "missing": ("{folder}/no.jsonl", "there is no data file {folder}/no.jsonl"),
    "ending": ("{folder}/d.xyz", "{folder}/d.xyz is not a data file"),
    "glob": ("{folder}/*.csv", "no file matches {folder}/*.csv"),
    "empty": ("{folder}/empty", "{folder}/empty holds no data file"),
    "row": ("{folder}/bad.jsonl", "{folder}/bad.jsonl:1: found the columns x; wanted text"),
    "untrained": ("{folder}/none.jsonl", "none of the 1 rows of {folder}/none.jsonl has a token"),
}
WEIGHT = ("{folder}/d.jsonl:0", "'{folder}/d.jsonl:0': each of several is NAME or NAME:WEIGHT")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "d.xyz").write_text("a")
    (tmp_path / "d.jsonl").write_text(json.dumps({"text": "abc"}) + "\n")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"x": "abc"}) + "\n")
    (tmp_path / "none.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    return tmp_path


KEYS = {
    "dataset": (("--dataset", "{}"), "dataset: "),
    "eval_dataset": (("--eval-dataset", "{}"), "eval_dataset: "),
    "named": (("--eval-dataset", "good={folder}/d.jsonl,code={}"), "eval_dataset code: "),
}
CASES = [(key, *WRONG[name]) for key in KEYS for name in WRONG]
CASES += [(key, *WEIGHT) for key in ("dataset", "eval_dataset", "named")]


@pytest.mark.parametrize(("key", "value", "message"), CASES)
def test_case_243_the_key_is_that_of_the_data(train, folder, key, value, message):
    (flag, form), words = KEYS[key]
    value = form.replace("{}", value).replace("{folder}", str(folder))
    done = train(flag, value, "--dry-run")
    assert done.code in (2, 4)
    message = message.replace("{folder}", str(folder))
    assert f"error: {words}{message}" in done.err


def test_case_243_streams_and_evaluations_name_it_too(train, liger, folder):
    gone = folder / "no.jsonl"
    done = train("--dataset", gone, "--streaming", "--dry-run")
    assert f"error: dataset: there is no data file {gone}" in done.err
    words = ("eval", "--model", "qwen3", "--use-cpu")
    done = liger(*words, "--dataset", gone)
    assert f"error: dataset: there is no data file {gone}" in done.err
    done = liger(*words, "--eval-dataset", f"a={gone}")
    assert f"error: eval_dataset a: there is no data file {gone}" in done.err
