"""Weight files as named tensors that are read one at a time, so that no file is ever whole in memory.

Formats: safetensors, and what `torch.save` writes (`.pt`, `.pth`, `.bin`), in one file or in shards with an index. No
pickle is ever executed: torch's restricted unpickler reads tensors and plain containers and refuses all else.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from cobra.errors import CheckpointError

_INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_ZIP = b"PK\x03\x04"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_RELEASE_AFTER = 2**30  # bytes read from one mapping of a file before its pages are given back, at some 50 ms each
_MAX_DEPTH = 32  # of containers in a .pt; training files have at most six or so
_MAX_CONTAINERS = 2**20
_NODES = (Tensor, Mapping, list, tuple)


class Weights(Mapping[str, Tensor]):
    """Named tensors of one or several files; reading a name gives a tensor that may still be the file's own memory.

    Attributes:
        origin: the file, or the index of several.
        shapes: of every tensor, known without reading it.
        dtypes: likewise.
    """

    def __init__(
        self,
        origin: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, torch.dtype],
        read: Callable[[str], Tensor],
        prefix: str = "",
    ) -> None:
        self.origin = origin
        self.shapes = dict(shapes)
        self.dtypes = dict(dtypes)
        self._read = read
        self._prefix = prefix
        self._sources: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], origin: str, prefix: str = "") -> Weights:
        """Wrap tensors that are in memory already; in the file, their names begin with `prefix`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(origin, shapes, {name: t.dtype for name, t in tensors.items()}, tensors.__getitem__, prefix)

    def source(self, name: str) -> str:
        """Return what the file calls a tensor, or would call one that it lacks."""
        return self._sources.get(name, self._prefix + name)

    def renamed(self, rename: Callable[[str], str | None], prefix: str = "") -> Weights:
        """Return the same tensors under other names; those for which `rename` gives None are left out.

        Args:
            rename: from a name to the new one.
            prefix: what it takes off the names: `source` puts it before those that the file lacks.

        Raises:
            CheckpointError: two tensors would have the same name.
        """
        old_names: dict[str, str] = {}
        for old in self.shapes:
            new = rename(old)
            if new is not None and old_names.setdefault(new, old) != old:
                both = f"{self.source(old_names[new])} and {self.source(old)}"
                raise CheckpointError(f"{self.origin} has both {both}, which mean the same tensor; remove one of them.")
        view = copy(self)
        view.shapes = {new: self.shapes[old] for new, old in old_names.items()}
        view.dtypes = {new: self.dtypes[old] for new, old in old_names.items()}
        view._sources = {new: self.source(old) for new, old in old_names.items()}
        view._prefix = self._prefix + prefix
        view._read = lambda name: self._read(old_names[name])
        return view

    def below(self, prefix: str) -> Weights:
        """Return the tensors whose names begin with `prefix`, without it."""
        return self.renamed(lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None, prefix)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever a library raises inside, over a file that is no such file or damaged, into a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except Exception as error:  # a damaged file makes torch raise almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read ({reason}); it may be cut short. Fetch or write it again."
        ) from None


def read_weights(path: Path) -> Weights:
    """Read a weight file, or the weights in a folder (one file, or shards with an index).

    Raises:
        CheckpointError: there are none, or a file is damaged, or could run code if it were unpickled.
    """
    if path.is_dir():
        return _read_folder(path)
    if not _is_file(path):
        raise CheckpointError(f"{path} is missing.")
    if _starts_with(path, _LFS_POINTER):  # a clone without Git LFS leaves it in the place of a large file
        raise CheckpointError(
            f"{path} holds no weights but a pointer of Git LFS; fetch the file itself with `git lfs pull`."
        )
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
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Fetch or write it again.") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read; fetch or write it again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for any file
        return False


