"""Names of files and folders -> local paths. The one place that knows where weights and tokenizers can come from."""

from __future__ import annotations

import fnmatch
import http.client
import io
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cobra.config import nearest
from cobra.errors import CheckpointError, ConfigError, DataError

WEIGHTS_VARIABLE = "COBRA_WEIGHTS"  # names a folder that is searched before the Hub

_PACKAGE = "cobra:"
_FILE_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".json", ".yaml", ".yml")
_PUBLIC_CHECKPOINT = "checkpoints/latest-checkpoint.pt"
# of a model folder, and of a run in the public layout
_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", _PUBLIC_CHECKPOINT)
_SHARDS = ("model.safetensors.index.json", "model-*.safetensors")
_MAX_DOWNLOAD = 64 * 2**20  # bytes of one image
_HUB_TIMEOUT = 10  # seconds until a Hub that does not answer counts as out of reach


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
    except (ValueError, RuntimeError) as error:  # a NUL byte; a home that nobody has
        raise DataError(f"{str(image)!r} is not the path of an image ({error}). Give a file or a URL.") from None
    try:
        decoded = Image.open(io.BytesIO(content))
        decoded.load()
    except Exception as error:  # decoders of damaged files raise anything
        reason = "unknown format or damaged" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"The image {image} does not decode: {reason}. Replace the file or leave it out.") from None
    return decoded


def _fetch(url: str) -> bytes:
    """Download a small file; DataError when nothing comes within 30 seconds or more than 64 MiB."""
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "cobra"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            content = answer.read(_MAX_DOWNLOAD + 1)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise DataError(f"Cannot fetch {url}: {error}.") from None
    if len(content) > _MAX_DOWNLOAD:
        raise DataError(f"{url} is larger than {_MAX_DOWNLOAD // 2**20} MiB, too large for an image.")
    return content


def resolve_file(name: str, setting: str, inside: str = "tokenizer.json") -> Path:
    """Return the local path of a file.

    Args:
        name: `cobra:...` (a file shipped with this package), a file, or a folder or Hub id with the file `inside`.
        setting: the key that the name came from, for messages.
        inside: which file of a folder or Hub repository is meant.

    Raises:
        CheckpointError: there is no such file, or the Hub cannot be reached.
    """
    path = _find(name, setting)
    if path is None:
        path = _download(name, setting, lambda files: [inside] if inside in files else [])
    file = path / inside if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{setting}={name}: no such file ({file.absolute()}).")
    return file


def resolve_weights(name: str, setting: str) -> Path:
    """Return the local file or folder of weights that `name` stands for.

    Looked for in this order: a file shipped with this package (`cobra:...`), a local file or folder, the folder that
    COBRA_WEIGHTS names (`organisation/name`, then `name` below it), the Hugging Face Hub.

    Raises:
        CheckpointError: it is nowhere, or the Hub cannot be reached; the message says what can be done.
    """
    path = _find(name, setting)
    return path if path is not None else _download(name, setting, _weight_files)


def resolve_model(name: str | Path) -> Path:
    """Return the local folder of a whole model: a run or model folder, or a run in the public release's layout.

    `name` may be a folder, `organisation/name` on the Hub, or `organisation/name/folder` for a folder in a repository;
    COBRA_WEIGHTS is searched before the Hub.

    Raises:
        ConfigError: this is no name.
        CheckpointError: it is nowhere, or the Hub cannot be reached.
    """
    found = local_model(name)
    if found is not None:
        return found
    path, parts = Path(name).expanduser().absolute(), str(name).split("/")
    beside = _nearest_beside(path) if len(parts) > 1 else ""
    if not _is_hub_id("/".join(parts[:2])) or len(parts) > 3:
        raise CheckpointError(f"There is no run or model folder at {path}; train one, or check the path.{beside}")
    inside = "/".join(parts[2:])
    prefix = f"{inside}/" if inside else ""
    try:
        return _download("/".join(parts[:2]), "model", lambda files: _model_files(files, prefix)) / inside
    except CheckpointError as error:
        raise CheckpointError(f"There is no run or model folder at {path}.{beside} And: {error}") from None


def _nearest_beside(path: Path) -> str:
    """Return ` Did you mean '...'?` for the folder beside a missing one with the most similar name."""
    try:
        return nearest(path.name, [one.name for one in path.parent.iterdir() if one.is_dir()])
    except OSError:  # its parent is not there, or may not be read
        return ""


def local_model(name: str | Path) -> Path | None:
    """Return the folder of a model on this machine, the name itself or below COBRA_WEIGHTS; None: it is not here.

    Raises:
        ConfigError: this is no name.
        CheckpointError: it is a file, or a path that cannot be looked at.
    """
    if not isinstance(name, (str, Path)) or not str(name).strip() or "\0" in str(name):
        raise ConfigError(f"model={name!r} names no model; give a folder, a name or a Hub id as text.")
    path = _local_path(str(name), "model")
    found = path if path.exists() else _in_weights_folder(str(name))
    if found is not None and not found.is_dir():
        raise CheckpointError(f"model={name}: {found.absolute()} is a file, and a model is a folder; give its folder.")
    return found


