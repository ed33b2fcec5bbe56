"""Image transforms against timm's own and the public release's pixels, and what pictures of every kind become."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, ImageDraw, features
from timm.data import create_transform
from torchvision.transforms.functional import pad

from cobra.config import RESIZE_STRATEGIES
from cobra.errors import ConfigError, DataError
from cobra.hub import open_image
from cobra.models import image as image_module
from cobra.models.image import ImageTransform, to_rgb

PUBLIC = "dinosiglip-vit-so-384px"
HALF_TRANSPARENT_RED, GREY = (255, 0, 0, 128), 100
MEAN = (0.485, 0.456, 0.406)
BARS = (123, 116, 103)  # MEAN in levels, cut to whole ones
SIZES = [(1, 1), (1, 2), (2, 1), (7, 5), (24, 24), (56, 56), (45, 77), (50, 100), (101, 64), (57, 300), (300, 41),
         (333, 500), (500, 333), (120, 56), (56, 120), (1, 90), (90, 1), (640, 480), (481, 640)]  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours, sharp edges and noise, as in a photograph."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    pen = ImageDraw.Draw(image)
    for _ in range(5):
        pen.line(rng.integers(0, max(width, height), 4).tolist(), fill=tuple(rng.integers(0, 256, 3).tolist()), width=2)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def timm_pixels(image: Image.Image, size: int, interpolation: str, strategy: str) -> torch.Tensor:
    """What timm's transform makes of an image before it normalises."""
    if strategy == "letterbox":
        side = max(image.size)
        image = pad(image, [(side - image.width) // 2, (side - image.height) // 2], fill=BARS)  # type: ignore[arg-type]
    mode = "squash" if strategy == "resize-naive" else "center"
    transform = create_transform(
        (3, size, size), interpolation=interpolation, crop_pct=1.0, crop_mode=mode, normalize=False
    )
    return transform(image)  # type: ignore[operator]


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="until 12, Pillow's passes had another order")
@pytest.mark.parametrize("strategy", RESIZE_STRATEGIES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
def test_pixels_equal_timm_bit_for_bit(strategy: str, interpolation: str) -> None:
    for size in (56, 224):
        transform = ImageTransform([(size, {"mean": MEAN, "interpolation": interpolation})], strategy)
        for shape in SIZES:
            image = picture(*shape)
            (pixels,) = transform(image)
            assert torch.equal(pixels, timm_pixels(image, size, interpolation, strategy)), (shape, size)


def test_nearest_equals_pillow() -> None:
    transform = ImageTransform([(31, {"mean": MEAN, "interpolation": "nearest"})], "resize-naive")
    for shape in SIZES:
        image = picture(*shape)
        expected = np.asarray(image.resize((31, 31), Image.Resampling.NEAREST))
        assert np.array_equal(transform(image)[0].permute(1, 2, 0), expected), shape


@pytest.mark.parametrize("strategy", RESIZE_STRATEGIES)
def test_pixels_equal_the_public_release(assets: Path, strategy: str) -> None:
    folder = assets / "fixtures" / "public-cobra-tiny"
    expected = np.load(folder / "pixels_56px.npz")
    cfgs = json.loads((folder / "pixels_meta.json").read_text())[f"{PUBLIC}/data_cfg"]
    transform = ImageTransform([(56, cfgs[name]) for name in ("dino", "siglip")], strategy)
    for file in sorted((folder / "images").iterdir()):
        views = transform(Image.open(file))
        for name, view in zip(("dino", "siglip"), transform.view_of_tower, strict=True):
            mean, std = (np.array(cfgs[name][key], np.float32)[:, None, None] for key in ("mean", "std"))
            pixels = (views[view].numpy().astype(np.float32) / 255 - mean) / std
            difference = np.abs(pixels - expected[f"{PUBLIC}/{strategy}/{name}/{file.stem}"]).max()
            assert difference < 1e-5, (file.stem, name)  # one of 255 levels would be 0.015


def test_letterbox_keeps_the_whole_image_between_bars_of_the_mean() -> None:
    transform = ImageTransform([(40, {"mean": (0.2, 0.4, 0.6), "interpolation": "nearest"})], "letterbox")
    (pixels,) = transform(Image.new("RGB", (80, 40), (255, 0, 0)))
    assert pixels[:, 0, 0].tolist() == [51, 102, 153] and pixels[:, -1, -1].tolist() == [51, 102, 153]
    assert (pixels[:, 10:30] == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()


def test_views_are_shared_where_towers_agree() -> None:
    cfg = {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    other = cfg | {"mean": (0.4, 0.5, 0.6)}
    assert len(ImageTransform([(64, cfg), (64, other)], "letterbox").views) == 2  # bars of another colour
    assert len(ImageTransform([(64, cfg), (64, other)], "resize-crop").views) == 1
    assert len(ImageTransform([(64, cfg), (56, cfg)], "resize-naive").views) == 2
    with pytest.raises(ConfigError, match="hamming"):
        ImageTransform([(64, cfg | {"interpolation": "hamming"})], "resize-naive")


def in_file(image: Image.Image, kind: str, **options: object) -> Image.Image:
    """The image, written and opened again but not decoded."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (1, 1), 0)
    image.putpalette([255, 0, 0])
    image.info["transparency"] = 0
    return image


def grey_16_with_transparency() -> Image.Image:
    image = Image.fromarray(np.array([[5000, 257 * GREY]], np.uint16))
    image.info["transparency"] = 5000
    return image


RED, WHITE = (255, 0, 0), (255, 255, 255)


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.new("RGBA", (1, 1), HALF_TRANSPARENT_RED), [(255, 127, 127)]),  # on white
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [WHITE]),
        (Image.new("RGBA", (1, 1), HALF_TRANSPARENT_RED).convert("RGBa"), [(255, 127, 127)]),
        (Image.new("P", (1, 1)).quantize(2), [(0, 0, 0)]),
        (palette_with_transparency(), [WHITE]),
        (Image.new("RGBA", (1, 1), HALF_TRANSPARENT_RED).quantize(2), [(255, 127, 127)]),  # a palette of four channels
        (in_file(Image.new("RGB", (1, 1), RED).quantize(2), "GIF"), [RED]),
        (Image.new("PA", (1, 1), (0, 0)), [WHITE]),
        (Image.new("L", (1, 1), GREY), [(GREY, GREY, GREY)]),
        (in_file(Image.new("L", (1, 1), GREY), "PNG", transparency=GREY), [WHITE]),
        (in_file(Image.new("RGB", (1, 1), RED), "PNG", transparency=RED), [WHITE]),
        (Image.new("LA", (1, 1), (GREY, 255)), [(GREY, GREY, GREY)]),
        (Image.new("LA", (1, 1), (GREY, 0)), [WHITE]),
        (Image.new("1", (1, 1), 1), [WHITE]),
        (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [RED]),
        (Image.new("YCbCr", (1, 1), (255, 128, 128)), [WHITE]),
        (Image.new("HSV", (1, 1), (0, 255, 255)), [RED]),
        (Image.fromarray(np.full((1, 1), 65535, np.uint16)), [WHITE]),
        (Image.fromarray(np.full((1, 1), 257 * GREY, np.uint16)), [(GREY, GREY, GREY)]),
        (Image.fromarray(np.full((1, 1), 257 * GREY + 129, np.uint16)), [(GREY + 1,) * 3]),  # rounded, not cut
        (in_file(Image.fromarray(np.full((1, 1), 257 * GREY, np.uint16)), "PNG"), [(GREY, GREY, GREY)]),
        (Image.fromarray(np.full((1, 1), 257 * GREY, ">u2")), [(GREY, GREY, GREY)]),
        (Image.fromarray(np.full((1, 1), 257 * GREY, np.int32)), [(GREY, GREY, GREY)]),
        (grey_16_with_transparency(), [WHITE, (GREY, GREY, GREY)]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_image_modes_become_what_a_person_sees(image: Image.Image, pixels: list[tuple[int, int, int]]) -> None:
    shown = to_rgb(image)
    assert shown.mode == "RGB" and shown.size == image.size
    assert [shown.getpixel((x, 0)) for x in range(shown.width)] == pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_every_exif_orientation_is_turned_upright(orientation: int, mode: str) -> None:
    """TIFF 6.0: each value says at which side of the upright picture the stored first row and first column are."""
    upright = picture(5, 3).convert(mode)
    a = np.asarray(upright)  # its rows go from the top, its columns from the left
    turned = a.swapaxes(0, 1)
    stored = {
        1: a,  # row 0 is the top, column 0 the left
        2: a[:, ::-1],  # top, right
        3: a[::-1, ::-1],  # bottom, right
        4: a[::-1],  # bottom, left
        5: turned,  # row 0 is the left, column 0 the top
        6: turned[::-1],  # right, top
        7: turned[::-1, ::-1],  # right, bottom
        8: turned[:, ::-1],  # left, bottom
    }[orientation]
    image = Image.fromarray(np.ascontiguousarray(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = in_file(image, "PNG", exif=exif.tobytes())
    assert np.array_equal(np.asarray(to_rgb(opened)), np.asarray(to_rgb(upright)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"Exif\x00\x00MM", b"\x00" * 9], ids=str)
def test_damaged_exif_does_not_refuse_the_picture(exif: bytes) -> None:
    image = picture(8, 6)
    assert np.array_equal(to_rgb(in_file(image, "PNG", exif=exif)), image)


def with_transparency(mode: str, value: object) -> Image.Image:
    image = Image.new(mode, (2, 2))
    image.info["transparency"] = value
    return image


def truncated() -> Image.Image:
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Image.new("RGB", (0, 5)), "0 x 5 has no pixels"),
        (lambda: Image.new("F", (2, 2)), "floating-point"),
        (lambda: Image.fromarray(np.array([[70000]], np.int32)), "70000"),
        (lambda: Image.fromarray(np.array([[-1]], np.int32)), "-1"),
        (truncated, "cannot be shown"),
        (lambda: with_transparency("RGB", "white"), "mode RGB cannot be shown"),
        (lambda: with_transparency("L", None), "mode L cannot be shown"),
        (lambda: with_transparency("P", 1.5), "Transparency for P mode should be"),
    ],
)
def test_what_cannot_be_shown_is_refused(make: Callable[[], Image.Image], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageTransform([(16, {"mean": MEAN, "interpolation": "bicubic"})], "resize-naive")(make())


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_damaged_avif_is_refused(tmp_path: Path) -> None:
    """Its decoder raises RuntimeError."""
    file = io.BytesIO()
    picture(64, 64).save(file, "AVIF")
    content = bytearray(file.getvalue())
    start = content.index(b"mdat") + 4
    content[start : start + 8] = b"\xff" * 8
    (tmp_path / "x.avif").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.avif does not decode: .*Replace the file or leave it out"):
        open_image(tmp_path / "x.avif")
    with pytest.raises(DataError, match="cannot be shown as RGB"):
        to_rgb(Image.open(tmp_path / "x.avif"))


@pytest.mark.parametrize("strategy", RESIZE_STRATEGIES)
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (65000, 2), (64, 64)], ids=str)
def test_any_shape_becomes_a_square_in_little_memory(strategy: str, size: tuple[int, int]) -> None:
    transform = ImageTransform([(64, {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"})], strategy)
    image = Image.new("RGB", size, (10, 20, 30))
    tracemalloc.start()
    (pixels,) = transform(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6  # a canvas of 65000 x 65000 would be 12 GB
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8 and pixels.is_contiguous()
    if strategy != "letterbox" or size[0] == size[1]:
        assert (pixels == torch.tensor([10, 20, 30]).view(3, 1, 1)).all()
    else:
        assert (pixels[:, 0, 0] == 127).all()


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="until 12, Pillow's passes had another order")
@pytest.mark.parametrize("size", [(4000, 3000), (3000, 4000)])
def test_large_image_is_read_in_strips(size: tuple[int, int]) -> None:
    image = picture(300, 200).resize(size, Image.Resampling.NEAREST)
    transform = ImageTransform([(64, {"mean": MEAN, "interpolation": "bicubic"})], "resize-naive")
    tracemalloc.start()
    (pixels,) = transform(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24e6  # one copy of all its pixels is 48 MB
    assert np.array_equal(pixels.permute(1, 2, 0), image.resize((64, 64), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("strategy", ["resize-naive", "resize-crop", "letterbox"])
@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow 13 changed the order of its passes")
def test_without_numba_the_pixels_are_the_same(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transform = ImageTransform([(48, {"interpolation": "bicubic", "mean": (0.48, 0.46, 0.41)})], strategy)
    noise = np.random.default_rng(0).integers(0, 256, (61, 87, 3), dtype=np.uint8)
    for size in ((87, 61), (61, 87), (20, 20)):
        picture = Image.fromarray(noise).resize(size)
        monkeypatch.setattr(image_module, "_kernels", lambda: None)
        slow = transform(picture)
        monkeypatch.undo()
        assert torch.equal(slow[0], transform(picture)[0])
