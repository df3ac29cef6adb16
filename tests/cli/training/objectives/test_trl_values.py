"""Losses and gradients equal those of TRL 1.16's own code (scripts/trl_preference_values.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from objective_pairs import Given, GivenReference, batch_of, objective_of

from liger_kernels.preferences.likelihood_losses import (
    CpoOptions,
    cpo_loss,
    log_odds_ratio,
    shaped,
)

VALUES = json.loads((Path(__file__).parent / "trl_values.json").read_text())


def in_turn(x: torch.Tensor) -> torch.Tensor:
    """TRL has all chosen answers first, a batch here chosen and rejected in turn."""
    return torch.stack(x.chunk(2), 1).flatten(0, 1)


def name_of(options: dict) -> str:
    return "-".join(
        "+".join(map(str, value)) if isinstance(value, list) else f"{key}={value}"
        for key, value in options.items()
        if key != "beta" or value != 0.1
    )


def keys_of(options: dict) -> dict:
    lists = {key: ",".join(map(str, v)) for key, v in options.items() if isinstance(v, list)}
    return {**options, **lists}


def loss_and_gradient(monkeypatch, options, tokens, lengths):
    given = Given(monkeypatch, tokens["model"], tokens["squares"])
    objective = objective_of("dpo", **keys_of(options))
    objective._reference = GivenReference(tokens["reference"], options.get("ld_alpha"))
    batch = batch_of(lengths)
    totals = objective.count(batch)
    objective.begin(None, [batch], totals)
    loss = objective.part(None, batch, totals).loss
    [gradient] = torch.autograd.grad(loss, given.leaf)
    return loss.detach(), gradient


@pytest.mark.parametrize("case", VALUES["dpo"], ids=lambda case: name_of(case["options"]))
def test_dpo_is_trl(monkeypatch, case):
    tokens = {
        name: in_turn(torch.tensor(value, dtype=torch.float64))
        for name, value in VALUES["tokens"].items()
    }
    lengths = in_turn(torch.tensor(VALUES["lengths"])).tolist()
    loss, gradient = loss_and_gradient(monkeypatch, case["options"], tokens, lengths)
    # TRL's alpha_divergence is float32, and so is a constant of its exo_pair.
    is_single = case["dtype"] == "float32"
    rel = 2e-6 if is_single else 1e-6
    wanted = in_turn(torch.tensor(case["gradient"], dtype=torch.float64))
    assert loss.item() == pytest.approx(case["loss"], rel=rel)
    assert (gradient - wanted).norm() <= rel * wanted.norm()


@pytest.mark.parametrize("case", VALUES["cpo"], ids=lambda case: name_of(case["options"]))
def test_cpo_is_trl(case):
    options = case["options"]
    leaves = [x.clone().requires_grad_() for x in means()]
    settings = CpoOptions(0.3, options["label_smoothing"], 0.5, options["alpha"])
    chosen, rejected = (shaped(x, options["alpha"]) for x in leaves)
    losses = cpo_loss(options["loss_type"], chosen, rejected, torch.zeros(4), settings)
    assert_equal(losses, leaves, case)


def test_orpo_is_trl():
    leaves = [x.clone().requires_grad_() for x in means()]
    losses = 0.3 * torch.nn.functional.logsigmoid(log_odds_ratio(*leaves))
    assert_equal(losses, leaves, VALUES["orpo"])


def means() -> tuple[torch.Tensor, ...]:
    return torch.tensor(VALUES["means"], dtype=torch.float64).chunk(2)


def assert_equal(losses, leaves, case) -> None:
    gradients = torch.autograd.grad(losses.sum(), leaves)
    found = dict(
        zip(("losses", "chosen_gradient", "rejected_gradient"), (losses, *gradients), strict=True)
    )
    for name, value in found.items():
        wanted = torch.tensor(case[name], dtype=torch.float64)
        assert (value - wanted).norm() <= 1e-6 * wanted.norm(), name


@pytest.mark.parametrize("case", VALUES["dpo"][::5], ids=lambda case: name_of(case["options"]))
def test_float32_tokens_are_as_good(monkeypatch, case):
    """Forty tokens of float32 give the loss of float64 to 1e-5."""
    generator = torch.Generator().manual_seed(3)
    tokens = {
        name: -torch.rand(8, 40, generator=generator, dtype=torch.float64)
        for name in ("model", "reference", "squares")
    }
    exact, wanted = loss_and_gradient(monkeypatch, case["options"], tokens, [40] * 8)
    rounded = {name: value.float() for name, value in tokens.items()}
    loss, gradient = loss_and_gradient(monkeypatch, case["options"], rounded, [40] * 8)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_long_answers_are_no_farther_from_float64_than_trl(monkeypatch):
    long = VALUES["long"]
    generator = torch.Generator().manual_seed(long["seed"])
    shape = len(long["lengths"]), max(long["lengths"])
    tokens = {
        name: in_turn(
            (-scale * torch.rand(shape, generator=generator, dtype=torch.float64)).float()
        )
        for name, scale in (("model", 2.0), ("reference", 2.0), ("squares", 1.0))
    }
    loss, _ = loss_and_gradient(monkeypatch, {"loss_type": ["sigmoid"]}, tokens, long["lengths"])
    trl_error = abs(long["float32"] - long["float64"])
    assert trl_error > 1e-7
    assert abs(loss.item() - long["float64"]) < trl_error
