"""easy-VQA (github.com/vzhou842/easy-VQA, MIT) from its PyPI package into the format of the big data sets.

The package holds 4,000 + 1,000 PNG images of 64 x 64 pixels and 38,575 + 9,673 questions `[text, answer, image id]`.
Written: `train.json` and `test.json` (LLaVA conversations) and `images/{train,test}/{id}.png`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from cobra.data.made import make_once, whole_folder
from cobra.errors import DataError


def prepare(folder: Path) -> None:
    """Write the data set into `folder`, complete or not at all. Does nothing when it is there.

    Any number of processes may call this at once: one works, the others wait.

    Raises:
        DataError: the package is not installed, or the folder holds something else (which stays as it is).
    """
    make_once(folder, _is_there, _prepare)


def _is_there(folder: Path) -> bool:
    return (folder / "train.json").is_file() and (folder / "test.json").is_file()


def _prepare(folder: Path) -> None:
    if util.find_spec("easy_vqa") is None:
        raise DataError("easy-VQA comes with a PyPI package that is not installed: pip install easy-vqa")
    import easy_vqa

    splits = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "test": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    with whole_folder(folder, "easy-VQA") as temporary:
        for split, (questions, images) in splits.items():
            (temporary / "images" / split).mkdir(parents=True)
            for image_id, path in images.items():
                shutil.copyfile(path, temporary / "images" / split / f"{image_id}.png")
            rows = conversations(split, *questions)
            (temporary / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")


def conversations(
    split: str, questions: Sequence[str], answers: Sequence[str], image_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Turn questions into LLaVA rows. "yes" and "no" get a capital, as in the big data sets."""
    return [
        {
            "id": f"{split}/{i}",
            "image": f"{split}/{image_id}.png",
            "conversations": [
                {"from": "human", "value": f"<image>\n{question}"},
                {"from": "gpt", "value": answer.capitalize() if answer in ("yes", "no") else answer},
            ],
        }
        for i, (question, answer, image_id) in enumerate(zip(questions, answers, image_ids, strict=True))
    ]
