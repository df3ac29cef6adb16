"""Distillation: identities, the same step in any split, runs, evaluation, and what is refused."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import pytest
import torch
from forked_runs import start
from objective_pairs import CPU, VOCABULARY, free_port, make_pairs, tiny_experts, tiny_model
from run_files import assert_same, metrics, stopped_copy, weights

from liger_cli.config import load_config
from liger_cli.data.collate import Collator
from liger_cli.data.packing import join_rows
from liger_cli.training.model.loading import layers_of
from liger_cli.training.model.presets import configs_directory
from liger_cli.training.model.tokenizers import byte_tokenizer
from liger_cli.training.objectives.objective import Totals
from liger_cli.training.objectives.table import make_objective
from liger_kernels.transformers import apply_liger_kernel

ROWS = [
    {"input_ids": pair["chosen_input_ids"], "labels": pair["chosen_labels"]}
    for pair in make_pairs(8)
]
FREE = {"flatten": True, "padding_free": True, "has_lengths": False}


def build(teacher=None, **keys):
    """The objective with a patched model, and a teacher of other weights."""
    keys = {"model": "qwen3", "objective": "distill", "teacher_model": "qwen3", **keys}
    model, teacher = tiny_model(), tiny_model(seed=1) if teacher is None else teacher
    objective = make_objective(load_config(None, keys), model, CPU)
    for one in (model, teacher):
        apply_liger_kernel(one)
    objective.set_teacher(teacher.eval().requires_grad_(False), nullcontext)
    return objective, model.train()


def collated(rows, **layout):
    return Collator(0, **layout)(rows)


def step(objective, model, batches):
    totals = sum(map(objective.count, batches), Totals())
    loss, means = 0.0, torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        part = objective.part(model, batch, totals)
        part.loss.backward()
        loss, means = loss + part.loss.item(), means + part.metrics
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss, means, gradient


SPLITS = {
    "8x1": lambda: [collated([row]) for row in ROWS],
    "uneven": lambda: [collated(ROWS[:5]), collated(ROWS[5:])],
    "packed": lambda: [collated([join_rows(ROWS[:3]), join_rows(ROWS[3:])])],
    "free": lambda: [collated(ROWS[:3], **FREE), collated(ROWS[3:], **FREE)],
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_step_of_distill_is_the_same_in_any_split(split):
    objective, model = build(beta=0.3, temperature=2.0, ce_weight=0.5)
    loss, means, gradient = step(objective, model, [collated(ROWS)])
    other_loss, other_means, other = step(objective, model, SPLITS[split]())
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(other_means, means, rtol=1e-6)
    assert (other - gradient).norm() <= 5e-6 * gradient.norm()
    assert gradient.norm() > 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_model_gives_a_loss_and_a_gradient_of_0(beta):
    objective, model = build(teacher=tiny_model(), beta=beta)
    loss, means, gradient = step(objective, model, [collated(ROWS)])
    assert loss == means[0] == 0.0
    assert (gradient == 0).all()


def test_ce_weight_adds_the_loss_of_sft():
    alone, _, _ = step(*build(beta=0.3), [collated(ROWS)])
    both, means, _ = step(*build(beta=0.3, ce_weight=0.7), [collated(ROWS)])
    batch = collated(ROWS)
    wanted = tiny_model()(**batch).loss.item()
    assert means[1].item() == pytest.approx(wanted, rel=1e-5)
    assert both == pytest.approx(alone + 0.7 * wanted, rel=1e-6)


def test_the_balance_of_experts_is_added_by_its_weight():
    found = []
    for balances in (True, False):
        dense, _ = build()
        model = tiny_experts(balances)
        objective = make_objective(dense._config, model, CPU)
        apply_liger_kernel(model)
        objective.set_teacher(dense._teacher, nullcontext)
        batch = collated(ROWS)
        found.append((objective, objective.part(model.train(), batch, objective.count(batch))))
    (objective, balanced), (_, plain) = found
    assert objective.metrics == ("divergence", "nll_loss", "aux_loss")
    wanted = tiny_experts(True)(**collated(ROWS)).aux_loss.item()
    assert balanced.metrics[2].item() == pytest.approx(wanted, rel=1e-6)
    assert balanced.loss.item() == pytest.approx(plain.loss.item() + 0.5 * wanted, rel=1e-6)


@pytest.mark.parametrize("by_layers", [True, False], ids=["layers", "whole"])
def test_a_compiled_model_distills_the_same(by_layers):
    loss, means, gradient = step(*build(beta=0.3, ce_weight=0.5), [collated(ROWS)])
    objective, model = build(beta=0.3, ce_weight=0.5)
    for part in layers_of(model) if by_layers else [model]:
        part.compile(backend="aot_eager")
    found = step(objective, model, [collated(ROWS)])
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert torch.allclose(found[1], means, rtol=1e-6)
    assert (found[2] - gradient).norm() <= 5e-6 * gradient.norm()


def test_an_evaluation_of_distill_is_the_same_in_any_batches():
    objective, model = build(beta=0.3, ce_weight=0.5)
    found = []
    for size in (1, 3, 8):
        evaluation = objective.evaluation(model.eval())
        with torch.no_grad():
            sums = sum(evaluation.sums(collated(ROWS[i : i + size])) for i in range(0, 8, size))
        found.append(evaluation.result(sums).figures())
    loss, means, _ = step(objective, model.train(), [collated(ROWS)])
    for figures in found:
        assert figures == pytest.approx(found[0], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found[0]["divergence"] == pytest.approx(means[0].item(), rel=1e-5)
    assert found[0]["perplexity"] == pytest.approx(math.exp(means[1].item()), rel=1e-5)


def test_the_model_learns_the_distributions_of_its_teacher():
    objective, model = build(teacher=_sharp_teacher(), beta=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = collated(ROWS)
    losses = []
    for _ in range(60):
        part = objective.part(model, batch, objective.count(batch))
        part.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(part.loss.item())
    assert losses[-1] < 0.1 * losses[0]


def _sharp_teacher():
    """A teacher far from a new model: its logits are spread."""
    teacher = tiny_model(seed=1)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    assert teacher.config.vocab_size == VOCABULARY
    return teacher


@pytest.fixture
def distill(train):
    def run(*words, teacher="qwen2"):
        return train("--objective", "distill", "--teacher-model", teacher, *words)

    return run


def test_a_run_has_the_metrics_and_resumes_exactly(distill, run_dir, tmp_path):
    words = ("--max-steps", 4, "--save-steps", 2, "--beta", 0.5, "--ce-weight", 0.5)
    words += ("--eval-fraction", 0.2, "--eval-steps", 2, "--learning-rate", 1e-2)
    done = distill(*words)
    assert done.code == 0, done.err
    assert "objective: distill: beta 0.5, temperature 1, ce_weight 0.5, teacher qwen2" in done.err
    for loss, divergence, nll in metrics(run_dir, "loss", "divergence", "nll_loss"):
        assert loss == pytest.approx(divergence + 0.5 * nll, rel=1e-5)
    lines = [json.loads(line) for line in (run_dir / "eval.jsonl").read_text().splitlines()]
    for line in lines:
        wanted = line["eval_divergence"] + 0.5 * line["eval_nll_loss"]
        assert line["eval_loss"] == pytest.approx(wanted, rel=1e-6)
        assert 0 <= line["eval_token_accuracy"] <= 1
    stopped = stopped_copy(run_dir, tmp_path / "stopped", 2)
    resumed = distill(*words, "--output-dir", stopped, "--resume", "auto")
    assert resumed.code == 0, resumed.err
    assert_same(run_dir, stopped)


def test_the_template_trains_and_its_teacher_is_the_model(liger, tmp_path):
    path = configs_directory() / "train" / "distill.yaml"
    words = ("-m", "qwen3", "--teacher-model", "qwen3", "--use-cpu", "--max-length", 64)
    words += ("--max-steps", 1, "--set", "dataset=[{path: chitchat, max_samples: 30}]")
    done = liger("train", "-c", path, *words, "-o", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert done.json()["config"]["teacher_model_name_or_path"] == "qwen3"
    assert done.json()["train"]["first_loss"] == 0.0


def test_estimate_counts_the_weights_of_the_teacher(liger):
    words = ("estimate", "-m", "qwen3", "--max-length", 32, "--json")
    done = liger(*words, "--objective", "distill", "--teacher-model", "mistral-7b").json()
    sizes = {part["name"]: part["size"] for part in done["parts"]}
    # 7 248.0 million parameters in bf16.
    assert sizes["reference"] == pytest.approx(2 * 7248.0e6, rel=1e-4)
    assert done["peak"] > sizes["reference"]


REFUSED = {
    "no-teacher": (("--objective", "distill"), 2, "objective distill needs a teacher"),
    "beta": (("--beta", 1.5), 2, "beta of distill is from 0"),
    "temperature": (("--temperature", 0), 2, "temperature"),
    "other-objective": (
        ("--objective", "sft"),
        2,
        "teacher_model_name_or_path is read by the objectives distill",
    ),
    "key": (("--label-smoothing", 0.1), 2, "label_smoothing is read by the objectives"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_distill_cannot_do_is_refused(distill, train, name):
    words, code, message = REFUSED[name]
    done = (train if name == "no-teacher" else distill)(*words)
    assert done.code == code
    assert message in " ".join(done.err.split())


def test_a_teacher_of_another_vocabulary_is_refused(distill, tmp_path):
    tiny_model().save_pretrained(tmp_path / "teacher")
    done = distill(teacher=tmp_path / "teacher")
    assert done.code == 2
    assert f"has a vocabulary of {VOCABULARY}, the model one of" in " ".join(done.err.split())


def test_a_teacher_with_other_words_is_refused(distill, tmp_path):
    tiny_model().save_pretrained(tmp_path / "teacher")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    done = distill(teacher=tmp_path / "teacher")
    assert done.code == 2
    said = " ".join(done.err.split())
    assert "has another tokenizer: 1 of its words have other ids, or none" in said
    assert "'another'" in said


def test_weights_of_rows_are_refused(distill, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({**row, "weight": 0.5}) + "\n" for row in rows))
    done = distill()
    assert done.code == 4
    assert "objective distill does not read" in done.err


@pytest.mark.parametrize("layout", [(), ("--streaming", "--max-steps", 1)], ids=["rows", "stream"])
@pytest.mark.parametrize("column", ["teacher_logprobs", "teacher_logps", "target_logits"])
def test_values_of_a_teacher_in_the_data_are_refused_by_name(distill, data, column, layout):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({**row, column: [-0.5]}) + "\n" for row in rows))
    done = distill(*layout)
    assert done.code == 4
    assert f"{column}: a teacher's stored values are not read" in " ".join(done.err.split())


@pytest.mark.parametrize("layout", [(), ("--dp-shard-size", 2)], ids=["copies", "shards"])
def test_two_processes_distill_the_weights_of_one(data, tmp_path, layout):
    def launch(count, run_dir, accumulation, *layout):
        port = free_port()
        more = ("train", "-m", "qwen3", "-d", data, "-o", run_dir, "--use-cpu", "--max-length", 64)
        more += ("--objective", "distill", "--teacher-model", "qwen2", "--max-steps", 2)
        more += ("--optim", "sgd", "--learning-rate", 0.1, "--max-grad-norm", 0, "--beta", 0.5)
        more += ("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", accumulation)
        more += layout
        ranks = [start(*more, rank=i, num_processes=count, port=port) for i in range(count)]
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * count

    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, one, 4)
    launch(2, two, 2, *layout)
    names = ("loss", "grad_norm", "divergence", "nll_loss")
    for of_two, of_one in zip(metrics(two, *names), metrics(one, *names), strict=True):
        assert of_two == pytest.approx(of_one, rel=1e-5, abs=1e-6)
    final, other = (weights(path / "checkpoint-2") for path in (one, two))
    assert all((final[name] - other[name]).abs().max() <= 1e-6 for name in final)
