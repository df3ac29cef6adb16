"""Safetensors files written tensor by tensor: one is in memory, whatever the size of the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from liger_cli.errors import ConfigError

__all__ = ["Shape", "write_safetensors"]

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Shape(NamedTuple):
    """Sizes and dtype of a tensor to write."""

    sizes: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize


def write_safetensors(
    path: Path, shapes: Mapping[str, Shape], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a file of tensors that come one after the other, in any order, and sync it.

    Args:
        path: The file.
        shapes: Of all tensors, by name.
        tensors: Names and values; each is converted to its dtype.

    Raises:
        ConfigError: A dtype is none of safetensors.
        ValueError: A tensor has another shape, or is missing or unknown.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    # The largest elements first, so that each lies at a multiple of its size.
    for name in sorted(shapes, key=lambda name: -shapes[name].dtype.itemsize):
        shape = shapes[name]
        if shape.dtype not in _NAMES:
            raise ConfigError(f"{name} is {shape.dtype}, which safetensors does not know")
        starts[name], end = end, end + shape.num_bytes
        header[name] = {
            "dtype": _NAMES[shape.dtype],
            "shape": list(shape.sizes),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        begin = file.tell()
        for name, tensor in tensors:
            if name not in starts or tuple(tensor.shape) != shapes[name].sizes:
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} has no place in {path}")
            content = tensor.detach().to("cpu", shapes[name].dtype).contiguous()
            file.seek(begin + starts.pop(name))
            file.write(content.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
        if starts:
            raise ValueError(f"{path} lacks {min(starts)}")
