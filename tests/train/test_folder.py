"""The run folder: one run at a time, and always the same one."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import yaml

from cobra.errors import CheckpointError
from cobra.train.folder import FREE_SETTINGS, check_run_folder, locked

from .runs import Fit, losses, rows


class TestOtherSettings:
    def test_are_refused_by_name(self, fit: Fit, finished: Path) -> None:
        with pytest.raises(CheckpointError) as caught:
            fit("train.max_steps=2", "train.betas=[0.5,0.9]", "model.llm.d_state=8")
        message = str(caught.value)
        assert "train.max_steps: 12 there, 2 asked for" in message and "\n" not in message
        assert "train.betas" in message and "model.llm.d_state: 16 there, 8 asked for" in message
        assert message.count(" there, ") == 3 and "resume=anyway goes on with the new settings" in message

    def test_are_listed_and_used_with_resume_anyway(
        self, fit: Fit, finished: Path, caplog: pytest.LogCaptureFixture, whole_run: Path
    ) -> None:
        changed = ["train.max_steps=14", "train.learning_rate=1e-4"]
        run = fit(*changed, "resume=anyway")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "with other settings" in warning and warning.count(" there, ") == 2
        assert "train.learning_rate: 0.002 there, 0.0001 asked for; train.max_steps: 12 there, 14 asked for" in warning
        assert len(losses(run)) == 14 and losses(run)[:12] == losses(whole_run)
        assert rows(run)[-1]["lr"] < 1e-4  # a cosine of the new rate over the new number of steps
        assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 14
        fit(*changed)  # these are the run's settings from now on
        with pytest.raises(CheckpointError, match="14 there, 12 asked for"):
            fit()

    def test_that_change_no_weight_may_differ(self, fit: Fit, finished: Path) -> None:
        free = ["train.save_every=7", "train.log_every=3", "train.num_workers=1", "data.check=decode"]
        fit(*free, "train.max_minutes=60")
        assert yaml.safe_load((finished / "config.yaml").read_text())["train"]["save_every"] == 4

    @pytest.mark.parametrize(
        ("override", "is_free"),
        [
            ("train.keep_checkpoints=9", True),
            ("train.keep_every=3", True),
            ("train.max_skipped_steps=1", True),
            ("train.profile=1", True),
            ("parallel.peak_tflops=3", True),
            ("parallel.processes=2", True),
            ("validation.every=1", True),
            ("tracker=wandb", True),
            ("data.images=elsewhere", True),
            ("data.index=elsewhere", True),
            ("parallel.precision=bf16", False),
            ("train.per_device_batch_size=2", False),
            ("train.max_grad_norm=3", False),
            ("data.rows_per_image=1", False),
            ("data.on_bad_example=skip", False),
            ("run.seed=1", False),
            ("train=lora", False),
        ],
    )
    def test_free_or_not(self, tiny_config, small_run: list[str], whole_run: Path, override: str, is_free) -> None:
        group = [override] if override.startswith("train=") else []  # a choice must not undo what is set in it
        config = tiny_config(*group, *small_run, *([] if group else [override]))
        if is_free:
            check_run_folder(whole_run, config)
        else:
            with pytest.raises(CheckpointError, match=rf"other settings \(.*{override.split('=')[0]}"):
                check_run_folder(whole_run, config)

    def test_share_of_a_data_set_is_not_free(self, tiny_config, small_run: list[str], tmp_path: Path) -> None:
        def config(weight: float, images: str = "there"):
            part = f"{{a: {{annotations: a.json, images: {images}, weight: {weight}}}}}"
            rest = [o for o in small_run if not o.startswith(("data.annotations", "data.images"))]
            return tiny_config(*rest, "data.annotations=null", "data.images=null", f"+data.mix={part}")

        from cobra.train.folder import write_config

        write_config(tmp_path, config(1.0))
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "latest").write_text("step-000001\n")
        check_run_folder(tmp_path, config(1.0, images="elsewhere"))
        with pytest.raises(CheckpointError, match=r"data\.mix\.a\.weight: 1\.0 there, 2\.0 asked for"):
            check_run_folder(tmp_path, config(2.0))

    def test_free_settings_exist(self, tiny_config, small_run: list[str]) -> None:
        """A misspelt name in the list would make its setting matter."""
        from cobra.config import as_dict, flatten

        known = [*flatten(as_dict(tiny_config(*small_run))), "data.mix.x", "validation.every"]
        assert [name for name in FREE_SETTINGS if not any(key.startswith(name) for key in known)] == []


class TestFinishedRun:
    def test_resume_never_refuses_it(self, fit: Fit, finished: Path) -> None:
        with pytest.raises(CheckpointError, match="resume=never"):
            fit("resume=never")

    def test_is_not_trained_over_without_checkpoints(self, fit: Fit, finished: Path) -> None:
        before = (finished / "model" / "model.safetensors").read_bytes()
        shutil.rmtree(finished / "checkpoints")
        for overrides in ([], ["train.max_steps=2"], ["resume=never"], ["resume=anyway"]):
            with pytest.raises(CheckpointError, match="holds a"):
                fit(*overrides)
        assert (finished / "model" / "model.safetensors").read_bytes() == before

    def test_other_rows_are_refused(self, fit: Fit, finished: Path, small_data) -> None:
        with pytest.raises(CheckpointError, match="trained on other rows"):
            fit(f"data.annotations={small_data.captions}")

    def test_goes_on_with_other_rows_if_it_may(self, fit: Fit, finished: Path, small_data, caplog) -> None:
        """The rows of the last checkpoint are the run's from then on."""
        other = [f"data.annotations={small_data.captions}", "train.max_steps=14"]
        run = fit(*other, "resume=anyway")
        assert len(losses(run)) == 14
        assert any("other rows" in r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
        fit(*other)
        with pytest.raises(CheckpointError, match="trained on other rows"):
            fit("train.max_steps=14")

    def test_unreadable_config_is_named(self, fit: Fit, finished: Path) -> None:
        (finished / "config.yaml").write_text("just text")
        with pytest.raises(CheckpointError, match="is not a config"):
            fit()
        (finished / "config.yaml").unlink()
        with pytest.raises(CheckpointError, match=r"no config\.yaml that says of what"):
            fit()


class TestLock:
    def test_second_run_is_refused_by_name(self, fit: Fit, finished: Path) -> None:
        with locked(finished), pytest.raises(CheckpointError, match="Another process trains in") as caught:
            fit()
        message = str(caught.value)
        assert str(finished) in message and "choose another run.name" in message and "\n" not in message
        fit()  # free again

    def test_is_released_by_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError), locked(tmp_path / "new"):
            raise RuntimeError
        with locked(tmp_path / "new"):
            pass
