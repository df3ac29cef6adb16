"""Cases of liger_kernel.chunked_loss, run by it for chunked_values.json and by the drop-in."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["CASES", "arguments_of"]

NUM_ANSWERS, LENGTH, WIDTH, VOCAB = 6, 5, 4, 7
IS_GOOD = [1, 0, 1, 1, 0, 0]


def wave(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Return numbers that every version of torch has alike."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    values = torch.sin(1.7 * index + 0.9 * seed) * scale + 0.3 * torch.cos(
        0.37 * (seed + 1) * index
    )
    return values.view(shape)


def labels() -> Tensor:
    ids = torch.arange(NUM_ANSWERS * LENGTH).view(NUM_ANSWERS, LENGTH) * 5 % VOCAB
    for row, where in ((0, slice(0, 2)), (1, slice(4, 5)), (3, slice(0, 3)), (5, slice(1, 2))):
        ids[row, where] = -100
    return ids


def _case(name: str, *extras: str, **options: Any) -> dict[str, Any]:
    return {"name": f"LigerFusedLinear{name}Loss", "extras": extras, "options": options}


def _cases() -> list[dict[str, Any]]:
    dpo = [
        _case("DPO", "reference"),
        _case("DPO", "reference", "bias", compute_nll_loss=True, alpha=0.5, beta=0.3),
        _case("DPO", use_ref_model=False),
        _case("DPO", "reference", average_log_prob=True, beta=1.5),
        *(
            _case("DPO", "reference", loss_type=name, beta=0.3)
            for name in ("hinge", "robust", "sppo_hard", "nca_pair", "apo_zero", "apo_down")
        ),
        *(_case("DPO", "reference", loss_type=name) for name in ("bco_pair", "discopop")),
        _case("DPO", "reference", loss_type="discopop", discopop_tau=0.4),
        *(
            _case("DPO", "reference", loss_type=name, label_smoothing=0.1)
            for name in ("robust", "exo_pair")
        ),
    ]
    likelihood = [
        _case("ORPO"),
        _case("ORPO", "bias", "nll_target", beta=0.7),
        _case("ORPO", compute_nll_loss=False),
        _case("CPO"),
        _case("CPO", "bias", alpha=0.5, label_smoothing=0.2, beta=0.4),
        _case("CPO", average_log_prob=True, compute_nll_loss=False),
        _case("SimPO"),
        _case("SimPO", "bias", gamma=1.2, beta=2.0, label_smoothing=0.1, alpha=0.3),
    ]
    kto = [
        _case("KTO"),
        _case("KTO", "reference", "bias", "kl", use_ref_model=True, beta=0.3),
        _case("KTO", "reference", use_ref_model=True, average_log_prob=True, beta=2.0),
    ]
    grpo = [
        *(
            _case("GRPO", "old", "ref", loss_type=name, max_completion_length=8)
            for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
        ),
        *(
            _case("GRPO", "old", "ref", loss_type=name, importance_sampling_level="sequence")
            for name in ("grpo", "bnpo", "dapo")
        ),
        _case("GRPO", "bias", use_ref_model=False, beta=0.0),
        _case("GRPO", "old", use_ref_model=False),
        _case("GRPO", "old", "vllm_answers", "ref"),
        _case("GRPO", "reference", "bias", "old", temperature=0.7, loss_type="grpo", beta=0.2),
        _case("GRPO", "old", "ref", delta=1.1, epsilon_low=0.1, epsilon_high=0.3, loss_type="grpo"),
        _case("GRPO", "old", "ref", "vllm", use_bias_correction_kl=True, loss_type="bnpo"),
        _case("GRPO", "old", "ref", "num_items"),
        _case("GRPO", "old", "ref", loss_type="cispo", epsilon_high=1.1, temperature=1.4),
        _case(
            *("GRPO", "old", "ref"),
            **{"loss_type": "sapo", "sapo_temperature_pos": 0.6, "sapo_temperature_neg": 2.0},
        ),
    ]
    jsd = [
        *(_case("JSD", beta=beta, return_soft_hard_loss=True) for beta in (0.0, 0.3, 0.5, 1.0)),
        _case("JSD", "bias", temperature=2.0, weight_hard_loss=0.3, weight_soft_loss=0.9),
        _case("JSD", "bias", weight_hard_loss=0.0, weight_soft_loss=1.0),
    ]
    return [*dpo, *likelihood, *kto, *grpo, *jsd]


def _key(case: dict[str, Any]) -> str:
    options = (f"{name}={value}" for name, value in case["options"].items())
    return " ".join((case["name"], *case["extras"], *options))


CASES = {_key(case): case for case in _cases()}


def arguments_of(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of a case in float64, and those that get a gradient."""
    hidden, weight = wave(NUM_ANSWERS, LENGTH, WIDTH), wave(VOCAB, WIDTH, seed=1)
    leaves = {"hidden": hidden, "weight": weight}
    extras = case["extras"]
    if "bias" in extras:
        leaves["bias"] = wave(VOCAB, seed=2, scale=0.3)
    for leaf in leaves.values():
        leaf.requires_grad_()
    reference = wave(NUM_ANSWERS, LENGTH, WIDTH, seed=3), wave(VOCAB, WIDTH, seed=4)
    ref_bias = wave(VOCAB, seed=5, scale=0.3) if "bias" in extras else None
    target = labels()
    if "JSD" in case["name"]:
        names = ("student_input", "student_weight", "teacher_input", "teacher_weight")
        sides = (hidden.flatten(0, 1), weight, reference[0].flatten(0, 1), reference[1])
        given: dict[str, Any] = dict(zip(names, sides, strict=True))
        given |= {"true_labels": target.flatten(), "teacher_bias": ref_bias}
        return given | {"student_bias": leaves.get("bias")}, leaves
    given = {"lin_weight": weight, "_input": hidden, "bias": leaves.get("bias")}
    if "reference" in extras:
        names = ("ref_input", "ref_weight", "ref_bias")
        given |= dict(zip(names, (*reference, ref_bias), strict=True))
    if "GRPO" in case["name"]:
        return given | _samples(hidden, weight, target, extras), leaves
    if "KTO" in case["name"]:
        given["preference_labels"] = torch.tensor(IS_GOOD, dtype=torch.bool)
    more = {"kl": torch.tensor(0.3, dtype=torch.float64), "nll_target": (labels() + 107) % VOCAB}
    given |= {name: value for name, value in more.items() if name in extras}
    return {**given, "target": target}, leaves


def _samples(
    hidden: Tensor, weight: Tensor, target: Tensor, extras: tuple[str, ...]
) -> dict[str, Any]:
    ids, mask = target.clamp(min=0), (target != -100).double()
    logps = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[..., None])[..., 0].detach()
    more = {
        "old": ("old_per_token_logps", logps + 0.25 * wave(NUM_ANSWERS, LENGTH, seed=7)),
        "ref": ("ref_per_token_logps", logps + 0.2 * wave(NUM_ANSWERS, LENGTH, seed=8)),
        "vllm": ("vllm_is_ratio", 1 + 0.3 * wave(NUM_ANSWERS, LENGTH, seed=9)),
        "vllm_answers": ("vllm_is_ratio", 1 + 0.3 * wave(NUM_ANSWERS, seed=9)),
        "num_items": ("num_items_in_batch", 50),
    }
    advantages = torch.tensor([0.7, -0.4, 0.2, -1.1, 0.5, 0.9], dtype=torch.float64)
    given = {"selected_token_ids": ids, "attention_mask": mask, "advantages": advantages}
    return given | dict(more[name] for name in extras if name in more)
