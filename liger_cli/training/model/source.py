"""Finds, builds and loads the model that `--model` names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from liger_cli.common.hub import fetch_config, loading_error
from liger_cli.common.readers import check_regular_files, expand_path, read_json
from liger_cli.errors import ConfigError, LigerError
from liger_cli.training.model.adapters import ADAPTER_CONFIG, find_base, load_adapter, with_adapter
from liger_cli.training.model.build_limits import check_sizes, counted_modules
from liger_cli.training.model.classifiers import (
    HEAD_WEIGHT,
    check_head,
    draw_head,
    missing_line,
)
from liger_cli.training.model.demo_model import converted_model
from liger_cli.training.model.dtypes import check_device, choose_dtype
from liger_cli.training.model.names import check_model_name, preset_of
from liger_cli.training.model.new_tokens import extend_embeddings
from liger_cli.training.model.presets import ModelSource, list_presets, read_preset
from liger_cli.training.model.run_models import find_run_model
from liger_cli.training.model.shard_loading import (
    check_plain,
    has_only_shards,
    has_weights,
    load_shards,
)
from liger_cli.training.model.tokenizers import load_tokenizer
from liger_kernels.nearest import nearest_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "ModelSource",
    "build_meta_model",
    "list_presets",
    "load_model",
    "load_tokenizer",
    "resolve_model",
    "vocabulary_size",
]

_log = logging.getLogger(__name__)

_WHOLE_MODEL = ("model*.safetensors*", "pytorch_model*.bin*")


def resolve_model(name: str, notify: Callable[[str], None] | None = None) -> ModelSource:
    """Return where a model comes from: a preset, a directory, a config.json, or the hub.

    A preset goes before a directory of the same name; write ./name for the directory. That of a run
    resolves to its best checkpoint, else its last.

    Args:
        name: As --model takes it.
        notify: Called with the checkpoint of a run and with damaged ones; logged by default.

    Raises:
        ConfigError: No preset and no path has this name, or the path holds no model.
        DataError: Every checkpoint of the run is damaged.
        EnvironmentProblem: A hub id is out of reach.
    """
    check_model_name(name)
    if (preset := preset_of(name)) is not None:
        return read_preset(preset)
    path = expand_path(name, "model")
    if path.is_dir():
        return _resolve_directory(name, find_run_model(path, notify or _log.warning))
    if path.is_file():
        return _resolve_config_file(name, path)
    config, snapshot = fetch_config(name)
    return _source("hub", name, snapshot, config, "from the Hugging Face hub")


def _resolve_directory(name: str, path: Path) -> ModelSource:
    check_regular_files(path)
    config_file = path / "config.json"
    # Some programs save the base model's config.json with an adapter.
    if (path / ADAPTER_CONFIG).is_file() and not _holds(path, _WHOLE_MODEL):
        return with_adapter(resolve_model(find_base(path)), name, path)
    if config_file.is_file():
        return _source("directory", name, path, _read_json(config_file), "a local directory")
    raise ConfigError(f"{path} has no config.json, so it is not a model's directory")


def _resolve_config_file(name: str, path: Path) -> ModelSource:
    description = "random weights in the shape of a config.json"
    return _source("config", name, path, _read_json(path), description)


def _read_json(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error


def _source(
    kind: Literal["directory", "config", "hub"],
    name: str,
    path: Path | None,
    config: Any,
    description: str,
) -> ModelSource:
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(
            f"the configuration of {name} has no model_type, so its architecture is unknown"
        )
    return ModelSource(kind, name, path, config, description, config["model_type"])


def build_meta_model(
    source: ModelSource,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str | None = None,
    trains_adapter: bool = False,
    has_buffers: bool = False,
) -> PreTrainedModel:
    """Return the model without weights, from its configuration alone.

    It is built of the same class as load_model's, on the meta device: seconds at any size.

    Args:
        source: What resolve_model found.
        dtype: Of the parameters; None leaves the choice to transformers.
        attn_implementation: As in load_model.
        trains_adapter: The same.
        has_buffers: Whether buffers, as of rotary embeddings, are computed, on the CPU.
    """
    from accelerate import init_empty_weights

    config = _make_config(source)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    attn_implementation = attn_implementation or _attention_of(config)
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with init_empty_weights(include_buffers=False) if has_buffers else torch.device("meta"):
        model = _build(source, config, **options)
    if has_buffers:
        # accelerate gives each place of a parameter another one.
        model.tie_weights()
    if source.tokens is not None:
        extend_embeddings(model, source.tokens, source.name)
    if source.adapter is None:
        return model
    return load_adapter(model, source.adapter, trains=trains_adapter)


def load_model(
    source: ModelSource,
    *,
    dtype: Literal["auto"] | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    seed: int = 0,
    trains_adapter: bool = False,
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Return the model with its weights, on the device, in evaluation mode.

    Random weights are drawn on the device itself, from the seed; every random generator is left as
    it was. The same seed gives other weights on another kind of device.

    Args:
        source: What resolve_model found.
        dtype: Of the parameters; "auto" is bfloat16 on an accelerator that has it, else float32.
        device: Where the parameters go.
        seed: Of random weights.
        trains_adapter: Whether the adapter of the source, if any, is run under autocast and may be
            trained; else it is frozen.
        notify: Called with a line on a conversion, on missing weights and on a fix without which
            the model would not run; by default they are logged as warnings.
        options: attn_implementation and quantization_config of transformers; None is the same as
            absent. By default attention is eager where scores are capped, else transformers'
            choice.

    Raises:
        EnvironmentProblem: The demo package is missing, the device too, or the hub is out of reach.
        ConfigError: The files are not a model that can be trained.
    """
    from liger_kernels.transformers.patching.upstream_fixes import repair_model

    device = check_device(device)
    config = _make_config(source)
    options = {"attn_implementation": _attention_of(config), **_without_none(options)}
    options = {"dtype": choose_dtype(dtype, device), **_without_none(options)}
    notice = notify or _log.warning
    missing: list[str] = []
    if source.kind in ("random", "config"):
        model = _build_random(source, config, device, seed, options)
    elif has_only_shards(source):
        check_plain(source, options)
        model, missing = load_shards(source, lambda: _build(source, config, **options), device)
    else:
        place = _find_weights(source, notify)
        # Of a new head transformers draws one too.
        with _seeded(seed, device) if source.is_classifier else nullcontext():
            model, missing = _load_weights(place, source, config, device, options)
    if HEAD_WEIGHT in missing:
        draw_head(model, seed)
    if line := missing_line(source, missing):
        notice(line)
    # Whether or not anything is patched later: the stock model could not run.
    if (repair := repair_model(model)) is not None:
        notice(f"{source.name}: {repair}")
    if source.tokens is not None:
        extend_embeddings(model, source.tokens, source.name)
    if source.adapter is not None:
        model = load_adapter(model, source.adapter, trains=trains_adapter).eval()
    return model


