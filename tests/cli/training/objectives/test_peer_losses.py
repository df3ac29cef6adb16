"""Chunked losses of a peer beside ours: the same step, of any layout of a batch."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from objective_pairs import CPU, collated, make_pairs, objective_of, tiny_experts, tiny_model

from liger_cli.config import load_config
from liger_cli.data.packing import join_rows
from liger_cli.training.objectives.objective import Part, Totals
from liger_cli.training.objectives.peer_losses import find_chunked_loss
from liger_cli.training.objectives.reference import OtherModel, WeightsReference, copied
from liger_kernels.transformers import apply_liger_kernel

ROWS = make_pairs(6)
FREE = {"flatten": True, "padding_free": True, "has_lengths": False}
BATCHES = {
    "padded": lambda: [collated(ROWS[:4]), collated(ROWS[4:])],
    "free": lambda: [collated(ROWS, **FREE)],
    "packed": lambda: [collated([join_rows(ROWS[:2]), join_rows(ROWS[2:])])],
}


class PeerLoss:
    """A loss with the call of the peer's, in plain torch: a mean over pairs, chosen ones first."""

    def __init__(self, ignore_index: int, beta: float, **options: object) -> None:
        self.ignored, self.beta, self.options = ignore_index, beta, options

    def logps(self, weight, hidden, target, bias):
        losses = F.cross_entropy(
            F.linear(hidden, weight, bias).double().flatten(0, 1),
            target.flatten(),
            ignore_index=self.ignored,
            reduction="none",
        )
        return -losses.view(target.shape).sum(1), (target != self.ignored).sum(1)

    def __call__(self, weight, hidden, target, bias=None, **reference):
        half = len(target) // 2
        logps, counts = self.logps(weight, hidden, target, bias)
        likelihood = -logps[:half].sum() / counts[:half].sum()
        return self.loss(logps, counts, half, likelihood, target, **reference), ()


class LigerFusedLinearDPOLoss(PeerLoss):
    def loss(self, logps, counts, half, likelihood, target, **reference):
        if self.options["use_ref_model"]:
            names = ("ref_weight", "ref_input")
            before = [reference[name] for name in names]
            logps = logps - self.logps(*before, target, reference["ref_bias"])[0]
        chosen, rejected = self.beta * logps[:half], self.beta * logps[half:]
        if self.options["loss_type"] == "apo_zero":
            return (1 - chosen.sigmoid() + rejected.sigmoid()).mean()
        return -F.logsigmoid(chosen - rejected).mean()


class LigerFusedLinearORPOLoss(PeerLoss):
    def loss(self, logps, counts, half, likelihood, target):
        means = logps / counts
        odds = means - torch.log1p(-means.exp())
        return likelihood - self.beta * F.logsigmoid(odds[:half] - odds[half:]).mean()


class LigerFusedLinearCPOLoss(PeerLoss):
    def loss(self, logps, counts, half, likelihood, target):
        preferred = -F.logsigmoid(self.beta * (logps[:half] - logps[half:])).mean()
        return preferred + self.options["alpha"] * likelihood


class LigerFusedLinearSimPOLoss(PeerLoss):
    def loss(self, logps, counts, half, likelihood, target):
        means = logps / counts
        z = self.beta * (means[:half] - means[half:]) - self.options["gamma"]
        return -F.logsigmoid(z).mean() + self.options["alpha"] * likelihood


@pytest.fixture
def peer(monkeypatch):
    """A peer that is installed, with these losses."""
    module = ModuleType("liger_kernel.chunked_loss")
    for loss in PeerLoss.__subclasses__():
        setattr(module, loss.__name__, loss)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.chunked_loss", module)
    return module


def found_for(name: str, model=None, rows=ROWS, **keys):
    config = load_config(None, {"model": "qwen3", "objective": name, **keys})
    config = config.with_objective_defaults()
    return find_chunked_loss(config, SimpleNamespace(train=rows), model or tiny_model(), CPU)


