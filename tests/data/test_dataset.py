"""Opening data: what is made, what is checked, what is left out, how mixtures are numbered."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from data_sets import make_config, make_folder, make_row, open_folder, write_rows
from PIL import Image

from cobra.config import PretrainConfig
from cobra.config.train import DataConfig, DataSetConfig
from cobra.data import health, images
from cobra.data.dataset import ConversationDataset, open_data
from cobra.data.units import IMAGE_PAD, TEXT_PAD
from cobra.errors import DataError
from cobra.text.prompt import IGNORE_INDEX, prompt_format
from cobra.text.tokenizer import Tokenizer


def ids_of(dataset: ConversationDataset) -> list[str]:
    return [dataset.row(number)[1].id for number in range(dataset.num_rows)]


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-25])


def test_dataset_gives_rows_with_the_image_they_share(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_folder(tmp_path)
    dataset = open_folder(tmp_path, tokenizer)
    assert ids_of(dataset) == list("01234")
    example = dataset[(1, 3)]
    assert example.ids == ("1", "3")
    assert example.pixels is not None and example.pixels[0][0].unique().tolist() == [80]
    assert example.rows == [dataset.tokenize(dataset.row(number)[1]) for number in (1, 3)]
    assert dataset[(2,)].pixels is None
    (part,) = dataset.parts
    assert part.images.tolist() == [0, 1, -1, 1, 2]
    assert part.lengths.tolist() == [len(dataset[(number,)].rows[0][0]) for number in range(5)]


def test_pads_have_no_label(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_folder(tmp_path)
    dataset = open_folder(tmp_path, tokenizer)
    for unit in (IMAGE_PAD, TEXT_PAD):
        example = dataset[unit]
        assert example.rows == [([tokenizer.end_id], [IGNORE_INDEX])] and example.ids == ()
        assert (example.pixels is None) == (unit == TEXT_PAD)


class TestImages:
    @pytest.mark.parametrize("check", ["exists", "decode"])
    def test_missing_image_is_an_error(self, tmp_path: Path, tokenizer: Tokenizer, check: str) -> None:
        make_folder(tmp_path)
        (tmp_path / "images" / "1.png").unlink()
        message = r"^2 of 5 rows of five cannot be used: 2 x image missing \(id '1', 1\.png; id '3', 1\.png\)\. .*skip"
        for _ in range(2):
            with pytest.raises(DataError, match=message) as caught:
                open_folder(tmp_path, tokenizer, check=check)
        report = Path(str(caught.value).split("More in ")[1].rstrip("."))
        assert json.loads(report.read_text())["problems"]["image missing"]["count"] == 2
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "1.png")
        assert open_folder(tmp_path, tokenizer, check=check).num_rows == 5

    @pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "cut short"])
    def test_image_that_does_not_decode_is_named(
        self, tmp_path: Path, tokenizer: Tokenizer, content: bytes | None
    ) -> None:
        make_folder(tmp_path)
        file = tmp_path / "images" / "sub" / "2.png"
        file.write_bytes(file.read_bytes()[:-25] if content is None else content)
        dataset = open_folder(tmp_path, tokenizer)
        for use in (lambda: open_folder(tmp_path, tokenizer, check="decode"), lambda: dataset[(4,)]):
            with pytest.raises(DataError, match=r"sub/2\.png does not decode"):
                use()

    def test_images_are_decoded_once_until_one_changes(
        self, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_folder(tmp_path)
        seen: list[str] = []
        original = images.open_image
        monkeypatch.setattr(images, "open_image", lambda path: (seen.append(path.name), original(path)))
        for _ in range(2):
            open_folder(tmp_path, tokenizer, check="decode")
            assert sorted(seen) == ["0.png", "1.png", "2.png"]
        damage(tmp_path / "images" / "0.png")
        with pytest.raises(DataError, match=r"0\.png does not decode"):
            open_folder(tmp_path, tokenizer, check="decode")

    def test_missing_folder_is_named(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        make_folder(tmp_path)
        for policy in ("error", "skip"):
            with pytest.raises(DataError, match=r"absent does not exist\. Check data\.images"):
                open_folder(tmp_path, tokenizer, images=str(tmp_path / "absent"), on_bad_example=policy)

    def test_text_needs_no_folder(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        write_rows(tmp_path, [make_row(1)])
        assert open_folder(tmp_path, tokenizer).num_rows == 1

    def test_a_directory_or_dangling_link_is_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "d.png").mkdir()
        (tmp_path / "l.png").symlink_to(tmp_path / "nowhere.png")
        (tmp_path / "ok.png").touch()
        (tmp_path / "to_ok.png").symlink_to(tmp_path / "ok.png")
        names = ["d.png", "l.png", "ok.png", "to_ok.png", "no/x.png", "./ok.png", "sub/"]
        assert images.missing_images(tmp_path, names) == [0, 1, 4, 6]


class TestSkip:
    def test_every_kind_of_bad_row_is_left_out(
        self, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = make_folder(tmp_path)
        rows += [make_row(5, question="circle " * 70), "no row", make_row(6, "gone.png"), make_row(7)]
        write_rows(tmp_path, rows)
        damage(tmp_path / "images" / "0.png")
        with caplog.at_level(logging.WARNING):
            dataset = open_folder(tmp_path, tokenizer, check="decode", on_bad_example="skip")
        assert ids_of(dataset) == ["1", "2", "3", "4", "7"]
        assert [dataset[(number,)].ids for number in range(5)] == [(name,) for name in "12347"]
        (part,) = dataset.parts
        assert len(part.images) == len(part.lengths) == 5 and part.images.tolist()[:4] == [1, -1, 1, 2]
        assert "4 of 9 rows of five cannot be used" in caplog.text
        for kind in ("image missing", "image does not decode", "no answer within model.max_length", "not an object"):
            assert f"1 x {kind}" in caplog.text

    def test_resumed_run_leaves_out_the_same_rows(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        make_folder(tmp_path)
        (tmp_path / "images" / "0.png").unlink()
        before = open_folder(tmp_path, tokenizer, on_bad_example="skip")
        (tmp_path / "images" / "1.png").unlink()
        after = open_folder(tmp_path, tokenizer, on_bad_example="skip")
        assert ids_of(after) == ids_of(before) == list("1234")
        assert after.digest == before.digest

    def test_digest_knows_what_is_left_out(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        make_folder(tmp_path)
        whole = open_folder(tmp_path, tokenizer).digest
        (tmp_path / "images" / "0.png").unlink()
        assert open_folder(tmp_path, tokenizer, on_bad_example="skip").digest != whole

    def test_folder_without_any_image_is_refused_and_forgotten(self, tmp_path: Path, tokenizer: Tokenizer) -> None:
        write_rows(tmp_path, [row for row in make_folder(tmp_path) if "image" in row])
        (tmp_path / "images").rename(tmp_path / "unmounted")
        (tmp_path / "images").mkdir()
        with pytest.raises(DataError, match="None is left"):
            open_folder(tmp_path, tokenizer, on_bad_example="skip")
        (tmp_path / "images").rmdir()
        (tmp_path / "unmounted").rename(tmp_path / "images")
        assert open_folder(tmp_path, tokenizer, on_bad_example="skip").num_rows == 4


def test_rows_without_answer_within_the_limit_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_rows(tmp_path, [make_row("long", question="circle " * 50), make_row("short")])
    with pytest.raises(DataError, match=r"1 x no answer within model\.max_length \(id 'long'\)"):
        open_folder(tmp_path, tokenizer, max_length=20)


def test_align_stage_refuses_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_folder(tmp_path)
    with pytest.raises(DataError, match=r"row '2' has no image, and train\.stage=align learns from images alone"):
        open_folder(tmp_path, tokenizer, captions_only=True)


def test_mixture_numbers_rows_through_all_sets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name)
    mix = {
        name: DataSetConfig(annotations=f"{tmp_path}/{name}/a.json", images=f"{tmp_path}/{name}/images", weight=weight)
        for name, weight in (("x", 1), ("y", 3))
    }
    (tmp_path / "y" / "images" / "0.png").unlink()
    config = DataConfig(name="both", mix=mix, index=str(tmp_path / "index"), on_bad_example="skip")
    dataset = open_data(config, tokenizer, prompt_format("mamba"), lambda _: [], max_length=64, captions_only=False)
    assert ids_of(dataset) == ["0", "1", "2", "3", "4", "1", "2", "3", "4"]
    assert [dataset.row(number)[0].name for number in (0, 4, 5, 8)] == ["x", "x", "y", "y"]
    assert [part.first_row for part in dataset.parts] == [0, 5]
    assert [part.epochs for part in dataset.parts] == pytest.approx([9 / 4 / 5, 9 * 3 / 4 / 4])


@pytest.mark.parametrize("name", ["cobra-mix", "easyvqa", "llava-align", "llava-v1.5"])
def test_config_passes_the_typed_door(tiny_config: Callable[..., PretrainConfig], name: str) -> None:
    config = tiny_config(f"data={name}", "paths.data=/somewhere").data
    assert config.name == name
    assert all(part.annotations.startswith("/somewhere/") for part in config.sets.values())


def test_example_in_the_config_is_made(tmp_path: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("easy_vqa")
    folder = tmp_path / "easyvqa"
    settings = {"annotations": str(folder / "train.json"), "images": str(folder / "images"), "source": "easyvqa"}
    assert open_folder(tmp_path, tokenizer, **settings).num_rows == 38575


def test_report_is_written_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    (tmp_path / "images" / "0.png").unlink()
    written: list[str] = []
    original = health.write_text
    monkeypatch.setattr(health, "write_text", lambda file, text: (written.append(file.name), original(file, text)))
    for _ in range(2):
        with pytest.raises(DataError):
            open_folder(tmp_path, tokenizer)
    assert written == ["report.json"] and make_config(tmp_path).on_bad_example == "error"
