"""Weight files as named tensors that are read one at a time, so that no file is ever whole in memory.

Formats: safetensors, and what `torch.save` writes (`.pt`, `.pth`, `.bin`), in one file or in shards with an index. No
pickle is ever executed: torch's restricted unpickler reads tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cobra.errors import CheckpointError

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_RELEASE_AFTER = 2**28  # bytes read from one mapping of a file before its pages are given back


class Weights(Mapping[str, Tensor]):
    """Named tensors of one or several files; reading a name gives a tensor that may still be the file's own memory."""

    def __init__(self, origin: str, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]) -> None:
        self.origin = origin
        self.shapes = dict(shapes)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], origin: str) -> Weights:
        """Wrap tensors that are in memory already."""
        return cls(origin, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """Return the same tensors under other names; those for which `rename` gives None are left out.

        Raises:
            CheckpointError: two tensors would have the same name.
        """
        old_names: dict[str, str] = {}
        for old in self.shapes:
            new = rename(old)
            if new is not None and old_names.setdefault(new, old) != old:
                raise CheckpointError(f"{self.origin} has both {old_names[new]} and {old}, which mean the same tensor.")
        shapes = {new: self.shapes[old] for new, old in old_names.items()}
        return Weights(self.origin, shapes, lambda name: self._read(old_names[name]))

    def below(self, prefix: str) -> Weights:
        """Return the tensors whose names begin with `prefix`, without it."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


def read_weights(path: Path) -> Weights:
    """Read a weight file, or the weights in a folder (one file, or shards with an index).

    Raises:
        CheckpointError: there are none, or a file is damaged, or could run code if it were unpickled.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: it is missing or not such a file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _read_folder(folder: Path) -> Weights:
    for name in _INDEX_FILES:
        if (folder / name).is_file():
            return _read_shards(folder / name)
    for name in _SINGLE_FILES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    if len(files) == 1:
        return read_weights(files[0])
    found = f"it holds {len(files)}: {', '.join(path.name for path in files[:4])}" if files else "it holds none"
    raise CheckpointError(
        f"{folder} has no weights that can be told: neither {' nor '.join(_SINGLE_FILES[:2])}, nor an index of "
        f"shards, nor a single file ({found}). Name the file itself."
    )


def _read_shards(index: Path) -> Weights:
    """Read shards by their index; shards may only lie beside it."""
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files.")
    names = sorted(set(mapped.values()))
    outside = [name for name in names if Path(name).name != name or name in ("", ".", "..")]
    if outside:
        raise CheckpointError(f"{index} points outside its folder, to {outside[0]!r}; shards must lie beside it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names {len(missing)} files that are missing: {', '.join(missing)}. Fetch them.")
    shards = {name: read_weights(index.parent / name) for name in names}
    absent = [f"{tensor} ({shard})" for tensor, shard in mapped.items() if tensor not in shards[shard]]
    if absent:
        raise CheckpointError(f"{index} names tensors that are not in their shards: {', '.join(absent[:8])}.")
    shapes = {tensor: shards[shard].shapes[tensor] for tensor, shard in mapped.items()}
    return Weights(str(index), shapes, lambda name: shards[mapped[name]][name])


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(_damaged(path, error)) from None

    def read(name: str) -> Tensor:
        # Opened for each tensor: the pages of the ones before it are given back.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return Weights(str(path), shapes, read)


def _read_torch(path: Path) -> Weights:
    file = _TorchFile(path)
    return Weights(str(path), {name: tuple(tensor.shape) for name, tensor in file.tensors().items()}, file.read)


class _TorchFile:
    """What `torch.save` wrote, mapped into memory; nested dicts of tensors are flattened, with dots."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._can_map = zipfile.is_zipfile(path)  # files of before PyTorch 1.6 are read whole
        self._loaded: dict[str, Tensor] | None = None
        self._num_bytes = 0

    def tensors(self) -> dict[str, Tensor]:
        if self._loaded is None:
            self._loaded, self._num_bytes = _flatten(self._load()), 0
        return self._loaded

    def read(self, name: str) -> Tensor:
        if self._can_map and self._num_bytes > _RELEASE_AFTER:
            self._loaded = None
        tensor = self.tensors()[name]
        self._num_bytes += tensor.nbytes
        return tensor

    def _load(self) -> Any:
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._can_map or None)
        except pickle.UnpicklingError as error:
            if "Weights only load failed" not in str(error):
                raise CheckpointError(_damaged(self.path, error)) from None
            raise CheckpointError(
                f"{self.path} cannot be read as weights: it is damaged, or holds more than tensors, which may be code "
                "and is never executed here. Save its state_dict alone, best as safetensors."
            ) from None
        except Exception as error:  # a damaged file makes torch raise almost anything
            raise CheckpointError(_damaged(self.path, error)) from None


def _flatten(node: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(node, Tensor):
        return {prefix: node}
    flat: dict[str, Tensor] = {}
    if isinstance(node, Mapping):
        for key, value in node.items():
            flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _damaged(path: Path, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{path} cannot be read ({reason}); it may be cut short. Fetch or write it again."
