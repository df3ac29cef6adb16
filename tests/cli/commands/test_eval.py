"""liger eval: means over tokens, whatever the batches; presets, directories, checkpoints."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator

from liger_cli.data.collate import Collator
from liger_cli.data.examples import RowOptions, load_examples
from liger_cli.training.evaluate import evaluate as evaluate_model
from liger_cli.training.model.source import load_model, load_tokenizer, resolve_model
from liger_cli.training.objectives import sft
from liger_cli.training.objectives.sft import NextToken


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
    """Loss, accuracy and entropy row by row from the logits of the stock model."""
    source = resolve_model(str(model_name))
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, seed=42)
    options = RowOptions(64, model.config.vocab_size)
    examples = load_examples(str(data), tokenizer, options, split="eval")
    nll = correct = entropy = count = 0.0
    for row in examples.examples:
        batch = Collator()([row])
        labels = batch.pop("labels")[0, 1:]
        with torch.no_grad():
            logits = model(**batch).logits[0, :-1].double()
        is_label = labels != -100
        nll += F.cross_entropy(logits[is_label], labels[is_label], reduction="sum").item()
        correct += (logits.argmax(-1) == labels)[is_label].sum().item()
        entropy += torch.distributions.Categorical(logits=logits[is_label]).entropy().sum().item()
        count += is_label.sum().item()
    return {
        "loss": nll / count,
        "perplexity": math.exp(nll / count),
        "token_accuracy": correct / count,
        "entropy": entropy / count,
        "tokens": count,
    }


@pytest.mark.parametrize("ops", ["auto", "none", "ce"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_the_logits_of_the_stock_model(evaluate, data, ops, batch_size):
    """gemma2 caps its logits; padding and the last short batch must not count."""
    result = evaluate("--ops", ops, "--per-device-eval-batch-size", batch_size)["eval"]
    assert result == pytest.approx(expected("gemma2", data), rel=1e-5)


def test_report_says_what_ran(evaluate):
    report = evaluate()
    assert report["command"] == "eval"
    assert report["coverage"]["fused_linear_cross_entropy"] == {"patched": 1, "candidates": 1}
    assert {row["status"] for row in report["modules"] if row["op"]} == {"patched"}
    assert "train" not in report


@pytest.fixture
def head_shapes(monkeypatch):
    """The shapes of all logits that a linear layer makes."""
    vocab, shapes, stock = resolve_model("gemma2").config["vocab_size"], [], F.linear

    def spy(x, weight, bias=None):
        if len(weight) == vocab:
            shapes.append((*x.shape[:-1], vocab))
        return stock(x, weight, bias)

    monkeypatch.setattr(F, "linear", spy)
    return shapes


def test_case_66_patched_evaluation_makes_no_logits(evaluate, head_shapes):
    """The head's real forward sees rows with a label only; the stock head sees whole batches."""
    evaluate("--per-device-eval-batch-size", 23)
    assert {len(shape) for shape in head_shapes} == {2}
    head_shapes.clear()
    evaluate("--per-device-eval-batch-size", 23, "--ops", "none")
    assert {len(shape) for shape in head_shapes} == {3}


@pytest.mark.parametrize("ops", ["auto", "none"])
def test_case_66_statistics_are_taken_a_few_rows_at_a_time(evaluate, monkeypatch, ops):
    whole = evaluate("--ops", ops)["eval"]
    num_rows, made, stock = 5, [], sft._materialize

    def spy(logits, rows):
        made.append(len(rows))
        return stock(logits, rows)

    vocab = resolve_model("gemma2").config["vocab_size"]
    monkeypatch.setattr(sft, "_CHUNK_ELEMENTS", num_rows * vocab)
    monkeypatch.setattr(sft, "_materialize", spy)
    assert evaluate("--ops", ops)["eval"] == pytest.approx(whole, rel=1e-6)
    assert max(made) == num_rows


