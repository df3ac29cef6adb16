"""Weights of tokens: a step and an evaluation are sums of weight x loss by the sum of weights."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from objective_pairs import VOCABULARY, tiny_experts
from transformers import LlamaConfig, LlamaForCausalLM

from liger_cli.data.batches import placeholder
from liger_cli.data.collate import Collator
from liger_cli.data.encode import IGNORED, WEIGHTS
from liger_cli.training.objectives.objective import Totals
from liger_cli.training.objectives.sft import NextToken
from liger_kernels.transformers import apply_liger_kernel

CPU = torch.device("cpu")


def model_of(*, is_patched=True, **options):
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **size, **options)
    )
    if is_patched:
        apply_liger_kernel(model)
    return model


def rows_of(weights):
    """Rows of different lengths and label counts, each with its weight; None has none."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number, weight in enumerate(weights):
        ids = torch.randint(VOCABULARY, (4 + 3 * number,), generator=generator).tolist()
        labels = [IGNORED, IGNORED, *ids[2:]]
        row = {"input_ids": ids, "labels": labels}
        if weight is not None:
            row[WEIGHTS] = [weight * (label != IGNORED) for label in labels]
        rows.append(row)
    return rows


def expected(model, rows):
    """Mean loss in fp64, row by row from logits, and its gradients; also right tokens, entropy."""
    model.zero_grad()
    parts, weights, correct, entropy = [], [], [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = model(input_ids=ids).logits[0, :-1].double()
        is_trained = labels != IGNORED
        parts.append(F.cross_entropy(logits[is_trained], labels[is_trained], reduction="none"))
        weight = row.get(WEIGHTS) or [1.0] * len(row["labels"])
        weights.append(torch.tensor(weight, dtype=torch.float64)[1:][is_trained])
        correct.append(logits.argmax(-1)[is_trained] == labels[is_trained])
        entropy.append(torch.special.entr(logits.softmax(-1)).sum(-1)[is_trained])
    weights = torch.cat(weights)
    loss = (torch.cat(parts) * weights).sum() / weights.sum()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    figures = (torch.cat(correct).double().mean().item(), torch.cat(entropy).mean().item())
    return loss.item(), grads, *figures


WEIGHTED = {
    "some": (0.5, None, 3.0, None),
    "all": (0.5, 2.0, 0.125, 7.0),
    "their sum is the number of labels": (3.5, 1.0, 0.0, 1.5),
    "their sum is below 1": (0.01, 0.02, 0.005, 0.001),
}


@pytest.mark.parametrize("is_patched", [True, False], ids=["patched", "stock"])
@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("layout", ["padded", "padding free"])
@pytest.mark.parametrize("weights", WEIGHTED.values(), ids=WEIGHTED)
@pytest.mark.filterwarnings("ignore:token_logprobs makes all logits")
def test_a_step_is_the_mean_by_weights_whatever_the_batches(weights, layout, size, is_patched):
    model = model_of(is_patched=is_patched)
    # A weight of 0 is no label.
    rows = [row for row, weight in zip(rows_of(weights), weights, strict=True) if weight != 0]
    loss, grads, *_ = expected(model, rows)
    model.train()
    objective = NextToken(model, CPU)
    collate = Collator(padding_free=layout == "padding free", has_lengths=True)
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    # As a process has it that is left without a row.
    batches.append(collate([placeholder(rows[0])]))
    totals = sum(map(objective.count, batches), Totals())
    found = 0.0
    for batch in batches:
        part = objective.part(model, batch, totals)
        part.loss.backward()
        found += part.loss.item()
    assert found == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_weighs_the_loss_alone(size):
    rows = rows_of(WEIGHTED["some"])
    model = model_of()
    loss, _, correct, entropy = expected(model, rows)
    model.eval()
    evaluation = NextToken(model, CPU).evaluation(model)
    with torch.no_grad():
        sums = sum(
            evaluation.sums(Collator()(rows[i : i + size])) for i in range(0, len(rows), size)
        )
    result = evaluation.result(sums)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.token_accuracy == pytest.approx(correct)
    assert result.entropy == pytest.approx(entropy, rel=1e-4)
    assert result.tokens == sum(label != IGNORED for row in rows for label in row["labels"])


def test_weights_of_1_leave_the_balance_of_experts_in_the_loss():
    found = []
    for weight in (1.0, None):
        model = tiny_experts(balances=True).train()
        apply_liger_kernel(model)
        objective = NextToken(model, CPU)
        batches = [Collator()(rows) for rows in (rows_of([weight] * 3), rows_of([weight]))]
        totals = sum(map(objective.count, batches), Totals())
        loss = sum(objective.part(model, batch, totals).loss for batch in batches)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), grads))
    (weighted, gradient), (plain, wanted) = found
    assert weighted == pytest.approx(plain, rel=1e-6)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_row_of_weight_2_counts_as_two_rows(liger, tmp_path):
    """In a whole run with packing and accumulation; the log and the evaluation too."""
    rows = [{"prompt": f"say {i} ", "completion": "word " * (1 + i % 3)} for i in range(6)]
    runs = {
        "twice": [row for row in rows for _ in range(2)],
        "weighted": [{**row, "loss_weight": 2} for row in rows],
        # Of all rows alike: the weights cancel.
        "mixed": [{**row, "loss_weight": 0.5} for row in rows[:3]] + rows[3:],
    }
    losses = {}
    for name, content in runs.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        out = tmp_path / name
        words = ("--per-device-train-batch-size", len(content), "--max-length", 64)
        words += ("--eval-dataset", path, "--output-dir", out, "--use-cpu", "--optim", "sgd")
        words += ("--max-steps", 2, "--learning-rate", 0.5, "--max-grad-norm", 0)
        done = liger("train", "--model", "qwen3", "--dataset", path, *words)
        assert done.code == 0, done.err
        log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        report = json.loads((out / "report.json").read_text())
        losses[name] = [*(row["loss"] for row in log), report["eval"]["loss"]]
        said = "6 rows whose loss has a weight" if name == "weighted" else "3 rows whose loss"
        assert (said in done.err) == (name != "twice")
    assert losses["weighted"] == pytest.approx(losses["twice"], rel=1e-5)
    assert losses["mixed"] != pytest.approx(losses["twice"], rel=1e-3)
