"""The keys of the model, of its adapter, and of what it learns."""

from __future__ import annotations

import functools
from typing import Literal

from pydantic import ConfigDict

from liger_cli.config.key_checks import KeyChecks
from liger_cli.config.pairs import Pairs
from liger_cli.config.value_types import Names, Numbers, Tokens, key

__all__ = ["ModelKeys"]

_model = functools.partial(key, "Model and kernels")
_adapter = functools.partial(key, "Adapter")
_objective = functools.partial(key, "Objective")


class ModelKeys(KeyChecks):
    """The first of the keys; Keys has them all."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = _model(..., "Preset, directory, config.json or hub id.", min_length=1)
    ops: Names = _model("auto", "auto, all, none, a list such as rope,rmsnorm,flce, or auto,-rope.")
    attn_implementation: str | None = _model(None, "Attention of transformers: eager, sdpa, ...")
    save_memory: bool = _model(
        True, "Recompute norm outputs and gated products in backward instead of saving them."
    )
    torch_compile: Literal["auto", True, False] = _model(
        "auto",
        "Compile the patched model with torch.compile; auto: on a GPU that waits for the host.",
    )
    use_regional_compilation: bool | None = _model(
        None,
        "With torch_compile: each layer by itself. null: yes, unless gradient_checkpointing is on.",
    )

    adapter: Literal["none", "lora", "dora"] = _adapter(
        "none", "Train an adapter beside the frozen model; none trains the model itself."
    )
    lora_r: int = _adapter(16, "Rank of the adapter's matrices.", ge=1)
    lora_alpha: int = _adapter(32, "Scale of the adapter; it is divided by the rank.", ge=1)
    lora_dropout: float = _adapter(0.0, "Dropout of the adapter's input.", ge=0, lt=1)
    lora_target_modules: Names = _adapter(
        "all-linear", "Names of the modules that get one; all-linear is all but the head."
    )
    lora_modules_to_save: Names | None = _adapter(
        None, "Names of modules that are trained whole and saved with the adapter."
    )
    lora_exclude_modules: Names | None = _adapter(
        None, "Names of modules that lora_target_modules leaves out."
    )
    lora_target_parameters: Names | None = _adapter(
        None, "Names of parameters that get one too, such as experts.down_proj of experts."
    )
    lora_rank_pattern: Pairs | None = _adapter(
        None, "Other ranks by name of the module (a regular expression), as q_proj=8,v_proj=32."
    )
    use_rslora: bool = _adapter(False, "Divide the scale by the root of the rank.")
    load_in_4bit: bool = _adapter(
        False, "QLoRA: hold the frozen model in 4 bits; needs a CUDA GPU and bitsandbytes."
    )
    load_in_8bit: bool = _adapter(False, "Hold the frozen model in 8 bits; needs the same.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = _adapter("nf4", "Data type of the 4 bits.")
    use_bnb_nested_quant: bool = _adapter(
        True, "Quantise the scales of the 4 bits too; without it they take 9 % more."
    )

    objective: Literal[
        "sft", "dpo", "orpo", "cpo", "simpo", "ipo", "kto", "distill", "reward", "classify"
    ] = _objective(
        "sft",
        "sft: the next token; distill: that of a teacher; classify: the class of a text; kto "
        "learns from answers labelled good or bad, the others from pairs of a chosen and a "
        "rejected one, reward a model that scores.",
    )
    beta: float = _objective(
        0.1,
        "Weight of the reference or the margin in a reward; of orpo, of its odds ratio; of "
        "distill, 0 forward KL, 1 reverse KL, Jensen-Shannon between.",
        ge=0,
    )
    loss_type: Names | None = _objective(
        None, "Losses of dpo, or the one of cpo or kto (docs/preferences.md). null: sigmoid, kto."
    )
    loss_weights: Numbers | None = _objective(None, "Weights of several losses. null: 1 each.")
    label_smoothing: float = _objective(
        0.0, "Share of pairs that are taken to be the wrong way round.", ge=0, lt=0.5
    )
    cpo_alpha: float | None = _objective(
        None, "Weight of the likelihood of chosen answers. null: 1, of simpo and alphapo 0.", ge=0
    )
    simpo_gamma: float = _objective(0.5, "Margin that simpo and alphapo ask for.", ge=0)
    alpha: float = _objective(0.0, "Shape of the rewards of cpo (AlphaPO); 0: log-likelihoods.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        _objective("reverse_kl", "Divergence that keeps dpo near its reference.")
    )
    f_alpha_divergence_coef: float = _objective(0.5, "Exponent of alpha_divergence.")
    discopop_tau: float = _objective(0.05, "Temperature of discopop.", gt=0)
    ld_alpha: float | None = _objective(
        None, "Weight of tokens beyond the shorter answer of a pair (LD-DPO). null: 1.", ge=0, le=1
    )
    use_weighting: bool = _objective(
        False, "Weigh pairs by the likelihood that the model gives them (WPO)."
    )
    desirable_weight: float = _objective(1.0, "Weight of answers labelled good in kto.", ge=0)
    undesirable_weight: float = _objective(1.0, "Weight of answers labelled bad in kto.", ge=0)
    reference: str = _objective(
        "auto",
        "Model that dpo and kto stay near: adapter_off, model (as it was), precompute (its values, "
        "before the first step), none, or another model. auto: without the new adapter, else "
        "precompute.",
        min_length=1,
    )
    sync_ref_model: bool = _objective(False, "Move the reference towards the model (TR-DPO).")
    ref_model_mixup_alpha: float = _objective(
        0.6, "Part of the model in the reference then.", gt=0, le=1
    )
    ref_model_sync_steps: int = _objective(512, "Steps between these moves.", ge=1)
    disable_dropout: bool = _objective(
        True, "Train without dropout on pairs, so that both answers are seen by the same model."
    )

    teacher_model_name_or_path: str | None = _objective(
        None, "Model whose distributions distill learns: a preset, a directory or a hub id."
    )
    temperature: float = _objective(
        1.0, "Divides the logits of model and teacher in distill.", gt=0
    )
    ce_weight: float = _objective(
        0.0, "Weight of the cross-entropy of the labels beside distill's divergence.", ge=0
    )

    center_rewards_coefficient: float | None = _objective(
        None, "Weight of the squared sum of both rewards of a pair, which centers them.", ge=0
    )
    num_labels: int | None = _objective(
        None, "Classes of classify. null: as many as label_names, else as the data have.", ge=2
    )
    label_names: Tokens | None = _objective(
        None, "Their names, in the order of their numbers. null: those in the data."
    )
    class_weights: Numbers | None = _objective(
        None, "Weight of the loss of each class; with several labels a row, where a row has it."
    )
