"""States: rows repeated and joined, files written whole, read exactly and refused by name, never unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cobra.errors import CheckpointError, ShapeError
from cobra.models import state as state_module
from cobra.models.state import MambaState


def make_state(
    rows: int = 3,
    *,
    layers: int = 2,
    width: int = 8,
    conv: torch.dtype = torch.float32,
    ssm: torch.dtype = torch.float32,
) -> MambaState:
    generator = torch.Generator().manual_seed(rows)
    return MambaState(
        [torch.randn(rows, 3, width, generator=generator).to(conv) for _ in range(layers)],
        [torch.randn(rows, width, 5, generator=generator).to(ssm) for _ in range(layers)],
    )


def assert_same(actual: MambaState, expected: MambaState) -> None:
    for ours, theirs in zip([*actual.conv, *actual.ssm], [*expected.conv, *expected.ssm], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # dtype and device too


@pytest.fixture
def file(tmp_path: Path) -> Path:
    make_state().save(tmp_path / "image.safetensors")
    return tmp_path / "image.safetensors"


class TestRows:
    def test_expand_repeats_each_row_side_by_side(self) -> None:
        state = make_state(3)
        assert_same(state.expand(2), state[[0, 0, 1, 1, 2, 2]])
        assert_same(state.expand(1), state)

    def test_expand_sums_the_gradients_of_copies(self) -> None:
        state = make_state(2)
        leaf = state.ssm[0].requires_grad_()
        state.expand(3).ssm[0].backward(torch.arange(6.0)[:, None, None].expand(6, 8, 5))
        assert leaf.grad is not None
        assert leaf.grad[:, 0, 0].tolist() == [0 + 1 + 2, 3 + 4 + 5]

    def test_expand_to_nothing_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="count=0"):
            make_state().expand(0)

    def test_concat_stacks_rows(self) -> None:
        state = make_state(4)
        assert_same(MambaState.concat([state[:1], state[1:3], state[[3]]]), state)

    def test_concat_of_nothing_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="no states"):
            MambaState.concat([])

    @pytest.mark.parametrize(
        ("other", "found", "expected"),
        [
            (make_state(layers=3), "3 layers", "2 layers"),
            (make_state(width=6), r"\[6, 5\]", r"\[8, 5\]"),
            (make_state(conv=torch.bfloat16), "bfloat16", "float32"),
            (make_state().to("meta"), "meta", "cpu"),
        ],
        ids=["depth", "width", "dtype", "device"],
    )
    def test_concat_of_unlike_states_is_refused(self, other: MambaState, found: str, expected: str) -> None:
        with pytest.raises(ShapeError, match=f"State 1 is .*{found}.* but state 0 is .*{expected}"):
            MambaState.concat([make_state(), other])

    @pytest.mark.parametrize("index", [[2, 0], torch.tensor([2, 0]), torch.tensor([2, 0], dtype=torch.int32)], ids=repr)
    def test_rows_are_selected_in_order(self, index: Tensor | list[int]) -> None:
        state = make_state(3)
        assert_same(state[index], MambaState.concat([state[2:], state[:1]]))

    def test_empty_list_selects_no_rows(self) -> None:
        state = make_state(3)
        assert state[[]].batch_size == 0
        assert_same(state[[]], state[:0])

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (torch.tensor([True, False, True]), r"torch\.bool mask; pass mask\.nonzero\(\)"),
            ([True, False, True], r"torch\.bool mask; pass mask\.nonzero\(\)"),
            (torch.tensor([0.0, 2.0]), r"torch\.float32 index; pass int64"),
            (torch.tensor([]), r"torch\.float32 index; pass int64"),
            ([0.5], r"torch\.float32 index; pass int64"),
        ],
        ids=repr,
    )
    def test_other_indices_are_refused(self, index: Tensor | list[int], message: str) -> None:
        with pytest.raises(ShapeError, match=message):
            make_state(3)[index]

    def test_state_without_layers_is_refused(self) -> None:
        with pytest.raises(ShapeError, match="no layers"):
            MambaState([], [])


class TestFiles:
    @pytest.mark.parametrize(
        "state",
        [
            make_state(1),
            make_state(4, conv=torch.bfloat16),
            make_state(conv=torch.float64, ssm=torch.float64),
            make_state(4)[1:3],
            MambaState([t.transpose(1, 2) for t in make_state().ssm], [t.transpose(1, 2) for t in make_state().conv]),
            MambaState([torch.zeros(2, 0, 8)], [torch.ones(2, 8, 5)]),  # a convolution of width 1 remembers nothing
        ],
        ids=["one row", "bfloat16", "float64", "slice", "strided", "width 1"],
    )
    def test_round_trip_is_exact(self, state: MambaState, tmp_path: Path) -> None:
        state.save(tmp_path / "states" / "image.safetensors")
        assert_same(MambaState.load(tmp_path / "states" / "image.safetensors"), state)
        assert [path.name for path in (tmp_path / "states").iterdir()] == ["image.safetensors"]

    def test_state_with_a_graph_is_saved_without_it(self, tmp_path: Path) -> None:
        state = make_state()
        state.ssm[0].requires_grad_()
        state.expand(2).save(str(tmp_path / "x"))
        assert not MambaState.load(str(tmp_path / "x")).ssm[0].requires_grad

    def test_load_puts_the_state_on_a_device(self, file: Path) -> None:
        assert {t.device.type for t in MambaState.load(file, device="meta").conv} == {"meta"}

    def test_loaded_state_does_not_depend_on_its_file(self, file: Path) -> None:
        loaded = MambaState.load(file)
        content = file.read_bytes()
        with file.open("r+b") as handle:  # in place, as a careless copy would
            handle.write(bytes(len(content)))
        assert_same(loaded, make_state())

    def test_failing_save_leaves_the_old_file(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
            path.write_bytes(b"half")
            raise OSError("No space left on device")

        monkeypatch.setattr(state_module, "save_file", fail)
        with pytest.raises(CheckpointError, match=r"image\.safetensors cannot be written \(No space") as caught:
            make_state(7).save(file)
        assert str(file) in str(caught.value)
        assert_same(MambaState.load(file), make_state())
        assert list(file.parent.iterdir()) == [file]

    def test_folder_is_not_written_over(self, tmp_path: Path) -> None:
        (tmp_path / "states").mkdir()
        with pytest.raises(CheckpointError, match=r"states cannot be written .*name a file, not a folder"):
            make_state().save(tmp_path / "states")
        assert [path.name for path in tmp_path.iterdir()] == ["states"]

    def test_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="absent is missing"):
            MambaState.load(tmp_path / "absent")

    def test_folder_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            MambaState.load(tmp_path)

    @pytest.mark.parametrize("kept", [0, 4, 200, -1])
    def test_truncated_file_is_refused(self, file: Path, kept: int) -> None:
        file.write_bytes(file.read_bytes()[:kept])
        with pytest.raises(CheckpointError, match=r"image\.safetensors cannot be read .* save its state anew"):
            MambaState.load(file)

    def test_pickled_file_is_refused_unopened(self, tmp_path: Path) -> None:
        (tmp_path / "state").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        with pytest.raises(CheckpointError, match="cannot be read"):
            MambaState.load(tmp_path / "state")
        assert not (tmp_path / "sprung").exists()

    @pytest.mark.parametrize(
        ("metadata", "message"),
        [
            (None, "no Mamba state: its format is None"),
            ({"format": "pt"}, "no Mamba state: its format is 'pt'"),
            ({"version": "2"}, "version '2'.* reads '1'"),
            ({"num_layers": "0"}, "num_layers='0'"),
            ({"num_layers": "many"}, "num_layers='many'"),
            ({"num_layers": "3"}, r"missing: conv\.2, ssm\.2; unexpected: nothing"),
            ({"num_layers": "1"}, r"missing: nothing; unexpected: conv\.1, ssm\.1"),
        ],
    )
    def test_foreign_header_is_refused(self, file: Path, metadata: dict[str, str] | None, message: str) -> None:
        own = {"format": "cobra-mamba-state", "version": "1", "num_layers": "2"}
        save_file(load_file(file), file, metadata=None if metadata is None else own | metadata)
        with pytest.raises(CheckpointError, match=message) as caught:
            MambaState.load(file)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors: tensors.pop("ssm.0"), r"missing: ssm\.0"),
            (lambda tensors: tensors.update({"norm": torch.ones(1)}), "unexpected: norm"),
            (lambda tensors: tensors.update({"ssm.1": torch.zeros(3, 8)}), r"ssm\.1 are .*\[3, 8\]"),
            (lambda tensors: tensors.update({"ssm.1": torch.zeros(2, 8, 5)}), r"ssm\.1 are .*\[2, 8, 5\]"),
            (lambda tensors: tensors.update({"conv.0": torch.zeros(3, 3, 7)}), r"conv\.0 .*\[3, 3, 7\]"),
            (lambda tensors: tensors.update({"conv.1": torch.zeros(3, 3, 8, dtype=torch.int8)}), "int8"),
        ],
        ids=["missing", "extra", "dimensions", "rows", "width", "integers"],
    )
    def test_wrong_contents_are_refused(
        self, file: Path, change: Callable[[dict[str, Tensor]], object], message: str
    ) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "cobra-mamba-state", "version": "1", "num_layers": "2"})
        with pytest.raises(CheckpointError, match=message) as caught:
            MambaState.load(file)
        assert str(file) in str(caught.value) and "save its state anew" in str(caught.value)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.file,)
