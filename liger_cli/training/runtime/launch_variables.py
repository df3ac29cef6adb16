"""The environment variables by which `accelerate launch` configures a run.

Each that accelerate or transformers reads is in one of four tables: REFUSED asks for something that
this version does not do, TRANSLATED for what keys of a run ask for, HONOURED is done, HARMLESS
changes nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from pydantic import ValidationError

from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.parallel.mesh import explicit_plan
from liger_cli.training.runtime.launch_translation import (
    USE_FSDP,
    USE_MESH,
    Asked,
    deepspeed_hint,
    is_off,
    read_launch,
)

__all__ = ["HARMLESS", "HONOURED", "REFUSED", "TRANSLATED", "config_of_launch"]

_USE_CPU = "ACCELERATE_USE_CPU"
_SIZES = ("dp_replicate_size", "dp_shard_size")

# (variables) -> what a variable that is on asks for, and a hint.
Problem = Callable[[Mapping[str, str]], tuple[str, str]]


def _deepspeed(environ: Mapping[str, str]) -> tuple[str, str]:
    return "for DeepSpeed; keys of the run say that here, not the launch", deepspeed_hint(environ)


def _unknown_kind(kind: str) -> Problem:
    """Return the refusal of a kind of run which there is not."""
    hint = "liger train --nproc auto, torchrun or accelerate launch --multi_gpu starts a process "
    hint += "for each GPU."
    return lambda environ: (f"for {kind}, with which this version does not train", hint)


def _compiles(environ: Mapping[str, str]) -> tuple[str, str]:
    return "for torch.compile", "Compilation is a key of the run: --torch-compile."


REFUSED: Mapping[str, Problem] = {
    "ACCELERATE_USE_DEEPSPEED": _deepspeed,
    "ACCELERATE_USE_MEGATRON_LM": _unknown_kind("Megatron-LM"),
    "ACCELERATE_USE_SAGEMAKER": _unknown_kind("SageMaker"),
    "ACCELERATE_IN_TPU_POD": _unknown_kind("a TPU pod"),
    "ACCELERATE_DOWNCAST_BF16": _unknown_kind("bf16 on a TPU"),
    "ACCELERATE_DYNAMO_BACKEND": _compiles,
}
TRANSLATED: Mapping[str, str] = {
    USE_FSDP: "with the variables FSDP_*",
    USE_MESH: "with the sizes",
    "PARALLELISM_CONFIG_*_SIZE": "dp_replicate_size, dp_shard_size; others must be 1",
    "ACCELERATE_MIXED_PRECISION": "bf16, fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}
HONOURED: Mapping[str, str] = {
    _USE_CPU: "as --use-cpu",
    "ACCELERATE_TORCH_DEVICE": "by accelerate, which places the run there",
    "ACCELERATE_CPU_AFFINITY": "by accelerate, which binds processes to cores",
    "ACCELERATE_DEBUG_MODE": "by accelerate, which compares shapes across processes",
    "ACCELERATE_LOG_LEVEL": "by accelerate's loggers",
}
# Patterns of fnmatch.
HARMLESS: Mapping[str, str] = {
    "ACCELERATE_DYNAMO_MODE": "read with a backend, which is refused",
    "ACCELERATE_DYNAMO_USE_*": "read with a backend, which is refused",
    "ACCELERATE_DEEPSPEED_*": "read with DeepSpeed, which is refused",
    "ACCELERATE_CONFIG_DS_FIELDS": "read with DeepSpeed, which is refused",
    "ACCELERATE_GRADIENT_CLIPPING": "read with DeepSpeed, which is refused",
    "ACCELERATE_FP8_*": "read with fp8, which is refused",
    "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "read with SageMaker, which is refused",
    "ACCELERATE_ALLOW_CP_STANDALONE": "read with context parallelism, which is refused",
    "ACCELERATE_BYPASS_DEVICE_MAP": "for models on several devices, which prepare never sees",
    "ACCELERATE_INIT_INCLUDE_BUFFERS": "for init_empty_weights, which no run calls",
    "ACCELERATE_ENABLE_RICH": "how accelerate shows its own tracebacks",
    "ACCELERATE_DEBUG_RDV_FILE": "for accelerate's debug_launcher",
    "ACCELERATE_NUM_PROCESSES": "for accelerate's own tests",
}


def config_of_launch(
    config: RunConfig,
    notify: Callable[[str], None],
    environ: MutableMapping[str, str] = os.environ,
) -> RunConfig:
    """Return the configuration with the settings of the launch.

    Variables of FSDP and of meshes are taken out of the environment: accelerate and transformers
    would act on them as well.

    Args:
        notify: Gets a line about what the launch asks for.

    Raises:
        EnvironmentProblem: A variable asks for another kind of run than config and this version do.
    """
    for name, problem in REFUSED.items():
        if name in environ and not is_off(environ[name]):
            asks, hint = problem(environ)
            raise EnvironmentProblem(f"the launch asks {asks} ({name}={environ[name]})", hint=hint)
    asked = read_launch(environ)
    if asked.unknown:
        raise EnvironmentProblem(
            f"the launch asks for what this version has nothing like ({asked.unknown[0]})",
            hint="Leave it out of the launch, or of its YAML.",
        )
    changed = _with_keys(config, asked, int(environ.get("WORLD_SIZE") or 1))
    if changed is not config or asked.without_effect:
        notify(_line(asked))
    for name in [name for name in environ if name.startswith(("FSDP_", "PARALLELISM_CONFIG_"))]:
        del environ[name]
    environ.pop(USE_FSDP, None)
    environ.pop(USE_MESH, None)
    if is_off(environ.get(_USE_CPU, "")):
        return changed
    return changed.model_copy(update={"use_cpu": True})


def _with_keys(config: RunConfig, asked: Asked, num_processes: int) -> RunConfig:
    """Return the configuration with the keys of a launch; the same where it has them.

    Raises:
        EnvironmentProblem: A key is given with another value.
    """
    new = {key: value for key, value in asked.keys.items() if getattr(config, key) != value}
    if not new:
        return config
    changed = config.model_copy(update=new)
    given = config.model_fields_set
    # Sizes may say the same in other words.
    if given.intersection(_SIZES) and _same_layout(config, changed, num_processes):
        given = given.difference(_SIZES)
    for key in sorted(new.keys() & given):
        raise EnvironmentProblem(
            f"the launch asks for {key} {_word(new[key])} ({asked.said[key]}), and the "
            f"configuration for {_word(getattr(config, key))}",
            hint=f"Leave {key} out of one of the two.",
        )
    try:
        RunConfig(**{key: getattr(changed, key) for key in changed.model_fields_set})
    except ValidationError as error:
        said = " ".join(dict.fromkeys(asked.said[key] for key in sorted(new)))
        raise EnvironmentProblem(
            f"the launch asks for what the other keys do not allow ({said}): "
            + "; ".join(detail["msg"] for detail in error.errors())
        ) from None
    return changed


def _same_layout(config: RunConfig, other: RunConfig, num_processes: int) -> bool:
    return explicit_plan(config, num_processes) == explicit_plan(other, num_processes)


def _line(asked: Asked) -> str:
    words = ", ".join(f"{key} {_word(value)}" for key, value in asked.keys.items())
    line = f"launch: {words or 'no key'}, as its variables say"
    if asked.without_effect:
        line += f"; without effect here: {', '.join(asked.without_effect)}"
    return line


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
