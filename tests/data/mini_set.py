"""A small published set, its manifest, and the prepare journey over it in this process."""

from __future__ import annotations

import io
import json
import random
import zipfile
from pathlib import Path
from typing import Any

import yaml
from file_server import Mirror
from PIL import Image

from cobra.config import DataConfig, PathsConfig, PrepareConfig
from cobra.data.prepare.run import prepare

NUM_IMAGES = 40
TINY = Path(__file__).resolve().parents[2] / "cobra" / "assets" / "tiny" / "tokenizer.json"


def picture(number: int, kind: str) -> bytes:
    """Noise, so that it has some size."""
    rng = random.Random(number)
    image = Image.frombytes("RGB", (48, 48), rng.randbytes(48 * 48 * 3))
    file = io.BytesIO()
    image.quantize(16).save(file, kind) if kind == "GIF" else image.save(file, kind)
    return file.getvalue()


def kind_of(number: int) -> str:
    return ("JPEG", "GIF", "PNG")[number % 3]


def published() -> dict[str, bytes]:
    """What a host has: annotations, and an archive with a folder of its own around images of three kinds."""
    ends = {"JPEG": "jpg", "GIF": "gif", "PNG": "png"}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(NUM_IMAGES):
            file.writestr(f"pack/images/{i}.{ends[kind_of(i)]}", picture(i, kind_of(i)))
    rows = [
        {
            "id": str(i),
            "image": f"ocr/images/{i}.jpg",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Noise {i}."}],
        }
        for i in range(NUM_IMAGES)
    ]
    return {"train.json": json.dumps(rows).encode(), "images.zip": archive.getvalue()}


def write_manifest(folder: Path, host: Mirror, **changes: Any) -> None:
    node = {
        "name": "mini", "title": "Noise", "kind": "training", "folder": "mini",
        "homepage": "h", "licence": "l", "citation": "c",
        "files": [
            {"target": "train.json", "urls": [host.url("train.json")]},
            {
                "target": "downloads/images.zip",
                "urls": [host.url("images.zip")],
                "extract": {"into": "ocr", "strip": "pack"},
            },
        ],
        "convert": [{"kind": "ocr-vqa-jpeg", "source": "ocr/images"}],
        "expect": [{"rows": "train.json", "count": NUM_IMAGES}, {"files": "ocr/images/*.jpg", "count": NUM_IMAGES}],
    }  # fmt: skip
    (folder / "mini.yaml").write_text(yaml.safe_dump(node | changes))


def run(root: Path, *, data: bool = True, **settings: Any) -> None:
    """Prepare the set; `data`: there is a config to train on it."""
    config = DataConfig(
        name="mini",
        annotations=str(root / "mini" / "train.json"),
        images=str(root / "mini"),
        index=str(root / "index"),
    )
    chosen: dict[str, Any] = {"sets": ["mini"], "tokenizer": str(TINY), "jobs": 1} | settings
    prepare(
        PrepareConfig(paths=PathsConfig(data=str(root)), **chosen),
        configs=root,
        data_config=lambda _: config if data else None,
        questions=lambda _: [],
    )


def contents(root: Path) -> dict[str, bytes]:
    """What counts of a prepared folder: rows and images."""
    files = [root / "mini" / "train.json", *(root / "mini" / "ocr" / "images").iterdir()]
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in files if not file.name.startswith(".")}


def report_of(root: Path) -> dict[str, Any]:
    return json.loads((root / "reports" / "mini" / "report.json").read_text())
