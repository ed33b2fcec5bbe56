"""Names of files and folders -> local paths. The one place that knows where weights and tokenizers can come from."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cobra.errors import CheckpointError, DataError

_PACKAGE = "cobra:"
_MAX_DOWNLOAD = 64 * 2**20  # bytes of one image


def open_image(image: Image.Image | str | Path | np.ndarray) -> Image.Image:
    """Return a decoded PIL image from an image, a path, an http(s) URL, or a uint8 array [height, width(, channels)].

    Raises:
        DataError: it is missing, does not decode, or is not an image.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[:, :, 0]
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (2,), (3,), (4,)):
            raise DataError(
                f"An image array must be uint8 [height, width(, channels)], not {image.dtype} {image.shape}."
            )
        return Image.fromarray(image)
    if not isinstance(image, (str, Path)):
        raise DataError(f"An image must be a PIL image, a path, a URL or a uint8 array, not {type(image).__name__}.")
    try:
        is_url = str(image).startswith(("http://", "https://"))
        content = _fetch(str(image)) if is_url else Path(image).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read the image {image}: {error.strerror}.") from None
    try:
        decoded = Image.open(io.BytesIO(content))
        decoded.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "unknown format or damaged" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"The image {image} does not decode: {reason}. Replace the file or leave it out.") from None
    return decoded


def _fetch(url: str) -> bytes:
    """Download a small file; DataError when nothing comes within 30 seconds or more than 64 MiB."""
    request = urllib.request.Request(url, headers={"User-Agent": "cobra"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read(_MAX_DOWNLOAD + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise DataError(f"Cannot fetch {url}: {error}.") from None
    if len(content) > _MAX_DOWNLOAD:
        raise DataError(f"{url} is larger than {_MAX_DOWNLOAD // 2**20} MiB, too large for an image.")
    return content


def resolve_file(name: str, setting: str) -> Path:
    """Return the local path of a file: `cobra:...` is a file shipped with this package, anything else a path.

    Raises:
        CheckpointError: there is no such file; the message names `setting`, the key it came from.
    """
    if name.startswith(_PACKAGE):
        path = Path(str(resources.files("cobra"))) / "assets" / name.removeprefix(_PACKAGE)
    else:
        path = Path(name).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{setting}={name}: no such file ({path.absolute()}).")
    return path


def resolve_model_folder(name: str | Path) -> Path:
    """Return the folder with `config.json` and `model.safetensors` that `name` (a run or model folder) stands for.

    Raises:
        CheckpointError: there is none; the message says what was looked for and what to do.
    """
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    if not folder.exists():
        raise CheckpointError(f"There is no run or model folder at {folder.absolute()}; train one, or check the path.")
    if (folder / "checkpoints").is_dir():
        raise CheckpointError(
            f"The run in {folder} has not finished: it has checkpoints but no model/ yet. Start the same command again "
            "to go on from its last checkpoint."
        )
    raise CheckpointError(f"{folder} is neither a run folder nor a model folder (config.json + model.safetensors).")
