"""Keys of objectives that do not go together, or that an objective or a loss does not read."""

from __future__ import annotations

import functools
from collections.abc import Callable

from liger_cli.config.class_conflicts import CLASS_CONFLICTS
from liger_cli.config.keys import Keys
from liger_cli.config.objectives import (
    DIVERGENCE_LOSSES,
    OBJECTIVES,
    SMOOTHED_LOSSES,
    WHOLE_STEP_LOSSES,
    objective_keys,
    readers,
)
from liger_cli.config.pairs import read_numbers, split_names

__all__ = ["OBJECTIVE_CONFLICTS"]


def _losses(config: Keys) -> list[str]:
    return split_names(config.loss_type or OBJECTIVES[config.objective].loss_type)


def _is_set(key: str, config: Keys) -> bool:
    return bool(getattr(config, key) != type(config).model_fields[key].default)


def _is_unread(key: str, config: Keys) -> bool:
    return key not in OBJECTIVES[config.objective].reads and _is_set(key, config)


def _is_read(key: str, config: Keys) -> bool:
    return key in OBJECTIVES[config.objective].reads


def _words(names: frozenset[str]) -> str:
    return ", ".join(sorted(names))


def _lacks_loss(key: str, losses: frozenset[str], config: Keys) -> bool:
    is_set = _is_read(key, config) and _is_set(key, config)
    return is_set and not losses.intersection(_losses(config))


def _has_other_losses(key: str, losses: frozenset[str], config: Keys) -> bool:
    is_set = _is_read(key, config) and _is_set(key, config)
    return is_set and not losses.issuperset(_losses(config))


def _has_wrong_losses(config: Keys) -> bool:
    known = OBJECTIVES[config.objective].losses
    return bool(known) and not set(known).issuperset(_losses(config))


def _trains_all(key: str, config: Keys) -> bool:
    return getattr(config, key) in ("all", False)


_WEIGHED = frozenset(OBJECTIVES["dpo"].losses) - WHOLE_STEP_LOSSES - {"sft"}

