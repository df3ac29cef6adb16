"""A step means the same whatever its micro-batches and layout, and identities of the losses."""

from __future__ import annotations

import math

import pytest
import torch
from objective_pairs import CPU, collated, make_pairs, objective_of, tiny_experts, tiny_model

from liger_cli.data.collate import Collator
from liger_cli.data.packing import join_rows
from liger_cli.training.objectives.objective import Part, Totals
from liger_cli.training.objectives.reference import OtherModel
from liger_cli.training.objectives.sft import NextToken
from liger_kernels.preferences.dpo_losses import DPO_LOSSES, LossOptions, Pairs
from liger_kernels.transformers import apply_liger_kernel

ROWS = make_pairs(8)
UNSORTED = [ROWS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]
FREE = {"flatten": True, "padding_free": True, "has_lengths": False}

OBJECTIVES = {
    "dpo": {},
    "all": {
        "loss_type": "sigmoid,aot,sft",
        "loss_weights": "1,0.5,0.3",
        "label_smoothing": 0.1,
        "ld_alpha": 0.5,
    },
    "weighted": {"loss_type": "ipo,apo_zero", "use_weighting": True},
    "orpo": {},
    "cpo": {},
    "simpo": {"cpo_alpha": 0.5},
}


class NoAutocast:
    def autocast(self):
        return torch.no_grad()


def build(name: str):
    """An objective with a patched model and, where it needs one, a reference."""
    objective = objective_of({"all": "dpo", "weighted": "dpo"}.get(name, name), **OBJECTIVES[name])
    model, reference = tiny_model(), tiny_model(seed=1)
    apply_liger_kernel(model)
    apply_liger_kernel(reference)
    if hasattr(objective, "_reference"):
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


def packed(rows) -> dict:
    return collated([join_rows(rows[:3]), join_rows(rows[3:])])


