"""Width and height of every image of a data set, read once: whoever plans batches by size need not decode."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from cobra.data.images import missing_images, probe_images, state_of_images
from cobra.data.index import Index, array_found_or_made
from cobra.runtime import num_cores, write_atomically

_FORMAT = 1


def image_sizes(index: Index, name: str, images: Path, *, jobs: int | None = None) -> np.ndarray:
    """Return int32 [images, 2], memory-mapped: width and height in pixels, 0 where an image has none.

    `image_sizes(...)[index.images]` are those of the rows (of text rows: any). Images that have been written since are
    read again.

    Args:
        index: names the images.
        name: of the data set, for the progress bar.
        images: folder that their paths start from.
        jobs: processes that read; None: one for each core.
    """
    names = index.image_names()
    file = _file(index, images, names)

    def make() -> np.ndarray:
        gone = set(missing_images(images, names))
        there = [number for number in range(len(names)) if number not in gone]
        sizes = np.zeros((len(names), 2), np.int32)
        sizes[there], _ = probe_images(
            images, [names[number] for number in there], name, decode=False, jobs=jobs or num_cores()
        )
        return sizes

    return array_found_or_made(index.folder, file, make)


def store_sizes(index: Index, images: Path, sizes: np.ndarray) -> None:
    """Keep sizes that somebody has read for `image_sizes`."""
    file = _file(index, images, index.image_names())
    write_atomically(file, lambda temporary: np.save(temporary, sizes))


def _file(index: Index, images: Path, names: list[str]) -> Path:
    key = hashlib.sha256(f"{_FORMAT} {images.expanduser().absolute()} {state_of_images(images, names)}".encode())
    return index.folder / f"sizes-{key.hexdigest()[:16]}.npy"