OBJECTIVE_CONFLICTS: tuple[tuple[tuple[str, ...], str, Callable[[Keys], bool]], ...] = (
    *(
        (
            (key, "objective"),
            f"{key} is read by the objectives {', '.join(readers(key))}; set objective to one of "
            f"them, or leave {key} out",
            functools.partial(_is_unread, key),
        )
        for key in sorted(objective_keys())
    ),
    *(
        (
            ("loss_type", "objective"),
            f"the losses of objective {name} are {', '.join(keys.losses)}",
            functools.partial(lambda name, c: c.objective == name and _has_wrong_losses(c), name),
        )
        for name, keys in OBJECTIVES.items()
        if "loss_type" in keys.reads
    ),
    (
        ("loss_type", "objective"),
        "objectives cpo and kto have one loss_type",
        lambda c: c.objective in ("cpo", "kto") and len(_losses(c)) > 1,
    ),
    (
        ("desirable_weight", "undesirable_weight"),
        "with both weights at 0 there is no loss to learn from",
        lambda c: c.desirable_weight == c.undesirable_weight == 0,
    ),
    *(
        (
            ("objective", key),
            f"objective kto scores completions alone, which it also puts behind other prompts; "
            f"leave {key} out",
            functools.partial(lambda key, c: c.objective == "kto" and _trains_all(key, c), key),
        )
        for key in ("train_on", "completion_only_loss", "assistant_only_loss")
    ),
    (
        ("loss_weights", "loss_type"),
        "loss_weights has a weight for each loss of loss_type, as loss_type sigmoid,sft with "
        "loss_weights 1,0.1",
        lambda c: (
            c.loss_weights is not None and len(read_numbers(c.loss_weights)) != len(_losses(c))
        ),
    ),
    (
        ("loss_weights", "loss_type"),
        "with every weight at 0 there is no loss to learn from",
        lambda c: c.loss_weights is not None and not any(read_numbers(c.loss_weights)),
    ),
    (
        ("beta", "objective"),
        "beta is above 0; 0 is for orpo, where it leaves the likelihood of chosen answers, and for "
        "distill, where it is the forward KL",
        lambda c: c.beta == 0 and c.objective not in ("orpo", "sft", "distill"),
    ),
    (
        ("beta", "objective"),
        "beta of distill is from 0 (forward KL) to 1 (reverse KL)",
        lambda c: c.beta > 1 and c.objective == "distill",
    ),
    (
        ("objective", "teacher_model_name_or_path"),
        "objective distill needs a teacher: set teacher_model_name_or_path to a preset, a "
        "directory or a hub id of the same vocabulary",
        lambda c: c.objective == "distill" and c.teacher_model_name_or_path is None,
    ),
    (
        ("label_smoothing", "loss_type"),
        f"label_smoothing is read by the losses {_words(SMOOTHED_LOSSES)}",
        functools.partial(_lacks_loss, "label_smoothing", SMOOTHED_LOSSES),
    ),
    (
        ("loss_type", "label_smoothing"),
        "exo_pair needs label_smoothing above 0; its paper recommends 1e-3",
        lambda c: c.label_smoothing == 0 and "exo_pair" in _losses(c),
    ),
    (
        ("discopop_tau", "loss_type"),
        "discopop_tau is read by the loss discopop",
        functools.partial(_lacks_loss, "discopop_tau", frozenset({"discopop"})),
    ),
    (
        ("simpo_gamma", "loss_type"),
        "simpo_gamma is read by the losses simpo and alphapo",
        functools.partial(_lacks_loss, "simpo_gamma", frozenset({"simpo", "alphapo"})),
    ),
    (
        ("loss_type", "cpo_alpha"),
        "loss_type alphapo has no likelihood of chosen answers; set cpo_alpha to 0, or loss_type "
        "to simpo with alpha",
        lambda c: bool(c.cpo_alpha) and "alphapo" in _losses(c),
    ),
    (
        ("f_divergence_type", "loss_type"),
        f"f_divergence_type is read by the losses {_words(DIVERGENCE_LOSSES)}; leave the others "
        "out, or set reverse_kl",
        functools.partial(_has_other_losses, "f_divergence_type", DIVERGENCE_LOSSES),
    ),
    (
        ("f_alpha_divergence_coef", "f_divergence_type"),
        "f_alpha_divergence_coef is for f_divergence_type alpha_divergence",
        lambda c: (
            _is_set("f_alpha_divergence_coef", c) and c.f_divergence_type != "alpha_divergence"
        ),
    ),
    (
        ("use_weighting", "loss_type"),
        f"use_weighting weighs pairs, which are apart in the losses {_words(_WEIGHED)}",
        functools.partial(_has_other_losses, "use_weighting", _WEIGHED),
    ),
    *(
        (
            (key, "sync_ref_model"),
            f"{key} is for sync_ref_model",
            functools.partial(lambda key, c: not c.sync_ref_model and _is_set(key, c), key),
        )
        for key in ("ref_model_mixup_alpha", "ref_model_sync_steps")
    ),
    (
        ("sync_ref_model", "reference"),
        "sync_ref_model needs reference model, whose weights are in memory",
        lambda c: c.sync_ref_model and c.reference not in ("auto", "model"),
    ),
    (
        ("sync_ref_model", "ref_model_mixup_alpha", "adapter"),
        "the product of two mixed matrices is no mixture: with an adapter sync_ref_model needs "
        "ref_model_mixup_alpha 1",
        lambda c: c.sync_ref_model and c.adapter != "none" and c.ref_model_mixup_alpha < 1,
    ),
    *CLASS_CONFLICTS,
    (
        ("streaming", "reference"),
        "reference precompute passes over all rows before the first step, which a stream has not",
        lambda c: c.streaming and c.reference == "precompute",
    ),
    (
        ("lora_dropout", "disable_dropout"),
        "disable_dropout leaves no dropout on answers that are compared; set it to false to train "
        "with lora_dropout",
        lambda c: (
            OBJECTIVES[c.objective].compares_answers and c.disable_dropout and c.lora_dropout > 0
        ),
    ),
)