SPLITS = {
    "8x1": lambda: [collated([row]) for row in ROWS],
    "4x2": lambda: [collated(ROWS[i : i + 2]) for i in range(0, 8, 2)],
    "uneven": lambda: [collated(ROWS[:5]), collated(ROWS[5:])],
    "unsorted": lambda: [collated(UNSORTED[:4]), collated(UNSORTED[4:])],
    "packed": lambda: [packed(ROWS)],
    "free": lambda: [collated(ROWS[:3], **FREE), collated(ROWS[3:], **FREE)],
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_the_same_in_any_split(name, split):
    objective, model = build(name)
    whole, gradient = step(objective, model, [collated(ROWS)])
    total, found = step(objective, model, SPLITS[split]())
    assert total.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert torch.allclose(total.metrics, whole.metrics, rtol=1e-5, atol=1e-6)
    assert (found - gradient).norm() <= 5e-6 * gradient.norm()
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_evaluation_is_the_same_in_any_batches(name):
    objective, model = build(name)
    found = []
    for size in (1, 3, 8):
        evaluation = objective.evaluation(model.eval())
        with torch.no_grad():
            sums = sum(evaluation.sums(collated(ROWS[i : i + size])) for i in range(0, 8, size))
        found.append(evaluation.result(sums))
    for result in found[1:]:
        assert result.pairs == found[0].pairs == 8
        for key, value in result.figures().items():
            assert value == pytest.approx(found[0].figures()[key], rel=1e-5, abs=1e-6), key
    if name != "all":
        # Loss aot is that of each pair alone in evaluation.
        whole, _ = step(objective, model.train(), [collated(ROWS)])
        assert found[0].loss == pytest.approx(whole.loss.item(), rel=1e-5)


def test_a_process_without_pairs_adds_nothing():
    objective, model = build("all")
    row = {"input_ids": [3, 4], "labels": [-100, -100], "num_tokens": 0}
    whole, gradient = step(objective, model, [collated(ROWS)])
    total, found = step(objective, model, [collated(ROWS), collated([row])])
    assert total.loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    assert (found - gradient).norm() <= 1e-6 * gradient.norm()


def test_the_balance_of_experts_is_a_mean_over_pairs():
    """Its weight and value are transformers', as TRL adds it; a batch counts by its pairs."""
    found = []
    for balances in (True, False):
        model = tiny_experts(balances).train()
        objective = objective_of("orpo", model=model)
        apply_liger_kernel(model)
        found.append((*step(objective, model, [collated(ROWS[:3]), collated(ROWS[3:])]), objective))
    (balanced, gradient, objective), (plain, other, _) = found
    model = tiny_experts(True).train()
    wanted = 0.0
    for rows in (ROWS[:3], ROWS[3:]):
        batch = collated(rows)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        wanted = wanted + model(**inputs).aux_loss * len(rows) / len(ROWS)
    weight = model.config.router_aux_loss_coef
    (weight * wanted).backward()
    of_balance = torch.cat(
        [(0 * p if p.grad is None else p.grad).flatten() for p in model.parameters()]
    )
    assert objective.metrics[-1] == "aux_loss"
    assert balanced.metrics[-1].item() == pytest.approx(wanted.item(), rel=1e-5)
    expected = plain.loss.item() + weight * wanted.item()
    assert balanced.loss.item() == pytest.approx(expected, rel=1e-6)
    assert (gradient - other - of_balance).norm() <= 1e-5 * gradient.norm()
    assert of_balance.norm() > 1e-3 * gradient.norm()
    # The reference and evaluations leave it out.
    apply_liger_kernel(model)
    with torch.no_grad():
        assert objective.score(model, collated(ROWS)).aux_loss is None


def test_orpo_without_its_odds_is_sft_on_chosen_answers():
    objective = objective_of("orpo", beta=0.0)
    model = tiny_model().train()
    apply_liger_kernel(model)
    found, gradient = step(objective, model, [collated(ROWS[:5]), collated(ROWS[5:])])
    chosen = [{key: row[f"chosen_{key}"] for key in ("input_ids", "labels")} for row in ROWS]
    sft, wanted = step(NextToken(model, CPU), model, [Collator(0)(chosen)])
    assert found.loss.item() == pytest.approx(sft.loss.item(), rel=1e-6)
    assert (gradient - wanted).norm() <= 5e-6 * wanted.norm()


@pytest.mark.parametrize(
    "keys",
    [
        {"loss_type": "robust"},
        {"f_divergence_type": "reverse_kl"},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"ld_alpha": 1.0},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_what_leaves_dpo_as_it_is(keys):
    results = []
    for more in ({}, keys):
        objective, model = build("dpo")
        reference = objective._reference
        objective = objective_of("dpo", **more)
        objective._reference = reference
        results.append(step(objective, model, [collated(ROWS)]))
    (plain, gradient), (other, found) = results
    assert other.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
    assert torch.allclose(found, gradient, rtol=0, atol=1e-9)


def test_smoothing_and_margin_move_the_sigmoid_loss():
    objective, model = build("dpo")
    reference = objective._reference
    plain, _ = step(objective, model, [collated(ROWS)])
    smoothed = objective_of("dpo", label_smoothing=0.2)
    smoothed._reference = reference
    flipped = [{swap(key): value for key, value in row.items()} for row in ROWS]
    turned, _ = step(objective, model, [collated(flipped)])
    mixed, _ = step(smoothed, model, [collated(ROWS)])
    wanted = 0.8 * plain.loss.item() + 0.2 * turned.loss.item()
    assert mixed.loss.item() == pytest.approx(wanted, rel=1e-6)
    with_margin = [{**row, "margin": 100.0} for row in ROWS]
    moved, _ = step(objective, model, [collated(with_margin)])
    # Far below the margin the loss is linear in it.
    margin = plain.metrics[3].item()
    assert moved.loss.item() == pytest.approx(100.0 - margin, rel=1e-6)
    assert plain.loss.item() == pytest.approx(math.log(2), abs=0.2)


def swap(key: str) -> str:
    first, _, rest = key.partition("_")
    return f"{ {'chosen': 'rejected', 'rejected': 'chosen'}[first] }_{rest}"


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_a_loss_is_finite_however_far_a_pair_is_from_the_reference(name):
    far = torch.tensor([-1e4, -800.0, -50.0, 0.0, 50.0, 800.0, 1e4], dtype=torch.float64)
    chosen, rejected = (-1e4 + far).requires_grad_(), (-1e4 - far).requires_grad_()
    same, one = torch.full_like(far, -1e4), torch.ones_like(far)
    pairs = Pairs(chosen, rejected, same, same, one, one, torch.zeros_like(far))
    losses = DPO_LOSSES[name](pairs, LossOptions(beta=1.0, label_smoothing=0.1))
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    for value in (losses, *gradients):
        assert value.isfinite().all()
