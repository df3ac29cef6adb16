"""Checkpoints of a sharded model: each process writes its part, and any number reads it.

What plain transformers, peft and vLLM load is put together from these parts on the host, tensor by
tensor, without a process group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from liger_cli.errors import DataError
from liger_cli.training.checkpoints.sharded_state import (
    Shards,
    model_entry,
    read_shards,
    saved_tensors,
    shards_of,
    with_values,
    write_shards,
)
from liger_cli.training.checkpoints.shards import SHARDS, ShardReader
from liger_cli.training.checkpoints.state import Stage, WriteModel
from liger_cli.training.checkpoints.tensor_files import Shape, write_safetensors
from liger_cli.training.model.adapter_files import stage_adapter
from liger_cli.training.model.adapters import is_adapted
from liger_cli.training.model.source import build_meta_model, resolve_model

__all__ = [
    "Consolidated",
    "consolidate",
    "read_shards",
    "stage_sharded",
]

_MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Consolidated:
    """Safetensors files of a model.

    Attributes:
        files: Those that this process wrote.
        dtype: Of most parameters.
    """

    files: tuple[str, ...]
    dtype: str
    num_parameters: int


@dataclass(frozen=True)
class _Group:
    """Tensors that are read together, and the tensors of the files that are made of them.

    Attributes:
        sources: Names in the model, with the names of their entries.
        shapes: Of the tensors in the files, by name.
    """

    sources: Mapping[str, str]
    shapes: Mapping[str, Shape]

    @property
    def num_bytes(self) -> int:
        return sum(shape.num_bytes for shape in self.shapes.values())


def stage_sharded(model: Any, optimizer: Any, stage: Stage, *, is_main: bool) -> WriteModel:
    """Return the function that writes model and optimizer of all processes.

    Of an adapted model it writes the adapter whole as well.

    Args:
        model: Sharded, without a wrapper. All processes call this.
        optimizer: Of its parameters.
        stage: Returns what is written of tensors, in nested lists and dictionaries.
        is_main: Whether this process writes what is there once.

    Returns:
        A function that all processes call with the directory of the checkpoint and the process
        group of its messages. It raises a RuntimeError on all of them where one could not write its
        file, and an OSError where this process could not.
    """
    found = shards_of(model, optimizer)
    shards = Shards(stage(found.tensors), stage(found.rest))
    # In the dtype of its shards: gathered ones may have another.
    dtype = model.dtype
    write_adapter = _staged_adapter(model, is_main=is_main) if is_adapted(model) else None

    def write(directory: Path, group: dist.ProcessGroup | None) -> None:
        write_shards(directory, shards, group)
        if not is_main:
            return
        if write_adapter is None:
            _save_configuration(model, dtype, directory)
        else:
            write_adapter(directory)

    return write


def _staged_adapter(model: Any, *, is_main: bool) -> Callable[[Path], None]:
    """Return the function that writes the adapter on the main process; all processes call this."""
    saved = saved_tensors(model)
    whole = _gather(saved, is_main=is_main)
    if not is_main:
        return lambda directory: None
    return stage_adapter(model, with_values(model, saved, whole))


def _gather(tensors: Mapping[str, Tensor], *, is_main: bool) -> dict[str, Tensor]:
    """Return whole tensors on the host of the main process, and nothing on the others."""
    found = {}
    for name, value in tensors.items():
        whole = value.detach()
        whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
        if is_main:
            # Tensors that no process shares are trained on meanwhile.
            found[name] = whole.to("cpu", copy=True)
    return found


def _save_configuration(model: Any, dtype: torch.dtype, directory: Path) -> None:
    """Write what save_pretrained writes beside the weights."""
    config = model.config
    config.dtype = str(dtype).removeprefix("torch.")
    # FSDP gives the class of the model another name.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def consolidate(
    checkpoint: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    part: tuple[int, int] = (0, 1),
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> Consolidated:
    """Write the model of a sharded checkpoint as the safetensors that transformers loads.

    One group of tensors that are converted together is in memory at a time: as a rule one tensor.

    Args:
        checkpoint: Its config.json and dcp/ are read.
        out: A directory that is there.
        dtype: Of the parameters; that of the checkpoint by default.
        part: (i, n) writes every n-th file from i on, for n processes at once.
        max_file_bytes: Where another file begins.

    Raises:
        DataError: A file of the checkpoint cannot be read, or lacks a part of the model.
        OSError: A file cannot be written.
    """
    reader = ShardReader(checkpoint / SHARDS)
    model: Any = build_meta_model(resolve_model(str(checkpoint.absolute())))
    groups = _groups(model, reader, dtype)
    files = list(_filled(groups, max_file_bytes))
    written = []
    for number, members in list(enumerate(files))[part[0] :: part[1]]:
        name = _file_name(number, len(files))
        shapes = {key: shape for group in members for key, shape in group.shapes.items()}
        write_safetensors(out / name, shapes, _read(model, reader, members))
        written.append(name)
    if len(files) > 1 and part[0] == 0:
        written.append(_write_index(out, files))
    sizes: dict[torch.dtype, int] = {}
    for shape in (shape for group in groups for shape in group.shapes.values()):
        sizes[shape.dtype] = sizes.get(shape.dtype, 0) + shape.num_bytes
    most = str(max(sizes, key=lambda kind: sizes[kind])).removeprefix("torch.")
    return Consolidated(tuple(written), most, model.num_parameters())


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_index(out: Path, files: list[list[_Group]]) -> str:
    places = {
        key: _file_name(number, len(files))
        for number, members in enumerate(files)
        for group in members
        for key in group.shapes
    }
    size = sum(group.num_bytes for members in files for group in members)
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    name = "model.safetensors.index.json"
    (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return name


def _filled(groups: Iterable[_Group], max_bytes: int) -> Iterator[list[_Group]]:
    """Yield the groups of one file after the other."""
    members: list[_Group] = []
    size = 0
    for group in groups:
        if members and size + group.num_bytes > max_bytes:
            yield members
            members, size = [], 0
        members.append(group)
        size += group.num_bytes
    if members:
        yield members


def _read(
    model: Any, reader: ShardReader, members: Iterable[_Group]
) -> Iterator[tuple[str, Tensor]]:
    for group in members:
        places = {
            entry: torch.empty(found.size, dtype=found.properties.dtype)
            for entry, found in ((entry, reader.entries[entry]) for entry in group.sources.values())
        }
        reader.read(places, alone=True)
        values = {name: places.pop(entry) for name, entry in group.sources.items()}
        yield from _converted(model, values).items()


def _groups(model: Any, reader: ShardReader, dtype: torch.dtype | None) -> list[_Group]:
    """Return the tensors of the files, each with what it is made of.

    They are as small as a group can be: a tensor, or a layer, or the whole model where a file has a
    tensor that is made of several layers.
    """
    entries = _entries(model, reader)
    meta = {
        name: torch.empty(
            reader.entries[entry].size, dtype=reader.entries[entry].properties.dtype, device="meta"
        )
        for name, entry in entries.items()
    }
    wanted = _shapes(_converted(model, dict(meta)), dtype)
    for key in (str, _layer_of, lambda _: ""):
        parts: dict[str, list[str]] = {}
        for name in meta:
            parts.setdefault(key(name), []).append(name)
        groups = [
            _Group(
                {name: entries[name] for name in names},
                _shapes(_converted(model, {name: meta[name] for name in names}), dtype),
            )
            for names in parts.values()
        ]
        if {name: shape for group in groups for name, shape in group.shapes.items()} == wanted:
            break
    return groups


def _layer_of(name: str) -> str:
    """Return the name up to the number of the layer."""
    return (re.match(r".*?\.\d+\.", name) or [name])[0]


def _shapes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Shape]:
    return {
        name: Shape(
            tuple(value.shape),
            dtype if dtype is not None and value.is_floating_point() else value.dtype,
        )
        for name, value in tensors.items()
    }


def _entries(model: Any, reader: ShardReader) -> dict[str, str]:
    """Return the entry of each parameter and buffer that files of the model have.

    Raises:
        DataError: One is missing.
    """
    state = model.state_dict(keep_vars=True)
    aliases: dict[int, list[str]] = {}
    for name, value in state.items():
        aliases.setdefault(id(value), []).append(name)
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    # Those that from_pretrained ties again; patterns in some releases.
    tied = getattr(model, "all_tied_weights_keys", None) or model._tied_weights_keys or ()
    found = {}
    for names in aliases.values():
        present = [name for name in names if model_entry(name) in reader.entries]
        if not present:
            raise DataError(f"{reader.path} holds no {names[0]}")
        kept = [name for name in names if not any(re.search(each, name) for each in tied)]
        name = (kept or names)[0]
        if name not in ignored:
            found[name] = model_entry(present[0])
    return found


def _converted(model: Any, tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors under the names and in the shapes that files of the model have."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        # Before transformers 5 they are those in memory.
        return tensors
    converted: Mapping[str, Tensor] = revert_weight_conversion(model, tensors)
    return converted
