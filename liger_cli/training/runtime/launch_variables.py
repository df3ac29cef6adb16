"""The environment variables by which `accelerate launch` configures a run.

Each that accelerate or transformers reads is in one of three tables: REFUSED asks for something
that this version does not do, HONOURED is done, HARMLESS changes nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from liger_cli.config import RunConfig
from liger_cli.errors import EnvironmentProblem
from liger_cli.training.runtime.launch_translation import (
    deepspeed_hint,
    fsdp_hint,
    parallelism_hint,
)

__all__ = ["HARMLESS", "HONOURED", "REFUSED", "config_of_launch"]

_OFF = ("", "0", "f", "false", "n", "no", "off")
_USE_CPU = "ACCELERATE_USE_CPU"

# What is asked for and a hint, or None where the value asks for nothing that config does not.
Problem = Callable[[str, RunConfig, Mapping[str, str]], tuple[str, str] | None]


def _other_way(kind: str, hint: Callable[[Mapping[str, str]], str]) -> Problem:
    """Return a check of a flag that asks for a kind of run which keys ask for here.

    Args:
        hint: (variables) -> the keys that mean the same.
    """

    def check(value: str, config: RunConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
        if _is_off(value):
            return None
        return f"for {kind}; keys of the run say that here, not the launch", hint(environ)

    return check


def _unknown_kind(kind: str) -> Problem:
    """Return a check of a flag that asks for a kind of run which there is not."""

    def check(value: str, config: RunConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
        if _is_off(value):
            return None
        return (
            f"for {kind}, with which this version does not train",
            "liger train --nproc auto, torchrun or accelerate launch --multi_gpu starts a process "
            "for each GPU.",
        )

    return check


def _size_above_one(
    value: str, config: RunConfig, environ: Mapping[str, str]
) -> tuple[str, str] | None:
    if value.strip() in ("", "1"):
        return None
    return _other_way("a parallelism", parallelism_hint)(value, config, environ)


def _other_precision(
    value: str, config: RunConfig, environ: Mapping[str, str]
) -> tuple[str, str] | None:
    asked = value.strip().lower()
    ours = "bf16" if config.bf16 else "fp16" if config.fp16 else "no"
    # "no" is also what the launcher writes where it is asked for nothing.
    if asked == ours or _is_off(asked):
        return None
    if asked in ("bf16", "fp16"):
        ask = f"for {asked} autocast, and the configuration for {ours if ours != 'no' else 'none'}"
        return ask, f"Autocast is a key of the run: --{asked}."
    return "for a precision that this version does not have", "--bf16 and --fp16 are there."


def _compiles(value: str, config: RunConfig, environ: Mapping[str, str]) -> tuple[str, str] | None:
    if _is_off(value):
        return None
    return "for torch.compile", "Compilation is a key of the run: --torch-compile."


def _other_accumulation(
    value: str, config: RunConfig, environ: Mapping[str, str]
) -> tuple[str, str] | None:
    ours = config.gradient_accumulation_steps
    if value.strip() in ("", str(ours)):
        return None
    return (
        f"for another accumulation than gradient_accumulation_steps={ours}",
        "Accumulation is a key of the run: --gradient-accumulation-steps.",
    )


REFUSED: Mapping[str, Problem] = {
    "ACCELERATE_USE_DEEPSPEED": _other_way("DeepSpeed", deepspeed_hint),
    "ACCELERATE_USE_FSDP": _other_way("FSDP", fsdp_hint),
    "ACCELERATE_USE_MEGATRON_LM": _unknown_kind("Megatron-LM"),
    "ACCELERATE_USE_SAGEMAKER": _unknown_kind("SageMaker"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": _other_way("a ParallelismConfig", parallelism_hint),
    "ACCELERATE_IN_TPU_POD": _unknown_kind("a TPU pod"),
    "ACCELERATE_DOWNCAST_BF16": _unknown_kind("bf16 on a TPU"),
    # Without the flag accelerate would leave these out.
    **{
        f"PARALLELISM_CONFIG_{axis}_SIZE": _size_above_one
        for axis in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")
    },
    "ACCELERATE_MIXED_PRECISION": _other_precision,
    "ACCELERATE_DYNAMO_BACKEND": _compiles,
    # accelerate would divide the loss by it, which is divided by the tokens of the step already.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _other_accumulation,
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


def config_of_launch(config: RunConfig, environ: Mapping[str, str] = os.environ) -> RunConfig:
    """Return the configuration with the settings of the launch, validated.

    Raises:
        EnvironmentProblem: A variable asks for another kind of run than config and this version do.
    """
    for name, check in REFUSED.items():
        problem = check(environ[name], config, environ) if name in environ else None
        if problem is not None:
            asks, hint = problem
            raise EnvironmentProblem(f"the launch asks {asks} ({name}={environ[name]})", hint=hint)
    if _is_off(environ.get(_USE_CPU, "")):
        return config
    return config.model_copy(update={"use_cpu": True})


def _is_off(value: str) -> bool:
    return value.strip().lower() in _OFF
