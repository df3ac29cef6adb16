"""Model and optimizer of all processes, in tensors that have the names of parameters.

model.NAME is a parameter or buffer, optimizer.state.NAME.KEY a tensor that the optimizer has for
it; `master` is the float32 copy of one in half precision. So whatever number of processes wrote
them, one process or any other number reads them. What of the optimizer is no tensor is beside them
in optimizer.pt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, empty

from liger_cli.errors import DataError
from liger_cli.training.checkpoints.shards import SHARDS, ShardReader, write_tensors
from liger_cli.training.optim.composite_optimizers import state_tree

__all__ = [
    "Shards",
    "is_sharded",
    "missing_names",
    "model_dtype",
    "model_entry",
    "place_optimizer_state",
    "read_named",
    "read_optimizer",
    "read_shards",
    "saved_tensors",
    "shards_of",
    "with_values",
    "write_shards",
]

_REST = "optimizer.pt"
_MASTER = "master"
_MODEL, _STATE = "model.", "optimizer.state."


def model_entry(name: str) -> str:
    """Return the name under which a parameter or buffer of the model is kept."""
    return _MODEL + name


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes have parts of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a checkpoint keeps; of an adapted model the trained.

    One with several names has the first.
    """
    # Brings parameters that FSDP has gathered back to their parts, which named_parameters does not.
    state = model.state_dict(keep_vars=True)
    if hasattr(model, "peft_config"):
        state = {
            name: value for name, value in state.items() if getattr(value, "requires_grad", False)
        }
    names: dict[int, str] = {}
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and names.setdefault(id(value), name) == name
    }


