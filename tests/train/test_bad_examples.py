"""Images that are lost or broken while a run reads them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cobra.errors import DataError
from cobra.train import checkpoint

from .runs import Fit, assert_equal, at_step, interrupt_after_second_save, losses, rows, weights

LOST = (2, 7, 11, 13, 17, 19)


@pytest.fixture
def images(small_data, tmp_path: Path) -> Path:
    """Images of the test's own."""
    return shutil.copytree(small_data.images, tmp_path / "images")


def found_bad(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "bad_examples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_saves_and_names_it(fit: Fit, whole_run: Path, images: Path, tmp_path: Path, num_workers: int) -> None:
    content = (images / "7.png").read_bytes()
    (images / "7.png").write_bytes(b"not a picture")
    options = [f"data.images={images}", "data.check=exists", f"train.num_workers={num_workers}"]
    with pytest.raises(DataError, match=r"^The image \S*7\.png does not decode[^\n]*$"):
        fit(*options)
    run = tmp_path / "runs" / "small"
    done = len(losses(run)) if (run / "metrics.jsonl").exists() else 0
    newest = checkpoint.latest(run / "checkpoints")
    assert done > 0 and newest is not None and newest.name == f"step-{done:06d}"
    (images / "7.png").write_bytes(content)
    assert_equal(weights(fit(*options)), weights(whole_run))
    assert losses(run) == losses(whole_run)


def test_skipped_ones_are_counted_and_listed(fit: Fit, monkeypatch: pytest.MonkeyPatch, images: Path, caplog) -> None:
    """They vanish after the third step; a run that is cut and resumed then lists and learns the same."""
    kept = shutil.copytree(images, images.with_name("kept"))

    def lose() -> None:
        for number in LOST:
            (images / f"{number}.png").unlink(missing_ok=True)

    options = [f"data.images={images}", "data.on_bad_example=skip"]
    with monkeypatch.context() as patch:
        at_step(patch, 3, lose)
        whole = fit("run.name=whole", *options)
    bad = found_bad(whole)
    assert {str(entry["id"]).split("/")[0] for entry in bad} <= set(map(str, LOST)) and len(bad) > 10
    assert min(entry["step"] for entry in bad) > 3 and max(entry["step"] for entry in bad) > 8
    assert all(entry["data_set"] == "easyvqa" and ".png" in str(entry["reason"]) for entry in bad)
    counted = [sum(entry["step"] <= row["step"] for entry in bad) for row in rows(whole)]
    assert [row["bad_examples"] for row in rows(whole)] == counted

    shutil.copytree(kept, images, dirs_exist_ok=True)
    run = whole.with_name("cut")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lose)
        interrupt_after_second_save(patch)
        with pytest.raises(KeyboardInterrupt):
            fit("run.name=cut", *options)
    assert checkpoint.latest(run / "checkpoints") == run / "checkpoints" / "step-000008"
    with (run / "bad_examples.jsonl").open("a") as file:  # as if it had gone on and been killed
        file.write(json.dumps({"step": 9, "id": "7/0", "data_set": "easyvqa", "reason": "7.png"}) + "\n" + '{"st')
    fit("run.name=cut", *options)
    assert found_bad(run) == bad
    assert_equal(weights(run), weights(whole))
    assert rows(run)[-1]["bad_examples"] == len(bad)


def test_step_without_any_good_image_is_an_error(fit: Fit, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    """Nothing can be learnt from it, and most likely the disk is gone."""

    def lose() -> None:
        for file in images.iterdir():
            file.unlink()

    at_step(monkeypatch, 3, lose)
    with pytest.raises(DataError, match=r"^[^\n]+$") as caught:
        fit(f"data.images={images}", "data.on_bad_example=skip")
    assert str(caught.value).startswith("Step ")