def vocabulary_size(source: ModelSource) -> int:
    """Return the rows of a model's embeddings, from its configuration alone.

    Raises:
        ConfigError: The installed transformers does not know the model.
    """
    if source.tokens is not None:
        return source.tokens.num_rows
    return int(_make_config(source).get_text_config().vocab_size)


def _make_config(source: ModelSource) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig

    # Registers liger_varlen, which a configuration may name.
    import liger_kernels.transformers.attention.interface  # noqa: F401

    values = dict(source.config or {})
    check_sizes(values, source.name)
    model_type = values.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        nearest = nearest_name(model_type, CONFIG_MAPPING)
        raise ConfigError(
            f"the installed transformers knows no model type {model_type!r}, which {source.name} is"
            + (f"; did you mean {nearest!r}?" if nearest else ""),
            hint="code that comes with a model is never run",
        )
    try:
        return AutoConfig.for_model(model_type, **values)
    # A configuration class raises any kind of error for its values.
    except Exception as error:
        raise ConfigError(
            f"the configuration of {source.name} (model type {model_type}) is not one that the "
            f"installed transformers can build: {' '.join(str(error).split())}"
        ) from error


def _auto_class(source: ModelSource, config: PretrainedConfig) -> Any:
    """Return the auto class of a model's kind.

    That is image-text for a configuration with a vision part, else causal LM; of a model of
    sequence classification the class of it.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if source.is_classifier:
        return AutoModelForSequenceClassification
    has_vision = getattr(config, "vision_config", None) is not None
    is_image_text = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if is_image_text and (has_vision or not is_causal):
        return AutoModelForImageTextToText
    if is_causal:
        return AutoModelForCausalLM
    raise ConfigError(
        f"{source.name} is a {config.model_type} model, which is not a causal language model"
    )


def _attention_of(config: PretrainedConfig) -> str | None:
    """Return the attention that computes this model, where the default one may not."""
    text_config = config.get_text_config()
    # Some releases of transformers choose sdpa here, and drop the cap.
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) else None


def _build(source: ModelSource, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    auto_class = _auto_class(source, config)
    try:
        with counted_modules(source.name):
            model = auto_class.from_config(config, trust_remote_code=False, **options)
    except (torch.OutOfMemoryError, MemoryError, LigerError):
        raise
    # Values that do not fit together surface as whatever the model's constructor raises.
    except Exception as error:
        raise ConfigError(
            f"{source.name} cannot be built from its configuration: "
            f"{type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if source.is_classifier:
        check_head(source, model)
    return model


def _build_random(
    source: ModelSource,
    config: PretrainedConfig,
    device: torch.device,
    seed: int,
    options: dict[str, Any],
) -> PreTrainedModel:
    draws_there = device.type in ("cpu", "cuda", "xpu")
    place = device if draws_there else torch.device("cpu")
    with _seeded(seed, place), place:
        model = _build(source, config, **options)
    return (model if draws_there else model.to(device)).eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the generators of the CPU and of this device only, and restore their states."""
    generators = [torch.default_generator]
    if device.type != "cpu":
        module = getattr(torch, device.type)
        module.init()
        index = module.current_device() if device.index is None else device.index
        generators.append(module.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _find_weights(source: ModelSource, notify: Callable[[str], None] | None) -> str:
    """Return the directory or hub name that transformers loads a source from."""
    if source.kind == "package":
        return str(converted_model(source, notify))
    _check_weights(source)
    return str(source.path or source.name)


def _without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _load_weights(
    place: str,
    source: ModelSource,
    config: PretrainedConfig,
    device: torch.device,
    options: dict[str, Any],
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model of files, and the names of its weights that are not in them."""
    auto_class = _auto_class(source, config)
    if source.is_classifier:
        # Its labels may be those of the run, and not of the files.
        options = {**options, "config": config}
    try:
        # transformers loads straight onto the device of this context.
        with nullcontext() if device.type == "cpu" else device:
            model, info = auto_class.from_pretrained(
                place, trust_remote_code=False, output_loading_info=True, **options
            )
    except (torch.OutOfMemoryError, LigerError):
        raise
    # Files fail in the ways of several libraries; what is wrong is in the message.
    except Exception as error:
        raise loading_error(error, f"the model {source.name}", source.is_remote) from error
    # Weights of 4 bits are where they are to be, and cannot be moved.
    placed = model if "quantization_config" in options else model.to(device)
    return placed.eval(), list(info["missing_keys"])


def _check_weights(source: ModelSource) -> None:
    if source.kind != "directory" or source.path is None:
        return
    if not has_weights(source.path):
        raise ConfigError(
            f"{source.path} has a config.json and no weights (model.safetensors)",
            hint=f"--model {source.path / 'config.json'} takes random weights of its shape",
        )


def _holds(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(path.glob(pattern), None) for pattern in patterns)
