"""KTO: values of TRL, a step that means the same in any split, and what it learns."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from objective_pairs import CPU, collated, make_answers, objective_of, tiny_experts, tiny_model

from liger_cli.data.collate import Collator
from liger_cli.data.packing import join_rows
from liger_cli.data.unpaired_batches import UnpairedCollator, mismatch
from liger_cli.training.objectives import kto
from liger_cli.training.objectives.answers import Answers
from liger_cli.training.objectives.objective import Part, Totals
from liger_cli.training.objectives.reference import OtherModel, WeightsReference, copied
from liger_kernels.preferences.unpaired_losses import kto_losses
from liger_kernels.transformers import apply_liger_kernel

VALUES = json.loads((Path(__file__).parent / "trl_values.json").read_text())
MATCHED = make_answers(8)
ROWS = [mismatch(MATCHED, 64)[i] for i in range(8)]
FREE = {"flatten": True, "padding_free": True, "has_lengths": False}
PLACEHOLDER = {"input_ids": [3, 4], "labels": [-100, -100], "num_tokens": 0, "desirable": []}


class NoAutocast:
    def autocast(self):
        return torch.no_grad()


def batch_of(rows, *, has_kl: bool = True, **layout):
    return UnpairedCollator(Collator(0, **layout), has_kl)(rows)


def build(**keys):
    """An objective with a patched model and a reference that gives a KL above 0."""
    objective = objective_of("kto", **keys)
    model, reference = tiny_model(seed=1), tiny_model()
    apply_liger_kernel(model)
    apply_liger_kernel(reference)
    objective._reference = OtherModel(reference, NoAutocast())
    return objective, model.train()


def step(objective, model, batches) -> tuple[Part, torch.Tensor]:
    totals = sum(map(objective.count, batches), Totals())
    objective.begin(model, batches, totals)
    total = None
    for batch in batches:
        part = objective.part(model, batch, totals)
        part.loss.backward()
        part = Part(part.loss.detach(), part.metrics)
        total = part if total is None else total.plus(part)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return total, gradient


# TRL's own code (scripts/trl_preference_values.py).


class Tokens:
    """Log-probabilities (N, T - 1) of answers, and of mismatched ones, in place of a model's."""

    def __init__(self, own, other):
        self.own, self.other = own, other

    def __call__(self, model, batch, device, *, balances=False):
        return (self.own if "desirable" in batch else self.other), None

    def sums(self, score, model, batch):
        return Answers.of(batch, CPU).sums(self(model, batch, CPU)[0])


def answers_of_lengths(lengths, labels):
    rows = [
        {
            "input_ids": [1] * (length + 1),
            "labels": [-100, *[5] * length],
            "kl_input_ids": [1] * (length + 1),
            "kl_labels": [-100, *[5] * length],
            "desirable": label,
        }
        for length, label in zip(lengths, labels, strict=True)
    ]
    return batch_of(rows)


@pytest.mark.parametrize(
    "case",
    VALUES["kto"],
    ids=lambda case: "-".join(
        str(x).replace(" ", "") for x in case["options"].values() if x != "kto"
    ),
)
def test_kto_is_trl(monkeypatch, case):
    options = dict(case["options"])
    labels, sign = options.pop("labels"), options.pop("sign")
    own, other = (
        {name: torch.tensor(drawn[name], dtype=torch.float64) for name in ("model", "reference")}
        for drawn in (VALUES["tokens"], VALUES["kto_tokens"])
    )
    mismatched = [other["model"], other["reference"]][::sign]
    leaf = own["model"].requires_grad_()
    monkeypatch.setattr(kto, "token_values", Tokens(leaf, mismatched[0]))
    objective = objective_of("kto", **options)
    objective._reference = Tokens(own["reference"], mismatched[1])
    batch = answers_of_lengths(VALUES["lengths"], labels)
    if options["loss_type"] != "kto":
        del batch["kl"]
    totals = objective.count(batch)
    objective.begin(None, [batch], totals)
    part = objective.part(None, batch, totals)
    [gradient] = torch.autograd.grad(part.loss, leaf)
    wanted = torch.tensor(case["gradient"], dtype=torch.float64)
    assert part.loss.item() == pytest.approx(case["loss"], rel=1e-12)
    assert (gradient - wanted).norm() <= 1e-12 * wanted.norm()
    metrics = dict(zip(objective.metrics, part.metrics.tolist(), strict=True))
    for name, value in metrics.items():
        # TRL leaves out what there is no answer of.
        assert value == pytest.approx(case["metrics"].get(name, math.nan), rel=1e-9, nan_ok=True)


