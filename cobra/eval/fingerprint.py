"""What answers depend on, as short digests: the model's own files and the questions, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cobra.config import read_yaml
from cobra.errors import CheckpointError
from cobra.eval.benchmark import Question
from cobra.hub import resolve_model_folder
from cobra.loading import find_model
from cobra.models.public import CHECKPOINT, is_public_run
from cobra.models.sharded import is_sharded

_SAMPLE, _NUM_SAMPLES = 2**14, 2**12  # bytes, pieces: 64 MiB of a large file


def model_fingerprint(name: str) -> dict[str, str]:
    """Return digests of the weights and of the config that `cobra.load` reads for a name.

    Raises:
        CobraError: there is no such model, or a part of it is missing.
    """
    folder = find_model(name)
    if is_sharded(folder):
        parts = sorted(file for file in folder.iterdir() if file.suffix == ".distcp")
        samples = _of_pieces(piece for file in parts for piece in _samples(file))
        return {"model": files_digest([folder / ".metadata"]) + samples, "model config": _of_run(folder)}
    if is_public_run(folder):
        weights = folder / CHECKPOINT
    else:
        folder = resolve_model_folder(folder)
        weights = folder / "model.safetensors"
    return {"model": files_digest([weights]), "model config": files_digest([folder / "config.json"])}


def question_digests(questions: Iterable[Question]) -> dict[str, str]:
    """Return by question id a digest of what its answer depends on; what is known of the truth may grow."""
    return {q.id: _short(repr((q.text, q.answer, q.image.name)).encode()) for q in questions}


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _of_run(checkpoint: Path) -> str:
    """Of what a run's config says of the model; a resumed run may train longer."""
    file = checkpoint.resolve().parent.parent / "config.yaml"
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} is a training checkpoint, but its run's config {file} is missing.")
    run: dict[str, Any] = read_yaml(file, "config")
    training: dict[str, Any] = run.get("train") or {}
    return _of_pieces([json.dumps([run.get("model"), training.get("lora")]).encode()])


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