def test_case_89_two_processes_evaluate_as_one(evaluate, data, tmp_path):
    """Ranks with other label counts; the second set has a row for one of them only."""
    lonely = tmp_path / "lonely.jsonl"
    lonely.write_text(data.read_text().splitlines()[4])
    words = ["--eval-dataset", f"all={data},one={lonely}", "--per-device-eval-batch-size", 3]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2]
    launch += ["-m", "liger_cli", "eval", "-m", "gemma2", "--max-length", 64, "--use-cpu"]
    done = subprocess.run(
        [str(word) for word in (*launch, *words, "--json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = evaluate(*words), json.loads(done.stdout)
    assert theirs["eval"] == pytest.approx(ours["eval"], rel=1e-5)
    for name in ("all", "one"):
        assert theirs["eval_sets"][name] == pytest.approx(ours["eval_sets"][name], rel=1e-5)


def test_case_98_the_end_counts_where_padding_has_its_id(evaluate, tmp_path):
    """One row alone has no padding; among longer ones its end is the same token as the padding."""
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "say ", "completion": "word " * 9}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--dataset", path, "--per-device-eval-batch-size")
    alone, together = (evaluate(*words, size, model="qwen3")["eval"] for size in (1, 2))
    assert together == pytest.approx(alone, rel=1e-5)
    lengths = [
        len(load_tokenizer(resolve_model("qwen3"))(row["completion"])["input_ids"]) for row in rows
    ]
    assert together["tokens"] == sum(lengths) + len(rows)


@pytest.fixture
def moe(tmp_path):
    """Configurations of one model that differ in whether it balances its experts."""

    def make(balances):
        config = transformers.MixtralConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=5.0,
            output_router_logits=balances,
        )
        path = tmp_path / f"balances-{balances}.json"
        config.to_json_file(path, use_diff=False)
        return path

    return make


@pytest.mark.parametrize("ops", ["auto", "none"])
def test_loss_is_the_language_models_alone(evaluate, train, run_dir, moe, ops):
    """Training adds the balance of the experts, here five times its usual weight and more."""
    plain = evaluate("--ops", ops, model=moe(False))["eval"]
    assert evaluate("--ops", ops, model=moe(True))["eval"] == plain
    words = ("--ops", ops, "--learning-rate", 0, "--max-steps", 1, "--eval-fraction", 0.3, "--json")
    losses = {}
    for balances in (False, True):
        done = train(*words, "--model", moe(balances), "--output-dir", run_dir / str(balances))
        assert done.code == 0, done.err
        losses[balances] = done.json()["train"]["final_loss"], done.json()["eval"]["loss"]
    assert losses[True][0] > losses[False][0] + 5
    assert losses[True][1] == losses[False][1]


def test_random_generators_are_left_as_they_were(data):
    source = resolve_model("qwen3")
    model = load_model(source, dtype=torch.float32, seed=42).train()
    options = RowOptions(64, model.config.vocab_size)
    rows = load_examples(str(data), load_tokenizer(source), options, split="eval").examples

    def collate(rows):
        # As a processor of images, or a model, may draw.
        random.random(), np.random.rand(), torch.rand(1)
        return Collator()(rows)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for draws in (random.seed, np.random.seed, torch.manual_seed):
        draws(7)
    wanted = draw()
    for draws in (random.seed, np.random.seed, torch.manual_seed):
        draws(7)
    objective = NextToken(model, torch.device("cpu"))
    accelerator = Accelerator(cpu=True)
    evaluate_model(objective, model, {"": rows}, collate, batch_size=8, accelerator=accelerator)
    assert draw() == wanted
    assert model.training


def test_training_is_the_same_with_and_without_evaluations(train, run_dir, data):
    """Dropout draws in every step, so a number drawn on the way would show."""
    words = ("--adapter", "lora", "--lora-dropout", 0.3, "--learning-rate", 1e-2, "--max-steps", 5)
    runs = {
        "never": (*words, "--eval-strategy", "no"),
        "often": (*words, "--eval-steps", 1, "--eval-on-start", "--eval-dataset", data),
        "undropped": (*words, "--lora-dropout", 0),
    }
    losses = {}
    for name, more in runs.items():
        more = (*more, "--output-dir", run_dir / name)
        done = train(*more)
        assert done.code == 0, done.err
        lines = (run_dir / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert losses["often"] == losses["never"]
    assert losses["undropped"] != losses["never"]


def test_long_evaluation_shows_how_far_it_is(liger, data):
    words = ("--use-cpu", "--per-device-eval-batch-size", 4, "--logging-steps", 2)
    done = liger("eval", "-m", "qwen3", "-d", data, *words)
    assert [line for line in done.err.splitlines() if line.startswith("eval ")] == [
        "eval 2/6",
        "eval 4/6",
        "eval 6/6",
    ]


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
