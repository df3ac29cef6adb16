"""The objectives by name, and the keys and losses that each of them reads.

Names, defaults and meanings are those of TRL's DPOConfig, KTOConfig, ORPOConfig and CPOConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "BALANCE",
    "DIVERGENCE_LOSSES",
    "KTO_METRICS",
    "METRICS",
    "OBJECTIVES",
    "OBJECTIVES_OF_TRL",
    "PAIR_MEANS",
    "REFERENCE_KEYS",
    "REFERENCE_KINDS",
    "REWARD_METRICS",
    "RISING_METRICS",
    "SMOOTHED_LOSSES",
    "TOKEN_METRICS",
    "WHOLE_STEP_LOSSES",
    "ObjectiveKeys",
    "objective_keys",
    "readers",
]


@dataclass(frozen=True)
class ObjectiveKeys:
    """The keys of an objective.

    Attributes:
        objective: The name of the objective that computes it: simpo is a cpo.
        reads: Keys that others do not have.
        losses: The values of loss_type.
        loss_type: Its default.
        cpo_alpha: The default of that key.
        metrics: Of an evaluation, beside loss.
        has_pairs: Whether the rows are pairs of a chosen and a rejected answer.
        is_unpaired: Whether the rows are answers labelled as good or bad.
        has_scores: Whether the model is one of sequence classification, which gives scores of a
            whole text and not of each token.
    """

    objective: str
    reads: frozenset[str] = frozenset()
    losses: tuple[str, ...] = ()
    loss_type: str | None = None
    cpo_alpha: float = 1.0
    metrics: tuple[str, ...] = field(default=())
    has_pairs: bool = True
    is_unpaired: bool = False
    has_scores: bool = False

    @property
    def compares_answers(self) -> bool:
        """Whether it scores answers, in pairs or not."""
        return self.has_pairs or self.is_unpaired


# Of all that learn from rows of tokens.
TOKEN_METRICS = ("perplexity", "token_accuracy", "entropy")
DISTILL_MEANS = ("divergence", "nll_loss")
# Of all that learn from pairs.
REWARD_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
METRICS = (*REWARD_METRICS, "logps/chosen", "logps/rejected")
KTO_METRICS = (*(name for name in METRICS if name != "rewards/accuracies"), "kl")
# The largest is the best.
RISING_METRICS = frozenset(METRICS) - {"rewards/rejected", "logps/rejected"} | {
    "token_accuracy",
    "log_odds_chosen",
    "accuracy",
    "f1",
}

_DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"),
    *("aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
_CPO_LOSSES = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
_KTO_LOSSES = ("kto", "apo_zero_unpaired")

# Losses that take label_smoothing, and those of the difference of both rewards, which an
# f-divergence can replace.
SMOOTHED_LOSSES = frozenset(
    {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "alphapo"}
)
DIVERGENCE_LOSSES = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
# Losses that sort the pairs of the whole step.
WHOLE_STEP_LOSSES = frozenset({"aot", "aot_unpaired"})

# Values of reference that are no name of another model.
REFERENCE_KINDS = frozenset({"auto", "precompute", "adapter_off", "model", "none"})

_PAIRS = frozenset({"beta", "disable_dropout"})
REFERENCE_KEYS = frozenset(
    {"reference", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"}
)
_DPO = frozenset(
    {
        *("label_smoothing", "loss_weights", "discopop_tau", "ld_alpha"),
        *("f_divergence_type", "f_alpha_divergence_coef", "use_weighting"),
    }
)
_CPO = frozenset({"label_smoothing", "cpo_alpha", "alpha"})
_KTO = frozenset({"desirable_weight", "undesirable_weight"})
_CHOICE = frozenset({"loss_type"})
_GAMMA = frozenset({"simpo_gamma"})
_CLASSES = frozenset({"num_labels", "label_names", "class_weights"})
_DISTILL = frozenset({"beta", "teacher_model_name_or_path", "temperature", "ce_weight"})

OBJECTIVES: Mapping[str, ObjectiveKeys] = {
    "sft": ObjectiveKeys("sft", metrics=TOKEN_METRICS, has_pairs=False),
    "dpo": ObjectiveKeys(
        "dpo", _PAIRS | REFERENCE_KEYS | _DPO | _CHOICE, _DPO_LOSSES, "sigmoid", metrics=METRICS
    ),
    "ipo": ObjectiveKeys("dpo", _PAIRS | REFERENCE_KEYS | _DPO, ("ipo",), "ipo", metrics=METRICS),
    "orpo": ObjectiveKeys(
        "orpo", _PAIRS, metrics=(*METRICS, "nll_loss", "log_odds_ratio", "log_odds_chosen")
    ),
    "cpo": ObjectiveKeys(
        "cpo",
        _PAIRS | _CPO | _CHOICE | _GAMMA,
        _CPO_LOSSES,
        "sigmoid",
        metrics=(*METRICS, "nll_loss"),
    ),
    "simpo": ObjectiveKeys(
        "cpo",
        _PAIRS | _CPO | _GAMMA,
        ("simpo",),
        "simpo",
        cpo_alpha=0.0,
        metrics=(*METRICS, "nll_loss"),
    ),
    "kto": ObjectiveKeys(
        "kto",
        _PAIRS | REFERENCE_KEYS | _KTO | _CHOICE,
        _KTO_LOSSES,
        "kto",
        metrics=KTO_METRICS,
        has_pairs=False,
        is_unpaired=True,
    ),
    "distill": ObjectiveKeys(
        "distill", _DISTILL, metrics=(*TOKEN_METRICS, *DISTILL_MEANS), has_pairs=False
    ),
    "reward": ObjectiveKeys(
        "reward",
        frozenset({"disable_dropout", "center_rewards_coefficient"}),
        metrics=REWARD_METRICS,
        has_scores=True,
    ),
    "classify": ObjectiveKeys(
        "classify", _CLASSES, metrics=("accuracy", "f1"), has_pairs=False, has_scores=True
    ),
}

# The balance of a model's experts, which steps have where it is a part of the loss.
BALANCE = "aux_loss"
# The metrics of all objectives but those of tokens alone, which a line of metrics.jsonl may have.
PAIR_MEANS = tuple(
    dict.fromkeys(
        name for keys in OBJECTIVES.values() for name in keys.metrics if name not in TOKEN_METRICS
    )
)

# Objectives of TRL's trainers that are not here, each with the reason.
OBJECTIVES_OF_TRL = {
    **dict.fromkeys(
        ("grpo", "rloo", "ppo", "online_dpo"), "generates answers and needs a reward for them"
    ),
    "gkd": "generates answers and needs a teacher",
}


def objective_keys() -> frozenset[str]:
    """Return the keys that only some objectives read."""
    return frozenset().union(*(keys.reads for keys in OBJECTIVES.values()))


def readers(key: str) -> list[str]:
    """Return the names of the objectives that read a key."""
    return [name for name, keys in OBJECTIVES.items() if key in keys.reads]
