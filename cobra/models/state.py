"""What a Mamba knows after reading a prefix: rows to select, repeat, join, move and keep in a file.

Shapes: B batch, E inner width, N state size, K convolution width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cobra.config import LLMConfig
from cobra.errors import CheckpointError, ShapeError
from cobra.runtime import write_atomically

FORMAT, VERSION = "cobra-mamba-state", "1"  # written into every file; a new layout of the file is a new version


def state_bytes(config: LLMConfig) -> int:
    """The state of one row in fp32, however long the prefix: layers x E x (N + K - 1) numbers."""
    return 4 * config.num_layers * config.d_inner * (config.d_state + config.d_conv - 1)


@dataclass(frozen=True)
class MambaState:
    """The state of every layer: constant size, whatever the prefix's length.

    Attributes:
        conv: per layer [B, K - 1, E]: the last inputs of the convolution, oldest first.
        ssm: per layer [B, E, N], float32 (float64 in a float64 model).

    Raises:
        ShapeError: there are no layers.
    """

    conv: list[Tensor]
    ssm: list[Tensor]

    def __post_init__(self) -> None:
        if not self.ssm:
            raise ShapeError("A state has no layers; give it conv and ssm tensors of at least one.")

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in (*self.conv, *self.ssm))
        return f"MambaState(rows={self.batch_size}, layers={len(self.ssm)}, {size / 1024:,.0f} KiB)"

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.ssm[0].shape[0]

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> MambaState:
        """Select, repeat or reorder rows: an int32 or int64 index tensor, a slice or a list of row numbers.

        Raises:
            ShapeError: an index of another dtype, such as a mask.
        """
        if isinstance(rows, slice):
            return MambaState([t[rows] for t in self.conv], [t[rows] for t in self.ssm])
        index = torch.as_tensor(rows, device=self.ssm[0].device)
        if index.numel() == 0 and not isinstance(rows, Tensor):
            index = index.long()  # an empty list says nothing of its dtype
        if index.dtype not in (torch.int32, torch.int64):
            kind = "mask" if index.dtype == torch.bool else "index"
            remedy = "mask.nonzero().squeeze(1)" if index.dtype == torch.bool else "int64 row numbers"
            raise ShapeError(f"A state's rows cannot be selected by a {index.dtype} {kind}; pass {remedy}.")
        # Not t[index]: its gradient adds up repeated rows in any order, and a run could not be repeated bit for bit.
        return MambaState([t.index_select(0, index) for t in self.conv], [t.index_select(0, index) for t in self.ssm])

    def expand(self, count: int) -> MambaState:
        """Repeat each row `count` times, the copies of a row side by side: rows 0, 1 become 0, 0, 1, 1.

        Raises:
            ShapeError: `count` is less than 1.
        """
        if count < 1:
            raise ShapeError(f"A state's rows cannot be repeated count={count} times; count must be at least 1.")
        return self[torch.arange(self.batch_size, device=self.ssm[0].device).repeat_interleave(count)]

    @staticmethod
    def concat(states: Sequence[MambaState]) -> MambaState:
        """Stack the rows of several states.

        Raises:
            ShapeError: there are none, or they differ in anything but their number of rows.
        """
        if not states:
            raise ShapeError("There are no states to join; pass at least one.")
        first = states[0].describe()
        for i, state in enumerate(states):
            if state.describe() != first:
                raise ShapeError(
                    f"State {i} is {state.describe()}, but state 0 is {first}; only states of the same model, on one "
                    "device, can be joined."
                )
        return MambaState(
            [torch.cat(parts) for parts in zip(*(state.conv for state in states), strict=True)],
            [torch.cat(parts) for parts in zip(*(state.ssm for state in states), strict=True)],
        )

    def describe(self) -> str:
        """Depth, sizes of a row, dtypes and device in words; equal for states that can stand in one batch."""
        layers = [
            f"conv {list(conv.shape[1:])} {conv.dtype} on {conv.device} and ssm {list(ssm.shape[1:])} {ssm.dtype} "
            f"on {ssm.device}"
            for conv, ssm in zip(self.conv, self.ssm, strict=True)
        ]
        return f"{len(layers)} layers of {', or of '.join(dict.fromkeys(layers))}"

    def detach(self) -> MambaState:
        """Cut the autograd graph."""
        return MambaState([t.detach() for t in self.conv], [t.detach() for t in self.ssm])

    def to(self, device: torch.device | str) -> MambaState:
        """Move to a device."""
        return MambaState([t.to(device) for t in self.conv], [t.to(device) for t in self.ssm])

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all: `conv.0`, `ssm.0`, and so on, in their own dtypes.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors = {
            f"{name}.{i}": tensor.detach().cpu().contiguous()
            for name, parts in (("conv", self.conv), ("ssm", self.ssm))
            for i, tensor in enumerate(parts)
        }
        metadata = {"format": FORMAT, "version": VERSION, "num_layers": str(len(self.ssm))}
        try:
            write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata=metadata))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be written ({error}); name a file, not a folder, where there is room and permission."
            ) from None

    @classmethod
    def load(cls, path: Path | str, *, device: torch.device | str = "cpu") -> MambaState:
        """Read what `save` wrote. Nothing is unpickled.

        Whether the state fits a model is checked when the model takes it; that it was made by the same *weights*
        cannot be seen from it.

        Raises:
            CheckpointError: the file is missing, cut short, or holds something else than one whole state.
        """
        try:
            with safe_open(path, framework="pt") as file:
                num_layers = _check_header(path, file.metadata() or {}, set(file.keys()))
                # A copy: the file's own pages could change under a tensor that is only mapped.
                tensors = {key: file.get_tensor(key).to(device, copy=True) for key in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; read the prefix again and save its state there.") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}); it may be cut short. Read the prefix again and save its state anew."
            ) from None
        state = cls([tensors[f"conv.{i}"] for i in range(num_layers)], [tensors[f"ssm.{i}"] for i in range(num_layers)])
        _check_sizes(path, state)
        return state


def _check_header(path: Path | str, metadata: dict[str, str], keys: set[str]) -> int:
    """Return the number of layers that a state file promises and holds."""
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no Mamba state: its format is {metadata.get('format')!r}, not {FORMAT!r}. "
            "Name a file that MambaState.save wrote."
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {metadata.get('version')!r} of the state format, and this Cobra reads {VERSION!r}; "
            "read the prefix again and save its state anew."
        )
    promised = metadata.get("num_layers", "")
    num_layers = int(promised) if promised.isdecimal() else 0
    wanted = {f"{name}.{i}" for name in ("conv", "ssm") for i in range(num_layers)}
    missing, unexpected = sorted(wanted - keys), sorted(keys - wanted)
    if num_layers == 0 or missing or unexpected:
        raise CheckpointError(
            f"{path} is not one whole state of num_layers={promised!r}: "
            f"missing: {_shorten(missing)}; unexpected: {_shorten(unexpected)}. "
            "Read the prefix again and save its state anew."
        )
    return num_layers


def _shorten(keys: list[str]) -> str:
    return f"{', '.join(keys[:8]) or 'nothing'}{' ...' if len(keys) > 8 else ''}"


def _check_sizes(path: Path | str, state: MambaState) -> None:
    conv, ssm = state.conv[0], state.ssm[0]
    for i, tensors in enumerate(zip(state.conv, state.ssm, strict=True)):
        fits = (
            all(tensor.dim() == 3 and tensor.is_floating_point() for tensor in tensors)
            and (tensors[0].shape, tensors[1].shape) == (conv.shape, ssm.shape)
            and (conv.shape[0], conv.shape[2]) == (ssm.shape[0], ssm.shape[1])
        )
        if not fits:
            found = " and ".join(f"{list(tensor.shape)} {tensor.dtype}" for tensor in tensors)
            raise CheckpointError(
                f"{path}: conv.{i} and ssm.{i} are {found}, expected floating point [batch, width - 1, dim] and "
                "[batch, dim, state], alike in all layers. Read the prefix again and save its state anew."
            )