def resolve_model_folder(name: str | Path) -> Path:
    """Return the folder with `config.json` and `model.safetensors` that `name` (a run or model folder) stands for.

    Raises:
        CheckpointError: there is none; the message says what was looked for and what to do.
    """
    folder = resolve_model(name)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    for file in map(folder.joinpath, _MODEL_FILES):
        if file.is_symlink() and not file.exists():
            raise CheckpointError(
                f"{file} is a link to {file.readlink()}, which is missing; fetch it, or mend the link."
            )
    missing = [file for file in ("config.json", _PUBLIC_CHECKPOINT) if not (folder / file).is_file()]
    if missing and any((folder / "checkpoints").glob("*.pt")):  # ours are folders
        raise CheckpointError(
            f"{folder} looks like a run of the public release, but lacks {' and '.join(missing)}; fetch it, or give "
            "the checkpoint that you mean this name."
        )
    if any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl")):
        raise CheckpointError(
            f"The run in {folder} has not finished: there is no model/ yet. If it is training now, wait; else start "
            "the same command again, which goes on from its last checkpoint."
        )
    raise CheckpointError(
        f"{folder} is neither a run folder nor a model folder (config.json + model.safetensors), nor a run of the "
        f"public release (config.json + {_PUBLIC_CHECKPOINT})."
    )


def upload_folder(folder: Path, repository: str, *, private: bool, message: str) -> str:
    """Upload a folder to a model repository on the Hub, made where there is none; return its address.

    Raises:
        CheckpointError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        answer = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    except Exception as error:  # of huggingface_hub, or of whichever HTTP library it uses
        raise CheckpointError(
            f"Cannot upload to {repository!r}: {_first_line(error)}. Log in with `hf auth login`, check the name and "
            "the connection."
        ) from None
    return str(answer)


def _find(name: str, setting: str) -> Path | None:
    """Return the path of something on this machine; None for what may be on the Hub."""
    if name.startswith(_PACKAGE):
        path = Path(str(resources.files("cobra"))) / "assets" / name.removeprefix(_PACKAGE)
        if path.exists():
            return path
    path = _local_path(name, setting)
    if path.exists():
        return path
    found = _in_weights_folder(name)
    if found is None and not _is_hub_id(name):
        raise CheckpointError(f"{setting}={name}: no such file ({path.absolute()}).")
    return found


def _local_path(name: str, setting: str) -> Path:
    """Return a name as a path; CheckpointError where this machine cannot even look whether something is there."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long or not allowed; a NUL byte; a home nobody has
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{setting}={name[:200]!r} is not a path that can be read: {reason}.") from None
    return path


def _in_weights_folder(name: str) -> Path | None:
    folder = os.environ.get(WEIGHTS_VARIABLE)
    if not folder or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise CheckpointError(f"{WEIGHTS_VARIABLE}={folder} is not a folder; correct the variable, or unset it.")
    return next((path for path in (root / name, root / Path(name).name) if path.exists()), None)


def _is_hub_id(name: str) -> bool:
    """Whether a name can be `organisation/name`; what ends like a weight file or looks like a path is a path."""
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)) and not name.endswith(_FILE_ENDINGS)


def _weight_files(files: list[str]) -> list[str]:
    """Choose what is needed of a repository: safetensors where there are some, else what torch.save wrote."""
    top = [file for file in files if "/" not in file]
    for names in (
        [_SHARDS[0], *fnmatch.filter(top, _SHARDS[1])],
        ["model.safetensors"],
        ["pytorch_model.bin.index.json", *fnmatch.filter(top, "pytorch_model-*.bin")],
        ["pytorch_model.bin"],
        ["open_clip_model.safetensors"],
    ):
        if names[0] in top:
            return [*names, "config.json"] if "config.json" in top else names
    return []


def _model_files(files: list[str], prefix: str) -> list[str]:
    """Choose what is needed of a whole model in a repository; only Hugging Face's form has weights in shards."""
    wanted = [prefix + file for file in _MODEL_FILES if prefix + file in files]
    if prefix + "model.safetensors" not in wanted and f"{prefix}{_SHARDS[0]}" in files:
        wanted += [file for file in files if file.startswith(prefix) and _is_shard(file.removeprefix(prefix))]
    return sorted(wanted)


def _is_shard(file: str) -> bool:
    return "/" not in file and any(fnmatch.fnmatchcase(file, pattern) for pattern in _SHARDS)


def _download(name: str, setting: str, choose: Callable[[list[str]], list[str]]) -> Path:
    """Fetch the files that `choose` takes of a Hub repository's; the library's cache holds only complete files."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    remedy = (
        f"Check the name and the connection, or put its files into a folder {name!r} below the folder that the "
        f"environment variable {WEIGHTS_VARIABLE} names, or give a local path as {setting}."
    )
    try:
        try:
            # asked for in this way the library does not try again for half a minute, as it does for a list of files
            found = HfApi().model_info(name, timeout=_HUB_TIMEOUT)
            files = [file.rfilename for file in found.siblings or []]
        except Exception as error:  # of huggingface_hub, or of whichever HTTP library it uses
            cached = _cached(name)
            if cached is None or not choose(_files_below(cached)):
                raise error from None
            return cached
        chosen = choose(files)
        if not chosen:
            raise CheckpointError(
                f"{setting}={name}: the Hugging Face Hub has {name}, but without the files needed here. {remedy}"
            )
        return Path(snapshot_download(name, allow_patterns=chosen))
    except CheckpointError:
        raise
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError)
        failure = "does not give it" if refused else "cannot be reached"
        login = "If it is private or gated, log in with `hf auth login`. " if refused else ""
        raise CheckpointError(
            f"{setting}={name}: not on this machine, and the Hugging Face Hub {failure} ({_first_line(error)}). "
            f"{login}{remedy}"
        ) from None


def _cached(name: str) -> Path | None:
    """Return what an earlier download left of a repository in the library's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not there, in one of several ways
        return None


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