def with_values(
    model: nn.Module, saved: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the state_dict of a model with other values for the tensors that are saved.

    Args:
        saved: As saved_tensors returns them; one that is tied has each of its names in the result.
        values: By the names of `saved`.
    """
    found = {id(value): values[name] for name, value in saved.items()}
    state = model.state_dict(keep_vars=True)
    return {name: found.get(id(value), value) for name, value in state.items()}


class Shards(NamedTuple):
    """The state of a model and its optimizer: tensors by entry, and what of it is no tensor."""

    tensors: dict[str, Tensor]
    rest: list[dict[str, Any]] | None


def shards_of(model: nn.Module, optimizer: Any = None) -> Shards:
    """Return this process's part of a model, and of its optimizer where one is given."""
    saved = saved_tensors(model)
    tensors = {_MODEL + name: value.detach() for name, value in saved.items()}
    if optimizer is None:
        return Shards(tensors, None)
    found, rest = _split_state(optimizer, _names_of(saved, optimizer))
    return Shards(tensors | found, rest)


def write_shards(directory: Path, shards: Shards, group: dist.ProcessGroup | None = None) -> None:
    """Write model and optimizer into directory/dcp, each process its part. All processes call it.

    Args:
        directory: Of the checkpoint.
        shards: Of this process.
        group: The process group of the messages; the default one where it is None.

    Raises:
        RuntimeError: A process could not write its file; raised on all.
        OSError: The first process could not write optimizer.pt; raised there alone.
    """
    write_tensors(directory / SHARDS, shards.tensors, group)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if shards.rest is not None and is_first:
        torch.save(shards.rest, directory / SHARDS / _REST)


def _inner(optimizer: Any) -> Any:
    # accelerate's wrapper has it.
    return getattr(optimizer, "optimizer", optimizer)


def _names_of(saved: Mapping[str, Tensor], optimizer: Any) -> dict[int, str]:
    """Return the name of each parameter, and of each float32 copy that of its parameter, by id."""
    names = {id(value): name for name, value in saved.items()}

    def name_copy(parameter: nn.Parameter, copy: nn.Parameter) -> None:
        names[id(copy)] = names[id(parameter)]

    state_tree(_inner(optimizer), lambda _: {}, name_copy)
    return names


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters in the order of their numbers in state_dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _split_state(
    optimizer: Any, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors of an optimizer's state, and the rest of it for each plain optimizer."""
    tensors: dict[str, Tensor] = {}
    rest: list[dict[str, Any]] = []

    def add_plain(part: torch.optim.Optimizer) -> dict[str, Any]:
        state = part.state_dict()
        order = [names[id(parameter)] for parameter in _parameters_of(part)]
        values: dict[str, dict[str, Any]] = {}
        copied = []
        for number, entries in state["state"].items():
            for key, value in entries.items():
                name = f"{_STATE}{order[number]}.{key}"
                if isinstance(value, Tensor):
                    tensors[name] = value
                    copied += [name] if _is_copied(value) else []
                else:
                    values.setdefault(order[number], {})[key] = value
        groups = [
            {**group, "params": [order[number] for number in group["params"]]}
            for group in state["param_groups"]
        ]
        rest.append({"param_groups": groups, "values": values, "copied": copied})
        return {}

    def add_master(parameter: nn.Parameter, copy: nn.Parameter) -> None:
        tensors[f"{_STATE}{names[id(parameter)]}.{_MASTER}"] = copy.detach()

    state_tree(_inner(optimizer), add_plain, add_master)
    return tensors, rest


def _is_copied(value: Tensor) -> bool:
    """Return whether every process has the whole of a tensor that might be spread out."""
    return isinstance(value, DTensor) and all(p.is_replicate() for p in value.placements)


def read_shards(directory: Path, model: nn.Module, optimizer: Any = None) -> None:
    """Read model and optimizer from directory/dcp, on any number of processes. All call it.

    Raises:
        DataError: A file or a tensor is missing, damaged or of another shape.
    """
    reader = ShardReader(directory / SHARDS)
    reader.read(_kept(reader, model.state_dict(keep_vars=True)))
    if optimizer is not None:
        read_optimizer(directory, model, optimizer)


def read_named(directory: Path, places: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Read parameters and buffers of a model from directory/dcp into tensors of these names.

    Args:
        places: Others than those that are kept are left as they are.
        alone: Whether this process reads by itself; else all of them call it.

    Raises:
        DataError: As read_shards.
    """
    reader = ShardReader(directory / SHARDS)
    reader.read(_kept(reader, places), alone=alone)


def missing_names(directory: Path, model: nn.Module) -> list[str]:
    """Return the parameters and buffers of a model that directory/dcp does not have.

    Args:
        model: It may be without weights.

    Raises:
        DataError: It cannot be read.
    """
    state = model.state_dict(keep_vars=True)
    found = _kept(ShardReader(directory / SHARDS), state)
    ids = {id(value) for value in found.values()}
    return [name for name, value in state.items() if id(value) not in ids]


def model_dtype(directory: Path) -> torch.dtype:
    """Return the floating dtype that most of the model's values in directory/dcp have.

    Raises:
        DataError: It cannot be read.
    """
    sizes = {torch.float32: 0}
    for name, entry in ShardReader(directory / SHARDS).entries.items():
        dtype = entry.properties.dtype
        if name.startswith(_MODEL) and dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(entry.size)
    return max(sizes, key=lambda dtype: sizes[dtype])


def _kept(reader: ShardReader, places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that are kept, by entry: one that is tied has several names."""
    names = (name.removeprefix(_MODEL) for name in reader.entries if name.startswith(_MODEL))
    return {_MODEL + name: places[name] for name in names if name in places}


def read_optimizer(directory: Path, model: nn.Module, optimizer: Any) -> None:
    """Read the optimizer from directory/dcp, on any number of processes. All call it.

    Raises:
        DataError: As read_shards, or optimizer.pt cannot be read.
    """
    saved = _SavedOptimizer(directory / SHARDS, _names_of(saved_tensors(model), optimizer))
    state = state_tree(_inner(optimizer), saved.of_plain, saved.of_master)
    saved.reader.read(saved.places)
    optimizer.load_state_dict(state)


class _SavedOptimizer:
    """The state of an optimizer in a directory, as its plain parts take it.

    Args:
        directory: Of the shards.
        names: Of parameters and their float32 copies, by id.

    Attributes:
        places: Tensors that were given out, without values yet, by entry.
    """

    def __init__(self, directory: Path, names: Mapping[int, str]) -> None:
        self.reader = ShardReader(directory)
        self.places: dict[str, Tensor] = {}
        self._names = names
        path = directory / _REST
        try:
            self._parts = iter(torch.load(path, weights_only=True))
        # The file is missing or damaged, in the ways of an archive and of an unpickler.
        except Exception as error:
            raise DataError(f"{path} cannot be read: {error}") from error
        self._keys: dict[str, list[str]] = {}
        for entry in self.reader.entries:
            if entry.startswith(_STATE):
                name, _, key = entry.removeprefix(_STATE).rpartition(".")
                self._keys.setdefault(name, []).append(key)

    def of_plain(self, part: torch.optim.Optimizer) -> dict[str, Any]:
        """Return the state of the next plain optimizer."""
        saved, order = next(self._parts), _parameters_of(part)
        numbers = {self._names[id(parameter)]: number for number, parameter in enumerate(order)}
        groups = saved["param_groups"]
        if [name for group in groups for name in group["params"]] != list(numbers):
            raise DataError(f"{self.reader.path} holds the optimizer of other parameters")
        copied = set(saved["copied"])
        state: dict[int, dict[str, Any]] = {}
        for name, number in numbers.items():
            found = saved["values"].get(name, {})
            for key in self._keys.get(name, ()):
                entry = f"{_STATE}{name}.{key}"
                if key != _MASTER:
                    found[key] = self._place(entry, order[number], is_copied=entry in copied)
            if found:
                state[number] = found
        packed = [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in groups
        ]
        return {"state": state, "param_groups": packed}

    def of_master(self, parameter: nn.Parameter, copy: nn.Parameter) -> Tensor:
        """Return the float32 copy of a parameter."""
        return self._place(f"{_STATE}{self._names[id(parameter)]}.{_MASTER}", copy)

    def _place(self, entry: str, parameter: Tensor, *, is_copied: bool = False) -> Tensor:
        if entry not in self.reader.entries:
            raise DataError(f"{self.reader.path} holds no {entry}")
        found = self.reader.entries[entry]
        shape, dtype = found.size, found.properties.dtype
        if not shape:
            # Counts of steps, which optimizers want on the host or move themselves.
            place = torch.empty((), dtype=dtype)
        elif not isinstance(parameter, DTensor):
            place = torch.empty(shape, dtype=dtype, device=parameter.device)
        else:
            mesh = parameter.device_mesh
            placements = _placements(parameter, shape, is_copied=is_copied)
            place = empty(shape, dtype=dtype, device_mesh=mesh, placements=placements)
        self.places[entry] = place
        return place


def _placements(parameter: DTensor, shape: torch.Size, *, is_copied: bool = False) -> list[Any]:
    """Return how an optimizer's tensor of a shape is spread out: by the dimensions it shares.

    Args:
        is_copied: Whether every process had the whole.
    """
    return [
        placement
        if isinstance(placement, Shard)
        and not (is_copied and shape != parameter.shape)
        and placement.dim < len(shape)
        and shape[placement.dim] == parameter.shape[placement.dim]
        else Replicate()
        for placement in parameter.placements
    ]


def place_optimizer_state(optimizer: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of whole tensors with each spread out as its parameter is.

    Args:
        optimizer: That is to load it.
        state: What state_dict gave on one process, with every tensor on the host.
    """
    optimizer = _inner(optimizer)
    if "parts" in state:
        parts = zip(optimizer.parts, state["parts"], strict=True)
        return {"parts": [place_optimizer_state(part, saved) for part, saved in parts]}
    if "masters" in state:
        pairs = zip(optimizer.masters, state["masters"], strict=True)
        inner = place_optimizer_state(optimizer.inner, state["inner"])
        return {"inner": inner, "masters": [_spread(copy, value) for (_, copy), value in pairs]}
    order = _parameters_of(optimizer)
    entries = {
        number: {key: _spread(order[number], value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": entries}


def _spread(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or not value.ndim:
        return value
    # Every process has the whole: none sends.
    return distribute_tensor(
        value.to(parameter.device),
        parameter.device_mesh,
        _placements(parameter, value.shape),
        src_data_rank=None,
    )
