"""The device and the dtypes of parameters, those of a run and those in the files of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from liger_cli.common.readers import MAX_BYTES, parse_json
from liger_cli.config import RunConfig
from liger_cli.errors import ConfigError, EnvironmentProblem
from liger_cli.training.checkpoints.sharded_state import model_dtype
from liger_cli.training.checkpoints.shards import has_shards
from liger_cli.training.model.demo_model import converted_model
from liger_cli.training.model.presets import ModelSource

__all__ = ["check_device", "choose_dtype", "compute_dtype", "parameter_dtype", "stored_dtype"]

_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def choose_dtype(dtype: Literal["auto"] | torch.dtype, device: torch.device) -> torch.dtype:
    """Return a dtype of parameters; "auto" is bfloat16 on an accelerator that has it."""
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        # Emulated bfloat16 is slower than float32, and counts as supported unless it is left out.
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "xpu"
    return torch.bfloat16 if has_bfloat16 else torch.float32


def parameter_dtype(
    config: RunConfig, device: torch.device, *, adapts: bool = False
) -> torch.dtype:
    """Return the dtype of the parameters; auto is bfloat16 where a GPU has it, else float32.

    Autocast keeps float32 parameters: it would gain nothing over bfloat16 ones. Under an adapter
    the model is frozen, so that its parameters may as well have the dtype of autocast.
    """
    if config.dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[config.dtype]
    if adapts:
        is_half = config.fp16 and device.type != "cpu"
        return torch.float16 if is_half else choose_dtype("auto", device)
    return torch.float32 if config.bf16 or config.fp16 else choose_dtype("auto", device)


def compute_dtype(config: RunConfig, device: torch.device, *, adapts: bool = False) -> torch.dtype:
    """Return the dtype that products are computed in: that of autocast, or of the parameters."""
    if config.bf16 or config.fp16:
        return torch.bfloat16 if config.bf16 else torch.float16
    return parameter_dtype(config, device, adapts=adapts)


def stored_dtype(source: ModelSource) -> torch.dtype:
    """Return the dtype of a model's weights as they are stored; float32 of random ones.

    What config.json says is a wish; the files themselves are asked where they are at hand.
    """
    folder = converted_model(source) if source.kind == "package" else source.path
    found = _largest_part(folder) if folder is not None and folder.is_dir() else None
    if found is None and folder is not None and has_shards(folder):
        found = str(model_dtype(folder)).removeprefix("torch.")
    config = source.config or {}
    name = found or config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _largest_part(folder: Path) -> str | None:
    """Return the floating dtype that most of the values in the safetensors of a folder have."""
    sizes: dict[str, int] = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            content = file.read(min(size, MAX_BYTES))
        try:
            for entry in parse_json(content).values():
                if (name := _NAMES.get(entry.get("dtype", ""))) is not None:
                    begin, end = entry["data_offsets"]
                    sizes[name] = sizes.get(name, 0) + end - begin
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of safetensors: {error}") from error
    return max(sizes, key=lambda name: sizes[name]) if sizes else None


def check_device(device: str | torch.device) -> torch.device:
    """Return a device that can hold a tensor.

    Raises:
        EnvironmentProblem: It cannot.
    """
    try:
        checked = torch.device(device)
        torch.empty(0, device=checked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise EnvironmentProblem(f"device {device} cannot be used: {first_line}") from error
    return checked