# A step.

ORDER = (5, 2, 7, 0, 3, 6, 1, 4)
SPLITS = {
    "8x1": lambda: [batch_of([row]) for row in ROWS],
    "2x4": lambda: [batch_of(ROWS[:4]), batch_of(ROWS[4:])],
    "uneven": lambda: [batch_of(ROWS[:5]), batch_of(ROWS[5:])],
    "unsorted": lambda: [batch_of([ROWS[i] for i in ORDER])],
    "packed": lambda: [batch_of([join_rows(ROWS[:3]), join_rows(ROWS[3:])])],
    "packed-flat": lambda: [batch_of([join_rows(ROWS[:3]), join_rows(ROWS[3:])], flatten=True)],
    "free": lambda: [batch_of(ROWS[:3], **FREE), batch_of(ROWS[3:], **FREE)],
    "empty": lambda: [batch_of(ROWS), batch_of([PLACEHOLDER])],
}
KEYS = {
    "kto": {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.8},
    "apo": {"beta": 0.5, "loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", KEYS)
def test_a_step_of_kto_is_the_same_in_any_split(name, split):
    objective, model = build(**KEYS[name])
    whole, gradient = step(objective, model, [batch_of(ROWS)])
    total, found = step(objective, model, SPLITS[split]())
    assert total.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.allclose(total.metrics, whole.metrics, rtol=1e-5, atol=1e-6)
    assert (found - gradient).norm() <= 5e-6 * gradient.norm()
    assert gradient.norm() > 1e-3
    kl = whole.metrics[objective.metrics.index("kl")].item()
    assert kl > 0.01 if name == "kto" else kl == 0


def test_the_kl_is_the_mean_log_ratio_of_mismatched_answers():
    objective, model = build()
    total, _ = step(objective, model, [batch_of(ROWS[:4]), batch_of(ROWS[4:])])
    rows = [{**row, "input_ids": row["kl_input_ids"], "labels": row["kl_labels"]} for row in ROWS]
    batch = batch_of(rows, has_kl=False)
    with torch.no_grad():
        ratios = objective._scores(model, batch).ratios
    assert total.metrics[-1].item() == pytest.approx(ratios.mean().item(), rel=1e-6)


@pytest.mark.parametrize("label", [0, 1])
def test_a_step_of_one_kind_has_finite_gradients(label):
    objective, model = build()
    total, gradient = step(
        objective, model, [batch_of([r for r in ROWS if r["desirable"] == label])]
    )
    assert total.loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    metrics = dict(zip(objective.metrics, total.metrics.tolist(), strict=True))
    absent = "rewards/rejected" if label else "rewards/chosen"
    assert math.isnan(metrics[absent])
    assert math.isnan(metrics["rewards/margins"])


def test_losses_are_finite_however_far_an_answer_is_from_the_reference():
    ratios = torch.tensor([-1e5, -800.0, 0.0, 800.0, 1e5], dtype=torch.float64).requires_grad_()
    for is_good in (True, False):
        losses = kto_losses(ratios, torch.full((5,), is_good), 1e4, 1.0)
        [gradient] = torch.autograd.grad(losses.sum(), ratios)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", KEYS)
def test_an_evaluation_is_the_same_in_any_batches(name):
    objective, model = build(**KEYS[name])
    found = []
    for size in (1, 3, 8):
        evaluation = objective.evaluation(model.eval())
        batches = [batch_of(ROWS[i : i + size]) for i in range(0, 8, size)]
        with torch.no_grad():
            if name == "kto":
                evaluation.begin(sum(map(evaluation.first_sums, batches)))
            found.append(evaluation.result(sum(map(evaluation.sums, batches))))
    for result in found[1:]:
        assert result.answers == found[0].answers == 8
        for key, value in result.figures().items():
            assert value == pytest.approx(found[0].figures()[key], rel=1e-5, abs=1e-6), key
    whole, _ = step(objective, model.train(), [batch_of(ROWS)])
    assert found[0].loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert list(found[0].means.values()) == pytest.approx(whole.metrics.tolist(), rel=1e-5)


def test_a_model_at_its_reference_has_half_the_weights_as_loss():
    objective = objective_of("kto", desirable_weight=1.4)
    model = tiny_model()
    apply_liger_kernel(model)
    objective._reference = WeightsReference(model, copied(model))
    total, _ = step(objective, model, [batch_of(ROWS)])
    num_good = sum(row["desirable"] for row in ROWS)
    assert total.loss.item() == (1.4 * num_good + (8 - num_good)) / 2 / 8
    assert total.metrics[-1].item() == 0


def test_the_balance_of_experts_is_a_mean_over_answers():
    """Its weight and value are transformers'; a batch counts by its answers."""
    found = []
    for balances in (True, False):
        model = tiny_experts(balances).train()
        objective = objective_of("kto", model=model)
        apply_liger_kernel(model)
        batches = [batch_of(ROWS[:3]), batch_of(ROWS[3:])]
        found.append((step(objective, model, batches)[0], objective))
    (balanced, objective), (plain, _) = found
    model, wanted = tiny_experts(True).train(), 0.0
    for rows in (ROWS[:3], ROWS[3:]):
        batch = batch_of(rows)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wanted += model(**inputs).aux_loss.item() * len(rows) / len(ROWS)
    assert objective.metrics[-1] == "aux_loss"
    assert balanced.metrics[-1].item() == pytest.approx(wanted, rel=1e-5)
    expected = plain.loss.item() + model.config.router_aux_loss_coef * wanted
    assert balanced.loss.item() == pytest.approx(expected, rel=1e-6)


# A preference.

GOOD, BAD = 5, 6


def preference(count: int, seed: int) -> list[dict]:
    """Answers that are good where they end with GOOD, and bad where they end with BAD."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = [drawn.randrange(8, 24) for _ in range(3)]
        answer = [drawn.randrange(8, 24) for _ in range(drawn.randint(1, 4))]
        answer.append(BAD if number % 2 else GOOD)
        row = {"input_ids": prompt + answer, "labels": [-100] * 3 + answer}
        rows.append({**row, "desirable": 1 - number % 2})
    return rows


def pairs_of(rows: list[dict]) -> list[dict]:
    """Each row as a pair: as it is, and with the other end."""
    found = []
    for row in rows:
        pair = {}
        for name, last in (("chosen", GOOD), ("rejected", BAD)):
            pair |= {f"{name}_{key}": [*row[key][:-1], last] for key in ("input_ids", "labels")}
        found.append(pair)
    return found


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_a_preference_is_learned_from_labels(loss_type):
    model = tiny_model()
    apply_liger_kernel(model)
    objective, judge = objective_of("kto", loss_type=loss_type), objective_of("dpo")
    objective._reference = judge._reference = WeightsReference(model, copied(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    held_out = collated(pairs_of(preference(32, seed=1)))
    rows = mismatch(preference(64, seed=0), 64)
    batch = batch_of([rows[i] for i in range(64)], has_kl=objective.takes_kl)
    totals = objective.count(batch)
    accuracy, num_steps = 0.0, 0
    while accuracy < 1.0 and num_steps < 50:
        objective.begin(model, [batch], totals)
        objective.part(model.train(), batch, totals).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_steps += 1
        if num_steps % 10 == 0:
            evaluation = judge.evaluation(model.eval())
            with torch.no_grad():
                found = evaluation.result(evaluation.sums(held_out))
            accuracy = found.means["rewards/accuracies"]
    assert accuracy == 1.0
