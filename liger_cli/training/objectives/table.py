"""The objectives by name.

A new one is a class with the methods of `Objective` in a file
here, a row of MAKERS, and one in liger_cli/config/objectives.py for its names and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from liger_cli.config import RunConfig
from liger_cli.config.objectives import BALANCE, OBJECTIVES, REFERENCE_KINDS
from liger_cli.data.batches import BatchPlan
from liger_cli.errors import ConfigError
from liger_cli.training.forward import balance_weight
from liger_cli.training.inputs import Inputs
from liger_cli.training.objectives.classify import Classify
from liger_cli.training.objectives.cpo import Cpo
from liger_cli.training.objectives.distill import Distill
from liger_cli.training.objectives.dpo import Dpo
from liger_cli.training.objectives.kto import Kto
from liger_cli.training.objectives.objective import Objective
from liger_cli.training.objectives.orpo import Orpo
from liger_cli.training.objectives.precompute import has_values
from liger_cli.training.objectives.reference import check_other, resolve_reference
from liger_cli.training.objectives.reward import Reward
from liger_cli.training.objectives.sft import NextToken

__all__ = [
    "MAKERS",
    "check_step",
    "describe_objective",
    "make_objective",
    "resolve_objective",
]

_Make = Callable[[RunConfig, Any, torch.device], Objective]

MAKERS: dict[str, _Make] = {
    "sft": lambda config, model, device: NextToken(model, device),
    "dpo": Dpo,
    "orpo": Orpo,
    "cpo": Cpo,
    "kto": Kto,
    "distill": Distill,
    "reward": Reward,
    "classify": Classify,
}


def make_objective(config: RunConfig, model: Any, device: torch.device) -> Objective:
    """Return the objective of a run.

    Args:
        config: Names it, and has its keys.
        model: The model before it is prepared: wrappers may hide its signature.
        device: Where batches go.
    """
    return MAKERS[OBJECTIVES[config.objective].objective](config, model, device)


def resolve_objective(config: RunConfig, inputs: Inputs, *, trains: bool = True) -> RunConfig:
    """Return the configuration with the defaults that the objective gives to keys left at null.

    Args:
        inputs: The model before training, and its data.
        trains: False is a run that only evaluates.

    Raises:
        LigerError: The reference that was asked for cannot be had.
    """
    config = config.with_objective_defaults()
    if "reference" not in OBJECTIVES[config.objective].reads:
        return config
    kind = resolve_reference(config, inputs.source, has_values=has_values(inputs), trains=trains)
    if kind not in REFERENCE_KINDS:
        check_other(config, inputs.meta_model)
    return config.model_copy(update={"reference": kind})


def check_step(config: RunConfig, batches: BatchPlan) -> None:
    """Check that a step has rows enough for the loss; a packed row has several answers.

    Raises:
        ConfigError: It has one, and the loss takes a KL over those of a step.
    """
    if config.takes_kl and not config.packing and batches.rows_per_step == 1:
        raise ConfigError(
            "loss kto takes its KL over the answers of an optimizer step, and a step has one "
            "(per_device_train_batch_size 1, gradient_accumulation_steps 1)",
            hint="--gradient-accumulation-steps 8; --loss-type apo_zero_unpaired needs no KL",
        )


def describe_objective(config: RunConfig, model: Any) -> str | None:
    """Return a line on the objective of a run whose keys are resolved; None of sft.

    Args:
        model: The one of the run, with weights or without.
    """
    keys = OBJECTIVES[config.objective]
    if keys.objective == "sft":
        return None
    weights = config.losses
    losses = ", ".join(n if w == 1 else f"{w:g} x {n}" for n, w in weights.items())
    parts = [f"loss {losses}"] if losses else []
    if "beta" in keys.reads:
        parts.append(f"beta {config.beta:g}")
    parts += [
        f"{key} {value}"
        for key in ("center_rewards_coefficient", "class_weights")
        if (value := getattr(config, key)) is not None
    ]
    if "temperature" in keys.reads:
        parts.append(f"temperature {config.temperature:g}")
        parts.append(f"ce_weight {config.ce_weight:g}")
        parts.append(f"teacher {config.teacher_model_name_or_path}")
    if "desirable_weight" in keys.reads:
        parts.append(f"desirable_weight {config.desirable_weight:g}")
        parts.append(f"undesirable_weight {config.undesirable_weight:g}")
    if "cpo_alpha" in keys.reads:
        parts.append(f"cpo_alpha {config.likelihood_weight:g}")
    if "simpo" in weights or "alphapo" in weights:
        parts.append(f"simpo_gamma {config.simpo_gamma:g}")
    if "reference" in keys.reads:
        parts.append(f"reference {config.reference}")
    if weight := balance_weight(model):
        parts.append(f"{weight:g} x {BALANCE}, the balance of experts")
    return f"objective: {config.objective}" + (f": {', '.join(parts)}" if parts else "")
