"""Keys of a run that mean what variables of other launches ask for: FSDP, meshes, DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from liger_cli.config import RunConfig

__all__ = ["USE_FSDP", "USE_MESH", "Asked", "deepspeed_hint", "is_off", "read_launch"]

USE_FSDP, USE_MESH = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_PARALLELISM_CONFIG"

Keys = Mapping[str, Any]
# The keys that say the same as a value; None where there are none.
Translate = Callable[[str], Keys | None]

_OFF = ("", "0", "f", "false", "n", "no", "none", "off")
_SHARD: Keys = {"dp_replicate_size": 1, "dp_shard_size": -1}
_KEEP: Keys = {**_SHARD, "reshard_after_forward": False}
# Of each strategy whether the ranks of a host share the model, and what else it says.
_STRATEGIES: Mapping[str, tuple[bool, Keys]] = {
    "FULL_SHARD": (False, _SHARD),
    "SHARD_GRAD_OP": (False, _KEEP),
    "NO_SHARD": (False, {"dp_shard_size": 1}),
    "HYBRID_SHARD": (True, _SHARD),
    "HYBRID_SHARD_ZERO2": (True, _KEEP),
}


def is_off(value: str) -> bool:
    """Return whether the value of a variable asks for nothing."""
    return value.strip().lower() in _OFF


def _if_on(key: str) -> Translate:
    return lambda value: {} if is_off(value) else {key: True}


def _unless_off(value: str) -> Keys | None:
    return {} if is_off(value) else None


def _nothing(value: str) -> Keys:
    return {}


def _resharding(value: str) -> Keys:
    return {"reshard_after_forward": False} if is_off(value) else {}


def _precision(value: str) -> Keys | None:
    known = {"bf16": {"bf16": True, "fp16": False}, "fp16": {"bf16": False, "fp16": True}}
    # "no" is also what the launcher writes where it is asked for nothing.
    return {} if is_off(value) else known.get(value.strip().lower())


def _offload(value: str) -> Keys | None:
    return {"none": {}, "cpu": {"cpu_offload": True}}.get(value.strip().lower())


def _number(key: str, kind: Callable[[str], Any] = int) -> Translate:
    def translate(value: str) -> Keys | None:
        if is_off(value):
            return {}
        try:
            number = kind(value)
        except ValueError:
            return None
        return {key: number} if number > 0 else None

    return translate


def _one(value: str) -> Keys | None:
    return {} if value.strip() in ("", "1") else None


_COMMON: Mapping[str, Translate] = {
    "ACCELERATE_MIXED_PRECISION": _precision,
    # accelerate would divide the loss by it, which is divided by the tokens of the step already.
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": _number("gradient_accumulation_steps"),
}
_FSDP: Mapping[str, Translate] = {
    # Read together.
    "FSDP_VERSION": _nothing,
    "FSDP_SHARDING_STRATEGY": _nothing,
    "FSDP_RESHARD_AFTER_FORWARD": _resharding,
    "FSDP_OFFLOAD_PARAMS": _if_on("cpu_offload"),
    "FSDP_ACTIVATION_CHECKPOINTING": _if_on("gradient_checkpointing"),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": _unless_off,
    "FSDP_IGNORED_MODULES": _unless_off,
    "FSDP_STATE_DICT_TYPE": lambda value: (
        {"save_consolidated": "every"} if value.upper() == "FULL_STATE_DICT" else {}
    ),
}
# Wrapping, prefetching and the order of loading, which are the same for every run here.
_WITHOUT_EFFECT = (
    *("FSDP_AUTO_WRAP_POLICY", "FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_MIN_NUM_PARAMS"),
    *("FSDP_BACKWARD_PREFETCH", "FSDP_FORWARD_PREFETCH", "FSDP_USE_ORIG_PARAMS"),
    *("FSDP_CPU_RAM_EFFICIENT_LOADING", "FSDP_SYNC_MODULE_STATES"),
)
_MESH: Mapping[str, Translate] = {
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": _number("dp_replicate_size"),
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": _number("dp_shard_size"),
    **{f"PARALLELISM_CONFIG_{axis}_SIZE": _one for axis in ("TP", "CP", "SP")},
}
_DEEPSPEED: Mapping[str, Translate] = {
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": _offload,
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": _offload,
    "ACCELERATE_GRADIENT_CLIPPING": _number("max_grad_norm", float),
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": _unless_off,
    **_COMMON,
}


@dataclass
class Asked:
    """The settings that a launch asks for.

    Attributes:
        keys: Values of keys.
        said: The variable of each key, as NAME=VALUE.
        unknown: Variables for which there is no key.
        without_effect: Names of variables that change nothing here.
    """

    keys: dict[str, Any] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)

    def add(self, name: str, value: str, found: Keys | None) -> None:
        """Add the keys that a variable asks for; later ones win over earlier ones."""
        if found is None:
            self.unknown.append(f"{name}={value}")
            return
        self.keys |= found
        self.said |= dict.fromkeys(found, f"{name}={value}")

    def read(self, table: Mapping[str, Translate], environ: Mapping[str, str]) -> None:
        """Add all variables of a table."""
        for name, translate in table.items():
            if name in environ:
                self.add(name, environ[name], translate(environ[name]))


def read_launch(environ: Mapping[str, str]) -> Asked:
    """Return the settings that `accelerate launch` asks for, but for DeepSpeed."""
    asked = Asked()
    if not is_off(environ.get(USE_FSDP, "")):
        asked.add(*_strategy(environ))
        asked.read(_FSDP, environ)
        asked.without_effect = [name for name in _WITHOUT_EFFECT if name in environ]
        known = {*_FSDP, *_WITHOUT_EFFECT}
        others = sorted(name for name in environ if name.startswith("FSDP_") and name not in known)
        asked.unknown += [f"{name}={environ[name]}" for name in others]
    uses_mesh = not is_off(environ.get(USE_MESH, ""))
    # Without the flag accelerate leaves them out: a size of one asks for nothing.
    asked.read(_MESH, {name: v for name, v in environ.items() if uses_mesh or v.strip() != "1"})
    asked.read(_COMMON, environ)
    return asked


def _strategy(environ: Mapping[str, str]) -> tuple[str, str, Keys | None]:
    """Return the variable that says how FSDP shards, its value, and the keys."""
    name, value = USE_FSDP, environ[USE_FSDP]
    # FSDP 2 has no strategy: it shards, and reshards or not.
    if environ.get("FSDP_VERSION") != "2" and "FSDP_SHARDING_STRATEGY" in environ:
        name, value = "FSDP_SHARDING_STRATEGY", environ["FSDP_SHARDING_STRATEGY"]
    # FSDP 1 had the strategy in this variable.
    if environ.get("FSDP_RESHARD_AFTER_FORWARD", "").upper() in _STRATEGIES:
        name, value = "FSDP_RESHARD_AFTER_FORWARD", environ["FSDP_RESHARD_AFTER_FORWARD"]
    if name == USE_FSDP:
        return name, value, _SHARD
    numbers = dict(zip("12345", _STRATEGIES, strict=True))
    strategy = numbers.get(value, value.upper())
    if strategy not in _STRATEGIES:
        return name, value, None
    by_host, keys = _STRATEGIES[strategy]
    ranks = int(environ.get("WORLD_SIZE") or 1)
    if strategy == "NO_SHARD":
        return name, value, {**keys, "dp_replicate_size": ranks}
    hosts = ranks // int(environ.get("LOCAL_WORLD_SIZE") or ranks) if by_host else 1
    return name, value, {**keys, "dp_replicate_size": hosts} if by_host else keys


def deepspeed_hint(environ: Mapping[str, str]) -> str:
    """Return the flags that mean what the variables of DeepSpeed ask for."""
    asked = Asked()
    stages: Mapping[str, Keys] = {"0": {}, "1": {}, "2": _KEEP}
    name = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
    stage = environ.get(name, "3").strip()
    asked.add(name, stage, stages.get(stage, _SHARD))
    asked.read(_DEEPSPEED, environ)
    line = " ".join(["liger train --nproc auto", *_flags(asked.keys)])
    lines = [f"The same by keys of the run, without that launch: {line}"]
    if asked.unknown:
        lines.append(f"This version has nothing like {', '.join(asked.unknown)}.")
    return "\n".join(lines)


def _flags(keys: Keys) -> list[str]:
    """Return the flags of keys that have another value than their default."""
    fields, flags = RunConfig.model_fields, []
    for key, value in keys.items():
        name = key.replace("_", "-")
        if value == fields[key].default:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name} {value}")
    return flags
