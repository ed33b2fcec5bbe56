"""Small LLaVA data sets on disk, for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from cobra.config.train import DataConfig
from cobra.data.dataset import ConversationDataset, open_data
from cobra.models.image import ImageTransform
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

TRANSFORM = ImageTransform([(16, {"mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"})], "resize-naive")


def make_row(row_id: object, image: str | None = None, question: str = "q", answer: str = "a") -> dict[str, Any]:
    """A row of one turn."""
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "conversations": messages} | ({} if image is None else {"image": image})


def make_folder(folder: Path) -> list[dict[str, Any]]:
    """Write three images into `folder`/images and five rows into `folder`/a.json; return the rows."""
    names = ["0.png", "1.png", None, "1.png", "sub/2.png"]
    (folder / "images" / "sub").mkdir(parents=True)
    for i, name in enumerate(filter(None, names)):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / "images" / name)
    rows = [make_row(i, name, answer="a" * (i + 1)) for i, name in enumerate(names)]
    write_rows(folder, rows)
    return rows


def write_rows(folder: Path, rows: object) -> None:
    (folder / "a.json").write_text(json.dumps(rows))


def make_config(folder: Path, **settings: Any) -> DataConfig:
    files = {"annotations": str(folder / "a.json"), "images": str(folder / "images")}
    return DataConfig(**{"name": "five", "index": str(folder / "index")} | files | settings)


def open_folder(
    folder: Path, tokenizer: Tokenizer, *, max_length: int = 64, captions_only: bool = False, **settings: Any
) -> ConversationDataset:
    config, prompt = make_config(folder, **settings), prompt_format("mamba")
    return open_data(config, tokenizer, prompt, TRANSFORM, max_length=max_length, captions_only=captions_only)
