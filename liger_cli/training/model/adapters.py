"""LoRA, DoRA and QLoRA by peft: a frozen model and a few trained matrices beside it.

What is trained is float32, whatever the frozen parameters are: an update of a matrix in bfloat16
is often too small to change it. It is computed in the dtype of the frozen ones, under autocast.
A checkpoint is peft's directory: adapter_config.json, which names the base model, and safetensors.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from liger_cli.common.numbers import format_count
from liger_cli.common.optional_packages import require_package
from liger_cli.common.readers import expand_path, read_json
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, EnvironmentProblem, LigerError
from liger_cli.training.checkpoints.files import write_failure, written_aside
from liger_cli.training.model.adapter_names import check_names, check_parameters
from liger_cli.training.model.classifiers import HEAD, is_classifier, with_labels_of
from liger_cli.training.model.demo_model import converted_model, converted_preset
from liger_cli.training.model.new_tokens import read_tokens
from liger_cli.training.model.presets import ModelSource, NewTokens
from liger_cli.training.model.trained_rows import check_trained_rows, rows_to_train

__all__ = [
    "ADAPTER_CONFIG",
    "adapts",
    "attach_adapter",
    "base_place",
    "find_base",
    "is_adapted",
    "is_quantised",
    "load_adapter",
    "new_adapter",
    "quantization",
    "trained_line",
    "with_adapter",
]

ADAPTER_CONFIG = "adapter_config.json"

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# Beside the checkpoints of a run whose base model has random weights and is nowhere else.
_KEPT_BASE = "base"


def find_base(path: Path) -> str:
    """Return the name or the path of the model that an adapter's directory belongs to.

    Raises:
        ConfigError: It names none, or one that is gone.
    """
    file = path / ADAPTER_CONFIG
    try:
        name = read_json(file).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read as an adapter's: {error}") from error
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{file}: base_model_name_or_path does not name the base model")
    place = expand_path(name, f"{file}: base_model_name_or_path")
    if (place / ADAPTER_CONFIG).is_file() and not (place / "config.json").is_file():
        raise ConfigError(f"{file}: the base model {name} is an adapter itself")
    if place.is_dir():
        return str(place)
    # The run was moved as a whole.
    kept = path.absolute().parent / _KEPT_BASE
    if place.name == _KEPT_BASE and kept.is_dir():
        return str(kept)
    # The cache was emptied, or the adapter comes from another machine.
    if (preset := converted_preset(place)) is not None:
        return preset
    if place.is_absolute():
        raise ConfigError(
            f"{file}: the base model {name} is not there",
            hint="write the place it has now as base_model_name_or_path",
        )
    return name


def base_place(source: ModelSource, model: Any, keep: Path | None) -> str:
    """Return the name of the base model for an adapter_config.json.

    Args:
        source: Of the base model.
        model: The base model with its weights.
        keep: The directory of the run; random weights are saved in it, being nowhere else. None
            saves nothing, for a run that writes no checkpoint.
    """
    if source.kind == "hub":
        return source.name
    if source.kind == "package":
        return str(converted_model(source))
    if source.kind == "directory":
        return str((source.path or Path()).resolve())
    if keep is None:
        return ""
    place = keep / _KEPT_BASE
    try:
        with written_aside(place) as directory:
            model.save_pretrained(directory)
    except Exception as error:
        raise write_failure(error, place) from error
    return str(place.resolve())


def new_adapter(config: RunConfig, model: Any, tokens: NewTokens | None = None) -> Any:
    """Return the peft configuration of a new adapter, or None where there is to be none.

    Args:
        model: The base model; it may be on the meta device.
        tokens: New tokens, whose rows are trained too.

    Raises:
        ConfigError: The rows of new tokens would have an adapter as well.
        EnvironmentProblem: peft is missing.
    """
    if config.adapter == "none":
        return None
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    saved = config.saved_modules or []
    rows: dict[str, list[int]] = {}
    if tokens is not None and tokens.added:
        rows, whole = rows_to_train(config, model, tokens, saved)
        saved = [*saved, *whole]
    return _peft().LoraConfig(
        # Of a classifier peft trains and saves the head, which is new.
        task_type="SEQ_CLS" if is_classifier(model) else "CAUSAL_LM",
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.adapter_targets,
        modules_to_save=saved or None,
        exclude_modules=config.excluded_modules,
        target_parameters=config.target_parameters,
        rank_pattern=config.rank_pattern,
        trainable_token_indices=rows or None,
        use_rslora=config.use_rslora,
        use_dora=config.adapter == "dora",
        # Where head and embedding are one matrix they stay one.
        ensure_weight_tying=bool(is_tied and saved),
    )


def _mend_tied_copies(model: Any) -> None:
    """Give copies of tied heads the sizes of their weights.

    peft makes them with those of the embedding, and the fused loss believes no such layer.
    """
    for module in model.modules():
        copies = getattr(module, "modules_to_save", None)
        for layer in copies.values() if isinstance(copies, torch.nn.ModuleDict) else ():
            if isinstance(layer, torch.nn.Linear):
                layer.out_features, layer.in_features = layer.weight.shape


def load_adapter(model: Any, path: Path, *, trains: bool = False) -> Any:
    """Return the model with the adapter of a directory around it.

    Raises:
        ConfigError: The files are not an adapter of this model.
        EnvironmentProblem: peft is missing.
    """
    peft = _peft()
    try:
        settings = peft.PeftConfig.from_pretrained(str(path))
        if settings.peft_type != peft.PeftType.LORA:
            raise ValueError(
                f"it is of type {settings.peft_type}, and lora and dora are known here"
            )
        place = settings.base_model_name_or_path
        adapted = _attach(model, settings, base=place, trains=trains)
        if model.device.type != "meta":
            if not any((path / name).is_file() for name in _WEIGHTS):
                # peft would ask the hub for them.
                raise ValueError(f"{_WEIGHTS[0]} is missing")
            weights = peft.load_peft_weights(str(path), device="cpu")
            result = peft.set_peft_model_state_dict(adapted, weights)
            if result.unexpected_keys:
                raise ValueError(f"the model has no {result.unexpected_keys[0]}")
    except (torch.OutOfMemoryError, LigerError):
        raise
    # Files fail in the ways of several libraries; what is wrong is in the message.
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"the adapter {path} cannot be loaded: {text}") from error
    return adapted


def attach_adapter(
    model: Any,
    settings: Any,
    *,
    base: str,
    trains: bool = True,
    seed: int = 0,
    notify: Callable[[str], None] | None = None,
) -> Any:
    """Return the model with a new adapter around it, which changes nothing yet.

    Args:
        model: The base model; it may be on the meta device.
        settings: The peft configuration.
        base: The name that the adapter's checkpoints have for the base model.
        trains: Whether the adapter is to be trained, under autocast where the model is in half
            precision; else everything is frozen.
        seed: Of the adapter's random weights; every generator is left as it was.
        notify: Called with the warnings of peft.

    Raises:
        ConfigError: The model has no module or parameter of a name, or cannot have such an adapter.
    """
    # peft adds names for experts that it stacks.
    asked = copy.deepcopy(settings)
    adapted = _attach(model, settings, base=base, trains=trains, seed=seed, notify=notify)
    check_names(adapted, asked)
    return adapted


def _attach(
    model: Any,
    settings: Any,
    *,
    base: str,
    trains: bool,
    seed: int = 0,
    notify: Callable[[str], None] | None = None,
) -> Any:
    peft = _peft()
    dtype = next(model.parameters()).dtype
    device = torch.device("meta" if model.device.type == "meta" else "cpu")
    settings.inference_mode = not trains
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]), device:
        warnings.simplefilter("always", UserWarning)
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, settings)
        except (ValueError, NotImplementedError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"adapter: {text}") from error
    check_parameters(adapted)
    _mend_tied_copies(adapted)
    if trains:
        check_trained_rows(adapted, settings)
    if notify is not None:
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                notify(f"adapter: {' '.join(str(warning.message).split())}")
    settings.base_model_name_or_path = base
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    if trains and dtype != torch.float32:
        for module in adapted.modules():
            # Autocast casts it anyway; peft's own float32 copy would be kept for backward.
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    return adapted


def adapts(config: RunConfig, source: ModelSource, *, trains: bool = True) -> bool:
    """Return whether a run has an adapter on its model: a new one, or that of its source."""
    return source.adapter is not None or (trains and config.adapter != "none")


def is_adapted(model: Any) -> bool:
    """Return whether peft is around a model."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def trained_line(model: Any) -> str:
    """Return in words how many parameters are trained, and by which adapter."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes)
    trained = sum(size for size, is_trained in sizes if is_trained)
    text = f"{format_count(trained)} of {format_count(total)} parameters trained"
    text += f" ({trained / total:.2%})" if trained < total else ""
    if not is_adapted(model):
        return text
    settings = model.peft_config["default"]
    kind = "dora" if settings.use_dora else "lora"
    modules = sum(hasattr(module, "lora_A") for module in model.modules())
    ranks = {rank for module in model.modules() for rank in _ranks_of(module)}
    span = " to ".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else settings.r
    text = f"{text}: {kind} of rank {span} on {modules} modules"
    rows = settings.trainable_token_indices
    return f"{text}, and the rows of {len(next(iter(rows.values())))} new tokens" if rows else text


def _ranks_of(module: Any) -> list[int]:
    return list(module.r.values()) if hasattr(module, "lora_A") else []


def is_quantised(config: RunConfig, source: ModelSource) -> bool:
    """Return whether the frozen model is held in few bits, by a key or by its own files."""
    is_asked = config.load_in_4bit or config.load_in_8bit
    return is_asked or "quantization_config" in (source.config or {})


def quantization(config: RunConfig, source: ModelSource, device: torch.device) -> Any:
    """Return the quantization of the frozen model for load_in_4bit or 8bit; None without them.

    Raises:
        ConfigError: There is nothing frozen, or there are no files to quantise.
        EnvironmentProblem: A GPU or bitsandbytes is missing.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    key, bits = ("load_in_4bit", 4) if config.load_in_4bit else ("load_in_8bit", 8)
    if config.adapter == "none" and source.adapter is None:
        raise ConfigError(
            f"{key} holds a frozen model in {bits} bits, and adapter is none",
            hint="--adapter lora trains an adapter beside it.",
        )
    if source.kind in ("random", "config"):
        raise ConfigError(
            f"{key} quantises weights that are loaded, and those of {source.name} are random"
        )
    if device.type != "cuda":
        raise EnvironmentProblem(
            f"{key} needs a CUDA GPU, and this run is on {device.type}",
            hint="on a machine with one: pip install 'liger-kernels[quant]'",
        )
    require_package("bitsandbytes", key, "pip install 'liger-kernels[quant]'")
    from transformers import BitsAndBytesConfig

    # A new head is trained, and not held in few bits.
    whole = [HEAD] if source.is_classifier else None
    if config.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    half = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=half,
        llm_int8_skip_modules=whole,
    )


def _peft() -> Any:
    return require_package("peft", "adapter", "pip install 'liger-kernels[lora]'")


def with_adapter(base: ModelSource, name: str, path: Path) -> ModelSource:
    """Return the source of an adapter's directory: its base model and what comes on top."""
    description = f"an adapter of {base.name}"
    base = with_labels_of(path, base)
    tokens = read_tokens(path)
    return replace(base, name=name, adapter=path, description=description, tokens=tokens)
