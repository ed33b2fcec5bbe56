"""GIF and PNG files to JPEG: the pixels the model's own reader sees, broken files left, any kill survived."""

from __future__ import annotations

import logging
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cobra.data.prepare.jpeg import convert_to_jpeg
from cobra.errors import DataError
from cobra.models.image import to_rgb

CONVERT = "import sys; from pathlib import Path; from cobra.data.prepare.jpeg import convert_to_jpeg; "
CONVERT += "convert_to_jpeg(Path(sys.argv[1]), jobs=2)"


def picture(mode: str, seed: int = 0, size: int = 48) -> Image.Image:
    """A smooth picture of many colours, its transparency smooth as well."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 4), dtype=np.uint8), "RGBA")
    image = coarse.resize((size, size), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    return image.convert("RGB").convert(mode)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "mode", "transparency"),
    [
        ("a.gif", "P", None),
        ("a.gif", "P", "one colour"),
        ("a.GIF", "L", None),
        ("a.png", "RGB", None),
        ("a.png", "RGBA", None),
        ("a.png", "LA", None),
        ("a.png", "P", bytes(range(256))),
        ("a.png", "1", None),
        ("a.PNG", "I;16", None),
        ("a.b.png", "RGB", "one colour"),
    ],
)
def test_pixels_are_those_the_model_sees(name: str, mode: str, transparency: object, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    original, image = tmp_path / "deep" / name, picture(mode)
    transparency = image.getpixel((9, 9)) if transparency == "one colour" else transparency
    image.save(original, **({} if transparency is None else {"transparency": transparency}))
    with Image.open(original) as image:
        to_rgb(image).save(tmp_path / "expected", "JPEG", quality=95)
    assert convert_to_jpeg(tmp_path, jobs=2) == 1
    assert contents(tmp_path / "deep") == {original.with_suffix(".jpg").name: (tmp_path / "expected").read_bytes()}


def test_first_frame_and_files_that_are_left_alone(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    first.save(tmp_path / "film.gif", save_all=True, append_images=[second])
    picture("RGB").save(tmp_path / "inside.jpg", "PNG")
    picture("RGB").save(tmp_path / "photo.jpg")
    picture("RGB").save(tmp_path / "named.gif", "JPEG")  # only its name is wrong
    before = contents(tmp_path)
    assert convert_to_jpeg(tmp_path, jobs=1) == 2
    after = contents(tmp_path)
    with Image.open(tmp_path / "film.jpg") as image:
        red, _, blue = image.getpixel((8, 8))
    assert red > 250 and blue < 5
    assert after["named.jpg"] == before["named.gif"]
    assert {"inside.jpg": before["inside.jpg"], "photo.jpg": before["photo.jpg"]}.items() <= after.items()
    assert convert_to_jpeg(tmp_path, jobs=1) == 0
    assert contents(tmp_path) == after


def test_what_cannot_be_converted_is_left_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("RGB").save(tmp_path / "good.png")
    picture("RGB").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "page.gif").write_text("<html>404</html>")
    (tmp_path / "empty.gif").touch()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    picture("L", size=200).save(tmp_path / "bomb.png")
    picture("RGB", seed=1).save(tmp_path / "two.jpg")
    picture("RGB", seed=2).save(tmp_path / "two.png")
    before = contents(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert convert_to_jpeg(tmp_path, jobs=2) == 1
    warning = caplog.text
    assert "5 of 6 images" in warning
    for name in ("cut.png", "page.gif", "empty.gif", "bomb.png", "two.png: two.jpg is there and is another picture"):
        assert name in warning
    after = contents(tmp_path)
    assert after.pop("good.jpg")
    assert after.items() == {name: content for name, content in before.items() if name != "good.png"}.items()


def test_two_originals_of_one_stem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first by name wins, at any number of threads; the other one stays."""
    for name, colour in (("x.gif", "red"), ("x.gif.png", "lime"), ("x.png", "blue")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    assert convert_to_jpeg(tmp_path, jobs=4) == 2
    assert sorted(contents(tmp_path)) == ["x.gif.jpg", "x.jpg", "x.png"]
    assert "x.png: x.jpg is there" in caplog.text


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; there are no images"):
        convert_to_jpeg(tmp_path / "images", jobs=1)


def test_killed_at_any_moment_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """A picture is there as original or as whole JPEG at every moment, and often as both for a while."""
    source, undisturbed, folder = (tmp_path / name for name in ("source", "undisturbed", "killed"))
    source.mkdir()
    for i in range(250):
        picture("P" if i % 2 else "RGBA", seed=i).save(source / f"{i:03d}.{'gif' if i % 2 else 'png'}")
    shutil.copytree(source, undisturbed)
    shutil.copytree(source, folder)
    assert convert_to_jpeg(undisturbed, jobs=1) == 250
    expected, rng, halfway = contents(undisturbed), random.Random(0), 0
    for share in (0.02, 0.4, 0.7):
        process = subprocess.Popen([sys.executable, "-c", CONVERT, folder])
        while process.poll() is None and len(list(folder.glob("[!.]*.jpg"))) < share * 250:
            time.sleep(rng.uniform(0, 0.002))
        process.kill()
        process.wait()
        found = {name: content for name, content in contents(folder).items() if not name.startswith(".")}
        halfway += any(name.endswith((".gif", ".png")) for name in found)
        assert {name: found[name] for name in found if name.endswith(".jpg")}.items() <= expected.items()
        assert {Path(name).stem for name in found} == {Path(name).stem for name in expected}
    assert halfway
    convert_to_jpeg(folder, jobs=2)
    assert contents(folder) == expected


def test_original_whose_jpeg_was_just_finished_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture("RGB").save(tmp_path / "a.png")
    original = (tmp_path / "a.png").read_bytes()
    convert_to_jpeg(tmp_path, jobs=1)
    expected = contents(tmp_path)
    (tmp_path / "a.png").write_bytes(original)  # as if killed between renaming and removing
    assert convert_to_jpeg(tmp_path, jobs=1) == 1
    assert contents(tmp_path) == expected
    assert not caplog.records