def _starts_with(path: Path, start: bytes) -> bool:
    with reading(path), path.open("rb") as file:
        return file.read(len(start)) == start


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
    missing = [name for name in names if not _is_file(index.parent / name)]
    if missing:
        raise CheckpointError(f"{index} names {len(missing)} files that are missing: {', '.join(missing)}. Fetch them.")
    shards = {name: read_weights(index.parent / name) for name in names}
    absent = [f"{tensor} ({shard})" for tensor, shard in mapped.items() if tensor not in shards[shard]]
    if absent:
        raise CheckpointError(
            f"{index} names tensors that are not in their shards: {', '.join(absent)}. Fetch the index and these files "
            "again."
        )
    extra = [f"{tensor} ({name})" for name, shard in shards.items() for tensor in shard if mapped.get(tensor) != name]
    if extra:
        raise CheckpointError(
            f"{index} does not name tensors that its shards hold: {', '.join(extra)}. Fetch the index again, or write "
            "the shards without them."
        )
    shapes = {tensor: shards[shard].shapes[tensor] for tensor, shard in mapped.items()}
    dtypes = {tensor: shards[shard].dtypes[tensor] for tensor, shard in mapped.items()}
    return Weights(str(index), shapes, dtypes, lambda name: shards[mapped[name]][name])


def _read_safetensors(path: Path) -> Weights:
    def read(name: str) -> Tensor:
        # Opened for each tensor: the pages of the ones before it are given back.
        with reading(path), safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    with reading(path), safe_open(path, framework="pt") as file:  # a tensor is mapped, its values are not read
        mapped = Weights.of({name: file.get_tensor(name) for name in file.keys()}, str(path))  # noqa: SIM118
    return Weights(str(path), mapped.shapes, mapped.dtypes, read)


def _read_torch(path: Path) -> Weights:
    file = _TorchFile(path)
    mapped = Weights.of(file.tensors(), str(path))
    return Weights(str(path), mapped.shapes, mapped.dtypes, file.read)


class _TorchFile:
    """What `torch.save` wrote, mapped into memory; nested containers of tensors are flattened, with dots."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._can_map = _starts_with(path, _ZIP)  # files of before PyTorch 1.6 are read whole
        self._loaded: dict[str, Tensor] | None = None
        self._num_bytes = 0

    def tensors(self) -> dict[str, Tensor]:
        if self._loaded is None:
            self._loaded, self._num_bytes = _flatten(self._load(), self.path), 0
        return self._loaded

    def read(self, name: str) -> Tensor:
        if self._can_map and self._num_bytes > _RELEASE_AFTER:
            self._loaded = None
        tensor = self.tensors()[name]
        self._num_bytes += tensor.nbytes
        return tensor

    def _load(self) -> Any:
        with reading(self.path):
            try:
                return torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._can_map or None)
            except pickle.UnpicklingError as error:
                if "Weights only load failed" not in str(error):
                    raise
                raise CheckpointError(
                    f"{self.path} cannot be read as weights: it is damaged, or holds more than tensors, which may be "
                    "code and is never executed here. Save its state_dict alone, best as safetensors."
                ) from None


def _flatten(root: object, path: Path) -> dict[str, Tensor]:
    """Return all tensors in nested containers, in their order.

    Raises:
        CheckpointError: two have the same dotted name, one has no plain values, or the nesting has no end.
    """
    flat: dict[str, Tensor] = {}
    waiting: list[tuple[tuple[str, ...], object]] = [((), root)] if isinstance(root, _NODES) else []
    num_containers = 0
    while waiting:
        keys, node = waiting.pop()
        if isinstance(node, Tensor):
            name = ".".join(keys)
            if name in flat:
                raise CheckpointError(f"{path} holds two tensors of the name {name}; save a plain state_dict.")
            flat[name] = _plain(node, name, path)
            continue
        num_containers += 1
        if len(keys) > _MAX_DEPTH or num_containers > _MAX_CONTAINERS:
            start = ".".join(keys[:4])
            raise CheckpointError(f"{path} nests its containers without end, below {start}; save the state_dict alone.")
        items = node.items() if isinstance(node, Mapping) else enumerate(node)  # type: ignore[arg-type]
        inside = [((*keys, str(key)), item) for key, item in items if isinstance(item, _NODES)]
        waiting += reversed(inside)
    return flat


def _plain(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Return the tensor if it has one stored number for each of its places, else raise CheckpointError."""
    kind = str(tensor.layout).removeprefix("torch.") if tensor.layout != torch.strided else ""
    kind = kind or ("quantized" if tensor.is_quantized else "nested" if tensor.is_nested else "")
    kind = kind or ("without values (meta)" if tensor.is_meta else "")
    if kind:
        raise CheckpointError(f"{path}: {name} is {kind}, not a dense tensor; save it as one (`to_dense()` and such).")
    return tensor
