"""GIF and PNG files to JPEG: OCR-VQA's conversations call every image `<number>.jpg`, its servers do not."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cobra.data.progress import progress
from cobra.errors import DataError
from cobra.hub import open_image
from cobra.runtime import write_atomically

log = logging.getLogger(__name__)

_SUFFIXES = (".gif", ".png")
_QUALITY = 95
_NAMED = 10  # broken files that the warning names


def convert_to_jpeg(folder: Path, *, jobs: int) -> int:
    """Replace every GIF and PNG file below a folder by `<stem>.jpg`; return how many.

    The picture is the first frame, on white where it is transparent. An original is removed once its JPEG is on the
    disk; one that does not decode, or whose JPEG's place is taken by another picture, is left and named in a warning.

    Args:
        folder: its folders are searched as well; files whose names begin with a dot are left alone.
        jobs: threads; decoding and encoding leave Python's lock.

    Raises:
        DataError: the folder does not exist, or the disk does not take the JPEGs.
    """
    if not folder.is_dir():
        raise DataError(f"The folder {folder} does not exist; there are no images to convert. Extract them first.")
    found = [path for path in folder.rglob("[!.]*") if path.suffix.lower() in _SUFFIXES and path.is_file()]
    found.sort(key=lambda path: (_target(path), path))
    same_target = [list(group) for _, group in groupby(found, key=_target)]
    failed: list[str] = []
    with progress(len(found), f"{folder.name} to JPEG", "image") as bar, ThreadPoolExecutor(max(1, jobs)) as pool:
        for reasons in pool.map(_convert_all, same_target):
            failed += [reason for reason in reasons if reason is not None]
            bar.update(len(reasons))
    if failed:
        more = f" ... and {len(failed) - _NAMED:,} more" if len(failed) > _NAMED else ""
        some = " ".join(failed[:_NAMED]) + more
        log.warning("%d of %d images in %s were not converted: %s", len(failed), len(found), folder, some)
    return len(found) - len(failed)


def _target(original: Path) -> Path:
    return original.with_suffix(".jpg")


def _convert_all(originals: Sequence[Path]) -> list[str | None]:
    """Convert files that share a stem, one after the other; return why each was not."""
    return [_convert(original) for original in originals]


def _convert(original: Path) -> str | None:
    target = _target(original)
    try:
        content = _as_jpeg(original)
    except DataError as error:
        return str(error)
    try:
        if not target.exists() or not _is_picture(target):
            write_atomically(target, lambda temporary: temporary.write_bytes(content))
        elif target.read_bytes() != content:  # equal: killed before the original was removed
            return f"{original}: {target.name} is there and is another picture."
        original.unlink()
    except OSError as error:  # a full disk, say: it would go on like this, image by image
        reason = error.strerror or error
        raise DataError(f"Cannot write {target} in place of {original.name}: {reason}. Make room.") from None
    return None


def _is_picture(path: Path) -> bool:
    with suppress(DataError):
        open_image(path)
        return True
    return False


def _as_jpeg(path: Path) -> bytes:
    image = open_image(path)
    if image.format == "JPEG":  # only its name is wrong
        return path.read_bytes()
    try:
        content = io.BytesIO()
        _as_rgb(ImageOps.exif_transpose(image)).save(content, "JPEG", quality=_QUALITY)
    except Exception as error:  # what Pillow raises on odd files is anything
        raise DataError(f"The image {path} cannot be written as JPEG: {error}.") from None
    return content.getvalue()


def _as_rgb(image: Image.Image) -> Image.Image:
    """Return what a person would see, as the model's own reader does."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip
        return Image.fromarray(
            ((np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257).astype(np.uint8)
        ).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    shown = Image.new("RGB", rgba.size, "white")
    shown.paste(rgba, mask=rgba.getchannel("A"))
    return shown
