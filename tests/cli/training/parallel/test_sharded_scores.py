"""A model with a score head on shards: saved whole, resumed, and read by other programs."""

from __future__ import annotations

import json

import pytest
import torch
from run_files import assert_same, metrics, stopped_copy, weights
from sharded_runs import launch

# What its fixtures run is run once, on one worker.
pytestmark = pytest.mark.xdist_group("sharded_scores")

BATCH = 8
ADAPTERS = {"full": (), "lora": ("--adapter", "lora")}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [{"text": f"say {i} " * (1 + i % 4), "label": "abc"[i % 3]} for i in range(23)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(texts, run_dir, num_processes, *more):
    """Return the words of a run whose steps have the same rows on any number of ranks."""
    words = ("train", "-m", "qwen3", "-d", texts, "-o", run_dir, "--use-cpu", "--max-length", 64)
    words += ("--objective", "classify", "--eval-dataset", texts, "--eval-steps", 2)
    words += ("--max-steps", 4, "--save-steps", 2, "--learning-rate", 1e-3)
    words += ("--lr-scheduler-type", "constant", "--per-device-train-batch-size", 2)
    return (*words, "--gradient-accumulation-steps", BATCH // 2 // num_processes, *more)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_sharded_classifier_is_resumed_and_loaded(texts, tmp_path, liger, adapter):
    whole, more = tmp_path / "whole", ADAPTERS[adapter]
    assert launch(2, *words_of(texts, whole, 2, *more)) == [0, 0]
    saved = weights(whole / "checkpoint-4")
    [head] = [value for name, value in saved.items() if "score" in name]
    assert head.shape[0] == 3
    values = json.loads((whole / "checkpoint-4" / "config.json").read_text())
    assert values["id2label"] == {"0": "a", "1": "b", "2": "c"}
    assert values["architectures"] == ["Qwen3ForSequenceClassification"]
    again = stopped_copy(whole, tmp_path / "again", 2)
    assert launch(2, *words_of(texts, again, 2, *more, "--resume", "auto")) == [0, 0]
    assert_same(whole, again)
    assert (again / "eval.jsonl").read_text() == (whole / "eval.jsonl").read_text()
    alone = stopped_copy(whole, tmp_path / "alone", 2)
    assert launch(1, *words_of(texts, alone, 1, *more, "--resume", "auto")) == [0]
    assert metrics(alone, "step", "tokens") == metrics(whole, "step", "tokens")
    for name, value in weights(alone / "checkpoint-4").items():
        assert (value - saved[name]).abs().max() <= 1e-6, name
    report = json.loads((whole / "report.json").read_text())["eval"]
    words = ("--objective", "classify", "--dataset", texts, "--use-cpu", "--max-length", 64)
    done = liger("eval", "--model", whole, *words, "--json")
    assert done.json()["eval"]["loss"] == pytest.approx(report["loss"], rel=1e-5)
    merged = tmp_path / "merged"
    done = liger("merge", whole / f"checkpoint-{2 if adapter == 'full' else 4}", "-o", merged)
    assert done.code == 0, done.err
    loads_in_transformers(merged, head if adapter == "lora" else None)


def loads_in_transformers(directory, head):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(directory)
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    if head is not None:
        assert torch.equal(model.score.weight, head)


def test_a_language_model_in_shards_alone_gets_a_head(texts, tmp_path):
    """The same one on one process and on two."""
    base = tmp_path / "base"
    words = ("train", "-m", "qwen3", "-d", "synthetic", "-o", base, "--use-cpu", "--max-steps", 1)
    words += ("--max-length", 16, "--save-consolidated", "none")
    assert launch(2, *words) == [0, 0]
    assert not (base / "checkpoint-1" / "model.safetensors").exists()
    found = []
    for count in (1, 2):
        run = tmp_path / f"run-{count}"
        more = ("-m", base, "--max-steps", 1, "--optim", "sgd", "--learning-rate", 0.1)
        assert launch(count, *words_of(texts, run, count, *more)) == [0] * count
        found.append(weights(run / "checkpoint-1"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() <= 1e-5 * max(float(value.abs().max()), 1), name