NO_AUTOCAST = SimpleNamespace(autocast=contextlib.nullcontext)


def step(objective, model, batches) -> tuple[Part, torch.Tensor]:
    totals = sum(map(objective.count, batches), Totals())
    objective.begin(model, batches, totals)
    loss = torch.zeros(())
    for batch in batches:
        part = objective.part(model, batch, totals)
        part.loss.backward()
        loss = loss + part.loss.detach()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss, gradient


OBJECTIVES = {
    "dpo": {},
    "apo_zero": {"loss_type": "apo_zero", "beta": 0.5},
    "orpo": {"beta": 0.3},
    "cpo": {"cpo_alpha": 0.0},
    "simpo": {"beta": 2.0, "simpo_gamma": 0.7},
}


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_is_that_of_our_loss(peer, name, layout):
    model, reference = tiny_model().train(), OtherModel(tiny_model(seed=1), NO_AUTOCAST)
    objective = {"apo_zero": "dpo"}.get(name, name)
    theirs, note = found_for(objective, model, **OBJECTIVES[name])
    assert note == type(theirs._loss).__name__
    theirs._accelerator, ours = NO_AUTOCAST, objective_of(objective, model, **OBJECTIVES[name])
    if objective == "dpo":
        theirs._reference = ours._reference = reference
    # Of several micro-batches it has a mean over the chosen tokens of each.
    batches = [collated(ROWS)] if name == "orpo" and layout == "padded" else BATCHES[layout]()
    loss, gradient = step(theirs, model, batches)
    apply_liger_kernel(model)
    wanted, other = step(ours, model, batches)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (gradient - other).norm() <= 1e-5 * other.norm()
    assert other.norm() > 1e-3


def test_the_reference_keeps_its_head(peer):
    """A model whose weights are exchanged scores with the head from before."""
    model = tiny_model().train()
    theirs, _ = found_for("dpo", model)
    theirs._accelerator, batch = NO_AUTOCAST, collated(ROWS)
    theirs._reference = WeightsReference(model, copied(model))
    at_start, _ = step(theirs, model, [batch])
    assert at_start.item() == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-6)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    ours = objective_of("dpo", model)
    ours._reference = theirs._reference
    later, _ = step(theirs, model, [batch])
    assert later.item() == pytest.approx(step(ours, model, [batch])[0].item(), rel=1e-5)
    assert abs(later.item() - at_start.item()) > 1e-3


class Capped(type(tiny_model())):
    """A model that caps its logits."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


@pytest.mark.parametrize(
    ("name", "keys", "reason"),
    [
        ("dpo", {"loss_type": "hinge"}, "it has no hinge"),
        ("dpo", {"loss_type": "sigmoid,sft"}, "it has no sigmoid, sft"),
        ("dpo", {"label_smoothing": 0.1}, "it takes no label_smoothing"),
        ("dpo", {"ld_alpha": 0.5}, "it takes no ld_alpha"),
        ("cpo", {"loss_type": "simpo", "alpha": 0.1}, "it takes no alpha"),
        ("reward", {}, "none is run for objective reward"),
    ],
)
def test_what_it_does_not_compute_is_left_to_its_layers(peer, name, keys, reason):
    assert found_for(name, **keys) == (None, f"without a chunked loss: {reason}")


def test_models_and_data_it_does_not_compute(peer):
    rows = [{**row, "margin": 1.0} for row in ROWS]
    assert found_for("dpo", rows=rows)[1].endswith("it does not read margin")
    assert found_for("orpo", tiny_experts(True))[1].endswith("leaves out the balance of experts")
    assert found_for("orpo", tiny_experts(False))[0] is not None
    capped = tiny_model()
    capped.__class__ = Capped
    assert found_for("orpo", capped)[1].endswith("product of a linear head alone")
    assert found_for("sft") == (None, None)
    del peer.LigerFusedLinearORPOLoss
    assert "has no attribute 'LigerFusedLinearORPOLoss'" in found_for("orpo")[1]
