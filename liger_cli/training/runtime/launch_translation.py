"""The keys of a run that mean what variables of other launches ask for: FSDP, DeepSpeed, meshes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["deepspeed_hint", "fsdp_hint", "parallelism_hint"]

# The flags that say the same as a value; None where there are none.
Flags = Callable[[str], str | None]

_OFF = ("", "0", "f", "false", "n", "no", "none", "off")
_SHARD = "--dp-shard-size -1"
_KEEP = f"{_SHARD} --no-reshard-after-forward"
_HYBRID = f"--dp-replicate-size HOSTS {_SHARD}"
_STRATEGIES = {
    "FULL_SHARD": _SHARD,
    "1": _SHARD,
    "SHARD_GRAD_OP": _KEEP,
    "2": _KEEP,
    "NO_SHARD": "",
    "3": "",
    "HYBRID_SHARD": _HYBRID,
    "4": _HYBRID,
    "HYBRID_SHARD_ZERO2": f"{_HYBRID} --no-reshard-after-forward",
    "5": f"{_HYBRID} --no-reshard-after-forward",
}


def _if_on(flag: str) -> Flags:
    return lambda value: "" if _is_off(value) else flag


def _unless_off(flag: str | None) -> Flags:
    return lambda value: "" if _is_off(value) else flag


def _resharding(value: str) -> str | None:
    # FSDP 1 had the strategy in this variable.
    if value.upper() in _STRATEGIES and not value.isdecimal():
        return _STRATEGIES[value.upper()]
    return "--no-reshard-after-forward" if _is_off(value) else ""


def _offload(value: str) -> str | None:
    return {"none": "", "cpu": "--cpu-offload"}.get(value.strip().lower())


def _precision(value: str) -> str | None:
    value = value.strip().lower()
    return f"--{value}" if value in ("bf16", "fp16") else "" if _is_off(value) else None


def _number(flag: str) -> Flags:
    return lambda value: f"{flag} {value}" if not _is_off(value) else ""


_COMMON: Mapping[str, Flags] = {
    "ACCELERATE_MIXED_PRECISION": _precision,
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _number("--gradient-accumulation-steps"),
}
# Not in it: wrapping, prefetching and the order of loading, which are the same for every run here.
_FSDP: Mapping[str, Flags] = {
    "FSDP_RESHARD_AFTER_FORWARD": _resharding,
    "FSDP_OFFLOAD_PARAMS": _if_on("--cpu-offload"),
    "FSDP_ACTIVATION_CHECKPOINTING": _if_on("--gradient-checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": _unless_off(None),
    "FSDP_IGNORED_MODULES": _unless_off(None),
    "FSDP_STATE_DICT_TYPE": lambda value: (
        "--save-consolidated every" if value.upper() == "FULL_STATE_DICT" else ""
    ),
    **_COMMON,
}
_DEEPSPEED: Mapping[str, Flags] = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": _offload,
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": _offload,
    "ACCELERATE_GRADIENT_CLIPPING": _number("--max-grad-norm"),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": _unless_off(None),
    **_COMMON,
}
_PARALLELISM: Mapping[str, Flags] = {
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": _number("--dp-replicate-size"),
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": _number("--dp-shard-size"),
    **{
        f"PARALLELISM_CONFIG_{axis}_SIZE": lambda value: "" if value.strip() in ("", "1") else None
        for axis in ("TP", "CP", "SP")
    },
}


def fsdp_hint(environ: Mapping[str, str]) -> str:
    """Return the flags that mean what the variables of accelerate's FSDP plugin ask for."""
    # FSDP 2 has no strategy: it shards, and reshards or not.
    is_second = environ.get("FSDP_VERSION") == "2"
    strategy = "" if is_second else environ.get("FSDP_SHARDING_STRATEGY", "")
    return _hint(environ, _FSDP, _STRATEGIES.get(strategy.upper(), _SHARD))


def deepspeed_hint(environ: Mapping[str, str]) -> str:
    """Return the flags that mean what the variables of DeepSpeed ask for."""
    stages = {"0": "", "1": "", "2": _KEEP}
    stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3").strip()
    return _hint(environ, _DEEPSPEED, stages.get(stage, _SHARD))


def parallelism_hint(environ: Mapping[str, str]) -> str:
    """Return the flags that mean what a ParallelismConfig asks for."""
    return _hint(environ, _PARALLELISM, "")


def _hint(environ: Mapping[str, str], table: Mapping[str, Flags], first: str) -> str:
    flags, unknown = first.split(" --"), []
    for name, translate in table.items():
        if name in environ:
            found = translate(environ[name])
            if found is None:
                unknown.append(f"{name}={environ[name]}")
            else:
                flags += found.split(" --")
    # In the order given, each once.
    named = dict.fromkeys(f"--{flag.removeprefix('--')}" for flag in flags if flag)
    line = " ".join(["liger train --nproc auto", *named])
    lines = [f"The same by keys of the run, without that launch: {line}"]
    if unknown:
        lines.append(f"This version has nothing like {', '.join(unknown)}.")
    return "\n".join(lines)


def _is_off(value: str) -> bool:
    return value.strip().lower() in _OFF
