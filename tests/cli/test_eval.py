"""liger eval: means over tokens, whatever the batches; presets, directories, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from liger_cli.training.collate import Collator
from liger_cli.training.data import RowOptions, load_examples
from liger_cli.training.model import load_model, load_tokenizer, resolve_model


@pytest.fixture
def evaluate(liger, data):
    def run(*words, model="gemma2"):
        done = liger(
            *("eval", "--model", model, "--dataset", data, "--max-length", 64, "--use-cpu"),
            *("--json", *words),
        )
        assert done.code == 0, done.err
        return done.json()

    return run


def expected(model_name, data):
    """Loss and accuracy row by row from the logits of the stock model."""
    source = resolve_model(str(model_name))
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, seed=42)
    options = RowOptions(64, model.config.vocab_size)
    examples = load_examples(str(data), tokenizer, options, split="eval")
    nll = correct = count = 0.0
    for row in examples.examples:
        batch = Collator()([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].double()
        is_label = labels != -100
        nll += F.cross_entropy(logits[is_label], labels[is_label], reduction="sum").item()
        correct += (logits.argmax(-1) == labels)[is_label].sum().item()
        count += is_label.sum().item()
    return nll / count, correct / count, count


@pytest.mark.parametrize("ops", ["auto", "none", "ce"])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_equals_the_logits_of_the_stock_model(evaluate, data, ops, batch_size):
    """gemma2 caps its logits; padding and the last short batch must not count."""
    result = evaluate("--ops", ops, "--per-device-eval-batch-size", batch_size)["eval"]
    loss, accuracy, count = expected("gemma2", data)
    assert result["loss"] == pytest.approx(loss, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert result["token_accuracy"] == pytest.approx(accuracy)
    assert result["tokens"] == count


def test_report_says_what_ran(evaluate):
    report = evaluate()
    assert report["command"] == "eval"
    assert report["coverage"]["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}
    assert {row["status"] for row in report["modules"] if row["op"]} == {"patched"}
    assert "train" not in report


def test_case_66_patched_evaluation_makes_no_logits(evaluate, monkeypatch):
    """The head's real forward sees rows with a label only, and no cross-entropy sees logits."""
    shapes = []
    stock = F.linear

    def spy(x, weight, bias=None):
        shapes.append((*x.shape[:-1], weight.shape[0]))
        return stock(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    report = evaluate("--per-device-eval-batch-size", 23)
    vocab = resolve_model("gemma2").config["vocab_size"]
    whole = [shape for shape in shapes if shape[-1] == vocab and len(shape) == 3]
    assert not whole
    assert report["eval"]["tokens"] > 0


def test_checkpoint_of_a_run(train, run_dir, evaluate):
    report = train("--eval-fraction", 0.3, "--json").json()
    words = ("--eval-fraction", 0.3)
    checkpoint = evaluate(*words, model=run_dir / "checkpoint-3")
    assert checkpoint["eval"] == {
        key: pytest.approx(value, rel=1e-5) for key, value in report["eval"].items()
    }
    assert checkpoint["eval"]["loss"] < evaluate(*words, model="qwen3")["eval"]["loss"]


def test_a_person_reads_it(liger, data):
    done = liger("eval", "-m", "gemma2", "-d", data, "--use-cpu")
    assert done.code == 0, done.err
    assert "perplexity" in done.out
    assert done.out.splitlines()[-1].startswith("kernels: ")


def test_evaluation_data_may_be_named_apart(liger, data):
    done = liger("eval", "-m", "qwen3", "--eval-dataset", data, "--use-cpu", "--json")
    assert done.json()["eval"]["tokens"] > 0
