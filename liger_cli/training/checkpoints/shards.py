"""Named tensors of all processes in one directory, by torch.distributed.checkpoint.

Each process writes the part that it has into a separate file, and any number of processes read
them again. Nothing but tensors is in these files, and reading them runs no code: pickles that torch
would load as they are pass an unpickler that knows the classes of tensor metadata alone.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from liger_cli.errors import DataError

__all__ = ["SHARDS", "ShardReader", "file_pattern", "has_shards", "write_tensors"]

# The directory of them in a checkpoint.
SHARDS = "dcp"
_INDEX = ".metadata"

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
}


def has_shards(checkpoint: Path) -> bool:
    """Return whether a checkpoint was written by the processes of a sharded model."""
    return (checkpoint / SHARDS / _INDEX).is_file()


def file_pattern(rank: int) -> str:
    """Return the glob pattern of the files that a process writes, from the checkpoint on."""
    return f"{SHARDS}/__{rank}_*"


def write_tensors(
    directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Write tensors, of a DTensor the local part. Every process calls it with the same names.

    Args:
        directory: Of the files.
        tensors: By name.
        group: The process group of the messages; the default one where it is None.

    Raises:
        RuntimeError: A process could not write its file; raised on all.
    """
    writer = FileSystemWriter(directory, single_file_per_rank=True, sync_files=True)
    try:
        with warnings.catch_warnings():
            # Of one process without a group.
            warnings.simplefilter("ignore")
            no_dist = not dist.is_initialized()
            save(dict(tensors), storage_writer=writer, process_group=group, no_dist=no_dist)
    except CheckpointException as error:
        raise RuntimeError(_first_failure(error)) from error


def _first_failure(error: CheckpointException) -> Any:
    rank, (failure, _) = min(error.failures.items())
    return failure if isinstance(failure, DataError) else f"process {rank}: {failure}"


class _MetadataUnpickler(pickle.Unpickler):
    """Load the classes that describe tensors, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) == ("torch", "Size") or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")


class ShardReader(FileSystemReader):
    """Read tensors that write_tensors has written, on any number of processes.

    Args:
        directory: Of the files.

    Raises:
        DataError: It cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._directory = directory
        self.entries: dict[str, TensorStorageMetadata] = {}
        for name, entry in self._index.state_dict_metadata.items():
            # The unpickler has seen to it that there is no other.
            assert isinstance(entry, TensorStorageMetadata)
            self.entries[name] = entry

    @functools.cached_property
    def _index(self) -> Metadata:
        path = self._directory / _INDEX
        try:
            with path.open("rb") as file:
                index = _MetadataUnpickler(file).load()
            entries, files = index.state_dict_metadata, index.storage_data
            if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
                raise ValueError("it describes more than tensors")
            names = {info.relative_path for info in files.values()}
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"it names {outside[0]}, which is outside of its directory")
        # An unpickler raises whatever the classes raise.
        except Exception as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        return index

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        return self._index

    def read(self, tensors: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Read values into tensors, which keep their dtype, device and layout over processes.

        Args:
            tensors: By name; a DTensor gets the part that it has here.
            alone: Whether this process reads by itself; else all of them call it, with the same
                names.

        Raises:
            DataError: A tensor is missing, has another shape, or its file cannot be read; raised on
                all processes.
        """
        if missing := sorted(set(tensors) - set(self.entries)):
            raise DataError(f"{self._directory} holds no {missing[0]}")
        no_dist = alone or not dist.is_initialized()
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                load(dict(tensors), storage_reader=self, no_dist=no_dist)
        except CheckpointException as error:
            failure = _first_failure(error)
            if isinstance(failure, DataError):
                raise failure from error
            raise DataError(f"{self._directory} cannot be read: {failure}") from error

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Read file by file, so that an error names the one that it comes from."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            name = self.storage_data[item.storage_index].relative_path
            by_file.setdefault(name, []).append(item)
        for name, items in by_file.items():
            try:
                super().read_data(dataclasses.replace(plan, items=items), planner)
            except torch.OutOfMemoryError:
                raise
            # A damaged file fails in the ways of an archive and of an unpickler.
            except Exception as error:
                path = self._directory / name
                what = "it is missing" if isinstance(error, FileNotFoundError) else error
                raise DataError(f"{path} cannot be read: {what}") from error
        return super().read_data(dataclasses.replace(plan, items=[]), planner)
