"""Configurations of LLaMA-Factory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liger_cli.commands.config.translation import Rule, Translation, lost, needless, rename
from liger_cli.errors import ConfigError

__all__ = ["MARKS", "translate"]

# Its stages, with the objective where that is not left to other keys.
_STAGES = {"sft": None, "pt": None, "dpo": None, "kto": "kto", "rm": "reward"}
# Keys that only some of them read.
_READ_IN = {
    **dict.fromkeys(("train_on_prompt", "mask_history"), ("sft",)),
    **dict.fromkeys(("pref_loss", "pref_bco_weight", "dpo_label_smoothing"), ("dpo",)),
    **dict.fromkeys(("kto_chosen_weight", "kto_rejected_weight"), ("kto",)),
    **dict.fromkeys(("pref_beta", "pref_ftx", "ref_model"), ("dpo", "kto")),
}

# Keys by which its files are recognised.
MARKS = ("finetuning_type", "dataset_dir", "cutoff_len", "stage", "template", "lora_target")


def translate(given: Mapping[str, Any], folder: Path) -> Translation:
    """Return the configuration of a run on text, on preferences, or of a reward model.

    Args:
        given: The keys of the file.
        folder: Where it is; dataset_dir is where LLaMA-Factory would be started.

    Raises:
        ConfigError: It trains something else.
    """
    stage = given.get("stage", "sft")
    if stage not in _STAGES:
        raise ConfigError(
            f"stage: {stage}: liger trains on text, on preferences and reward models (stage "
            f"{', '.join(_STAGES)})"
        )
    found = Translation()
    given = {k: value for k, value in given.items() if value is not None and _is_read(k, stage)}
    # Its defaults that are not ours.
    defaults: dict[str, Any] = {"cutoff_len": 2048, "disable_gradient_checkpointing": False}
    if given.get("finetuning_type", "lora") == "lora":
        defaults |= {"finetuning_type": "lora", "lora_rank": 8, "lora_target": "all"}
        if not given.get("lora_alpha"):
            defaults["lora_alpha"] = 2 * int(given.get("lora_rank") or 8)
    elif given.get("finetuning_type") == "full":
        given = {key: value for key, value in given.items() if not key.startswith("lora_")}
    if stage == "dpo":
        defaults["pref_loss"] = "sigmoid"
    if (objective := _STAGES[stage]) is not None:
        found.set("objective", objective, "stage")
    found.read({**defaults, **given}, _RULES)
    if given.get("pref_ftx"):
        _set_likelihood(found, given["pref_ftx"])
    for key in ("dataset", "eval_dataset"):
        if given.get(key):
            _set_datasets(found, key, given)
    if given.get("use_dora"):
        found.set("adapter", "dora", "use_dora")
    if stage == "rm":
        found.notes.append(
            "stage rm: LLaMA-Factory trains a value head beside a language model; liger trains a "
            "model of sequence classification, whose head is called score"
        )
    if given.get("template"):
        found.notes.append(
            f"template {given['template']}: liger takes the chat template of the model; "
            "compare a row by liger data preview"
        )
    if given.get("packing") and not given.get("neat_packing"):
        found.notes.append("packing: in liger attention does not leave a document (neat_packing)")
    return found


def _is_read(key: str, stage: str) -> bool:
    """Return whether LLaMA-Factory reads a key in a stage; some it passes over in others."""
    return key not in _READ_IN or stage in _READ_IN[key]


def _set_datasets(found: Translation, key: str, given: Mapping[str, Any]) -> None:
    names = given[key]
    names = names.split(",") if isinstance(names, str) else names
    where = str(given.get("dataset_dir") or "data")
    paths = [f"{os.path.join(where, 'dataset_info.json')}:{name.strip()}" for name in names]
    limit = given.get("max_samples")
    if key == "eval_dataset":
        sets = {path.rpartition(":")[2]: path for path in paths}
        found.set(key, paths[0] if len(paths) == 1 else sets, key)
        return
    extra = {} if limit is None else {"max_samples": limit}
    if given.get("stage") == "pt":
        found.notes.append("stage pt: LLaMA-Factory joins the texts; text_mode: stream does")
    found.set(key, [{"path": path, **extra} for path in paths], key)


def _preference(found: Translation, key: str, value: Any) -> None:
    if value == "hinge":
        found.set("objective", "dpo", key)
        found.set("loss_type", "hinge", key)
    elif (objective := _OBJECTIVES.get(value)) is not None:
        found.set("objective", objective, key)
    else:
        raise ConfigError(
            f"{key}: {value}: liger has {', '.join((*_OBJECTIVES, 'hinge'))}; docs/preferences.md "
            "names other losses"
        )


def _set_likelihood(found: Translation, weight: Any) -> None:
    """Add the likelihood of chosen answers to the loss of dpo, which is a loss by itself here."""
    loss = found.values.get("loss_type", "sigmoid")
    if found.values.get("objective") != "dpo":
        found.lost["pref_ftx"] = "it is for dpo; cpo and simpo have cpo_alpha"
        return
    found.set("loss_type", f"{loss},sft", "pref_ftx")
    found.set("loss_weights", f"1,{weight}", "pref_ftx")


def _adapter(found: Translation, key: str, value: Any) -> None:
    if value == "full":
        found.set("adapter", "none", key)
    elif value == "lora":
        found.set("adapter", "lora", key)
    else:
        found.lost[key] = f"{value!r}: liger trains whole models, LoRA and DoRA"


def _bits(found: Translation, key: str, value: Any) -> None:
    if value == 4:
        found.set("load_in_4bit", True, key)
    else:
        found.lost[key] = f"{value}: liger loads in 4 bits or whole"


def _eval_part(found: Translation, key: str, value: Any) -> None:
    if not 0 < value < 1:
        found.lost[key] = f"{value} rows: eval_fraction is a part of the rows"
    else:
        found.set("eval_fraction", float(value), key)


def _train_on(kind: str) -> Rule:
    def rule(found: Translation, key: str, value: Any) -> None:
        if value:
            found.set("train_on", kind, key)

    return rule


def _checkpointing(found: Translation, key: str, value: Any) -> None:
    found.set("gradient_checkpointing", not value, key)


def _packing(found: Translation, key: str, value: Any) -> None:
    if value is True:
        found.set("packing", True, key)


_NEEDLESS = (
    *("do_train", "do_eval", "overwrite_cache", "overwrite_output_dir", "plot_loss", "stage"),
    *("preprocessing_batch_size", "ddp_timeout", "include_num_input_tokens_seen", "use_fast"),
    *("use_fast_tokenizer", "use_dora", "dataset_dir", "dataset", "eval_dataset", "max_samples"),
    *(
        "pref_ftx",
        "template",
        "trust_remote_code",
        "low_cpu_mem_usage",
        "save_strategy",
        "enable_liger_kernel",
    ),
    *(
        "remove_unused_columns",
        "mix_strategy_concat",
        "save_only_model",
        "ignore_pad_token_for_loss",
    ),
)
# fa2 is left to us: ours is as fast where the kernels of flash-attn are not installed.
_FLASH = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": None}
_OBJECTIVES = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
_RULES: dict[str, Rule] = {
    **dict.fromkeys(_NEEDLESS, needless),
    "model_name_or_path": rename("model"),
    "adapter_name_or_path": lost("name the adapter as model, which continues to train it"),
    "finetuning_type": _adapter,
    "lora_rank": rename("lora_r"),
    "lora_target": rename("lora_target_modules", {"all": "all-linear"}),
    "additional_target": rename("lora_modules_to_save"),
    "quantization_bit": _bits,
    "cutoff_len": rename("max_length"),
    "preprocessing_num_workers": rename("dataset_num_proc"),
    "buffer_size": rename("shuffle_buffer_size"),
    "packing": _packing,
    "neat_packing": _packing,
    "train_on_prompt": _train_on("all"),
    "mask_history": _train_on("last"),
    "pref_loss": _preference,
    "pref_beta": rename("beta"),
    "kto_chosen_weight": rename("desirable_weight"),
    "kto_rejected_weight": rename("undesirable_weight"),
    "dpo_label_smoothing": rename("label_smoothing"),
    "ref_model": rename("reference"),
    "val_size": _eval_part,
    "flash_attn": rename("attn_implementation", _FLASH),
    "disable_gradient_checkpointing": _checkpointing,
    "pure_bf16": lambda found, key, value: found.set("dtype", "bfloat16", key),
    "mix_strategy": lambda found, key, value: (
        None
        if value == "concat"
        else lost("give each entry of dataset a weight")(found, key, value)
    ),
    "interleave_probs": lost("give each entry of dataset a weight"),
    "deepspeed": lost("dp_shard_size -1 shards the model over all ranks (FSDP2)"),
    "fsdp": lost("dp_shard_size -1 shards the model over all ranks (FSDP2)"),
}
