"""Reading checkpoints of torch.distributed.checkpoint, which hold a model in parts, without executing their pickles."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from cobra.errors import CheckpointError

# What reading and writing may raise; torch's own wraps what went wrong on a rank, and is no `Exception`.
FAILURES = (Exception, CheckpointException)

PREFIX = "model."  # of the parameters' names; beside them a checkpoint holds the optimizer and random states


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a training checkpoint."""
    return (folder / ".metadata").is_file()


def read_sharded(checkpoint: Path) -> dict[str, Tensor]:
    """Read a checkpoint's parameters whole, by name, on the CPU; the optimizer's state is not touched.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        reader = SafeReader(checkpoint)
        found = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
            for key, entry in found.items()
            if key.startswith(PREFIX)
        }
        read_into(state, reader, is_alone=True)
    except FAILURES as error:
        raise CheckpointError(
            f"The checkpoint {checkpoint} is damaged: {reason(error)}. Use an older one of the same run."
        ) from None
    return {key.removeprefix(PREFIX): tensor for key, tensor in state.items()}


def read_into(state: dict[str, Tensor], reader: SafeReader, *, is_alone: bool) -> None:
    """Fill the tensors of `state`; each rank reads its own parts."""
    expect_to_be_alone()
    # until some version after torch 2.10: each rank has random states of its own
    warnings.filterwarnings("ignore", message="Detected mismatched keys in state dict after all gather")
    load(state, storage_reader=reader, no_dist=is_alone)


def expect_to_be_alone() -> None:
    """Hide the warning that a single process is one; a filter for one call would not reach the thread that writes."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class SafeReader(FileSystemReader):
    """Reads a checkpoint without executing what a pickle may hold: its index may name nothing but what torch writes."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        others = [
            key for key, entry in metadata.state_dict_metadata.items() if type(entry) is not TensorStorageMetadata
        ]
        if others:  # torch would unpickle their bytes as they are
            raise pickle.UnpicklingError(
                f"its index says that {others[0]} is no tensor; a checkpoint holds nothing else"
            )
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    _METADATA = (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
    _NAMES = (  # whole names: pickle would follow the dots of "checkpoint.filesystem" "os.system"
        *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath"),
    )

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its index asks for {module}.{name}, which no checkpoint of ours holds")


def reason(error: BaseException) -> str:
    """The first line that says something: torch wraps the errors of ranks in its own."""
    failures = getattr(error, "failures", None)
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"rank {rank}: {reason(failure[0])}"
    return f"{type(error).__name__}: {error}".splitlines()[0]
