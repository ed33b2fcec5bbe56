"""What answers depend on, as short digests: the model's own files and the questions, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from cobra.config import read_yaml
from cobra.errors import CheckpointError
from cobra.eval.benchmark import Question
from cobra.hub import resolve_file, resolve_model_folder, resolve_weights
from cobra.loading import check_overrides, find_model, settings
from cobra.models.hugging_face import is_hugging_face
from cobra.models.pretrained import unwrapped, weights_name
from cobra.models.public import CHECKPOINT, is_public_run, public_config
from cobra.models.readers import read_weights
from cobra.models.sharded import is_sharded

_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model")
_SAMPLE, _NUM_SAMPLES = 2**14, 2**12  # bytes, pieces: 64 MiB of a large file


def model_fingerprint(
    name: str,
    *,
    vision: Mapping[str, Any] | str | Path | None = None,
    llm: Mapping[str, Any] | str | Path | None = None,
) -> dict[str, Any]:
    """Return digests of the weights and of all settings that `cobra.load` reads for a name.

    Args:
        name: as in `cobra.load`.
        vision: as in `cobra.load`; what it says is returned, with digests for files, wherever it is written.
        llm: likewise.

    Raises:
        CobraError: there is no such model, or a part of it is missing.
    """
    overrides = {key: settings(given, key) for key, given in (("vision", vision), ("llm", llm)) if given}
    check_overrides(overrides.get("vision"), overrides.get("llm"))
    folder = find_model(name)
    if is_sharded(folder):
        found = _of_checkpoint(folder)
    elif is_hugging_face(folder):  # its weights may be in shards
        found = files_fingerprint(sorted(folder.glob("*.safetensors")), folder)
    elif is_public_run(folder):
        found = _of_public_run(folder, overrides.get("vision"), overrides.get("llm"))
    else:
        folder = resolve_model_folder(folder)
        found = files_fingerprint([folder / "model.safetensors"], folder)
    return found | {key: _with_digests(given) for key, given in overrides.items()}


def question_digests(questions: Iterable[Question]) -> dict[str, str]:
    """Return by question id a digest of what its answer depends on; what is known of the truth may grow."""
    return {q.id: _short(repr((q.text, q.answer, q.image.name)).encode()) for q in questions}


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _of_checkpoint(checkpoint: Path) -> dict[str, str]:
    """Of its tensors, and of what the run's config says of the model; a resumed run may train longer."""
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} is a training checkpoint, but its run's config {file} is missing.")
    parts = sorted(part for part in checkpoint.iterdir() if part.suffix == ".distcp")
    tensors = chain(_pieces(checkpoint / ".metadata"), *map(_samples, parts))
    run: dict[str, Any] = read_yaml(file, "config")
    model: dict[str, Any] = run.get("model") or {}
    training: dict[str, Any] = run.get("train") or {}
    llm: dict[str, Any] = model.get("llm") or {}
    tokenizer = resolve_file(str(llm.get("tokenizer")), "model.llm.tokenizer")
    config = [json.dumps([model, training.get("lora")]).encode(), *_pieces(tokenizer)]
    return {"model": _of_pieces(tensors), "model config": _of_pieces(config)}


def _of_public_run(folder: Path, vision: Mapping[str, Any] | None, llm: Mapping[str, Any] | None) -> dict[str, str]:
    """Of the run's own files, and of the parts that it names and does not hold."""
    config, weights = public_config(folder, vision, llm), [folder / CHECKPOINT]
    held = {name.split(".")[0] for name in unwrapped(read_weights(folder / CHECKPOINT))}
    sources: dict[str, str] = {}
    if "vision_backbone" not in held:
        sources |= {f"vision.towers[{i}].weights": weights_name(t) for i, t in enumerate(config.vision.towers)}
    if "llm_backbone" not in held:
        sources["llm.weights"] = config.llm.weights
    for setting, source in sources.items():  # "random" is refused when the model is loaded
        weights += _files(resolve_weights(source, setting)) if source != "random" else []
    others = [*settings_files(folder), resolve_file(config.llm.tokenizer, "llm.tokenizer")]
    return {"model": files_digest(weights), "model config": files_digest(others)}


def _with_digests(node: Any) -> Any:
    """Return settings in which local files of weights and tokenizers stand for their content."""
    if isinstance(node, Mapping):
        items = cast("Mapping[str, Any]", node).items()
        return {
            key: _content(value) if key in ("weights", "tokenizer") else _with_digests(value) for key, value in items
        }
    return [_with_digests(item) for item in cast("list[Any]", node)] if isinstance(node, list) else node


def _content(name: Any) -> Any:
    path = Path(str(name)).expanduser()
    return f"content {files_digest(_files(path))}" if path.exists() else name


def files_fingerprint(weights: Sequence[Path], folder: Path) -> dict[str, str]:
    """Return digests of weight files, and of the settings beside them."""
    return {"model": files_digest(weights), "model config": files_digest(settings_files(folder))}


def settings_files(folder: Path) -> list[Path]:
    """Return a model folder's files that answers depend on besides the weights: configs, tokenizer, templates."""
    return sorted(file for pattern in _SETTINGS for file in folder.glob(pattern))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def files_digest(files: Sequence[Path]) -> str:
    """Return a digest of files' contents, in this order."""
    return _of_pieces(piece for file in files for piece in _pieces(file))


def _pieces(file: Path) -> Iterable[bytes]:
    """Yield a file in pieces: a model may be larger than memory."""
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            yield piece


def _samples(file: Path) -> Iterable[bytes]:
    """Yield pieces from all over a file: a training checkpoint is several times its weights, and changes everywhere."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for start in range(0, size, max(_SAMPLE, size // _NUM_SAMPLES)):
            stream.seek(start)
            yield stream.read(_SAMPLE)
    yield str(size).encode()


def _of_pieces(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()[:16]
