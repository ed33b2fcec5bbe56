"""The ablation: numbers against their definitions, verdicts, what is missing, and what `make ablation` runs."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, variance

import hydra
import numpy as np
import pytest
from PIL import Image

from cobra.config import PretrainConfig, as_config
from cobra.errors import DataError
from cobra.eval import ablation_report
from cobra.eval.ablation import ROWS, Estimate, mean_of, paper_sum, read
from cobra.eval.rules.intervals import central_95, redrawn, with_seeds

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
COLUMNS = {"pope": {"POPE": "all"}, "refcoco": {"RefCOCO": "RefCOCO", "RefCOCO+": "RefCOCO+", "RefCOCOg": "RefCOCOg"}}
SEVEN = ("vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco")
NAMES = {"vqav2": "VQA-v2", "gqa": "GQA", "vizwiz": "VizWiz", "textvqa": "TextVQA", "vsr": "VSR"}

Score = Callable[[int], float]  # of a question


def evaluate(
    results: Path, seed: int, row: str, score: Score, benchmarks: tuple[str, ...] = ("vsr",), questions: int = 40
) -> Path:
    """Write evaluations of `questions` questions about half as many images, as scripts/evaluate.py does."""
    for name in benchmarks:
        columns = COLUMNS.get(name, {NAMES.get(name, name): ""})
        parts = ["random", "popular"] if name == "pope" else list(columns.values())
        folder = results / f"seed-{seed}" / name / row
        folder.mkdir(parents=True)
        lines = [
            {"question_id": f"{part}/{i}", "official": score(i), "paper": 0.0, "image": f"{name}-{i // 2}.png",
             "part": part, "counts": True}
            for part in parts
            for i in range(questions)
        ]  # fmt: skip
        (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "results.json").write_text(json.dumps({"columns": {c: {"part": p} for c, p in columns.items()}}))
    return results


def first(count: int) -> Score:
    return lambda i: float(i < count)


def test_numbers_equal_their_definitions(tmp_path: Path) -> None:
    """Two rows, of three seeds and of two: mean, variance over all seeds, interval of the paired differences."""
    right = {"tiny-full": (30, 32, 37), "tiny-siglip": (10, 14)}
    for row, counts in right.items():
        for seed, count in enumerate(counts):
            evaluate(tmp_path, seed, row, first(count))
    ablation = read(tmp_path, "official")
    assert ablation.seeds == ["0", "1", "2"]
    found = ablation.difference("tiny-siglip", {"VSR": 1})
    percents = {row: [100 * count / 40 for count in counts] for row, counts in right.items()}
    spread = (2 * variance(percents["tiny-full"]) + variance(percents["tiny-siglip"])) / 3
    assert ablation.spread({"VSR": 1}) == (pytest.approx(spread), 3)
    assert found is not None and found.ours == pytest.approx(
        fmean(percents["tiny-siglip"]) - fmean(percents["tiny-full"])
    )
    assert found.paper == pytest.approx(53.2 - 58.4)

    rng = np.random.default_rng(5)  # other draws than ours
    scores = {row: np.mean([[i < n for i in range(40)] for n in counts], axis=0) for row, counts in right.items()}
    per_image = (scores["tiny-siglip"] - scores["tiny-full"]).reshape(20, 2).mean(axis=1)
    images = 100 * per_image[rng.integers(20, size=(40_000, 20))].mean(axis=1)
    seeds = rng.standard_t(3, 40_000) * np.sqrt(spread * (1 / 3 + 1 / 2))
    assert found.interval_95 == pytest.approx(np.percentile(images + seeds, [2.5, 97.5]).tolist(), abs=1.5)
    narrower = np.percentile(images, [2.5, 97.5])
    assert found.interval_95[1] - found.interval_95[0] > 1.2 * (narrower[1] - narrower[0])


def test_accuracy_is_the_mean_of_parts_and_of_columns(tmp_path: Path) -> None:
    evaluate(tmp_path, 0, "tiny-full", first(30), ("pope", "vsr"))
    file = tmp_path / "seed-0" / "pope" / "tiny-full" / "scores.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [line for line in lines if line["part"] == "random" or line["question_id"] in ("popular/0", "popular/35")]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept))  # 75 % of 40 and 50 % of 2
    found = read(tmp_path, "official").accuracy("tiny-full", mean_of(["POPE", "VSR"]))
    assert found is not None and found.ours == pytest.approx(((75 + 50) / 2 + 75) / 2)
    assert found.paper == pytest.approx((88.4 + 58.4) / 2) and found.interval_95[1] <= 100


def test_interval_is_of_the_seeds_that_the_number_is_of(tmp_path: Path) -> None:
    """A second seed of which one benchmark is evaluated so far: no part of a mean over benchmarks."""
    for row in ("tiny-full", "tiny-siglip"):
        evaluate(tmp_path, 0, row, first(30), ("vsr", "pope"))
    evaluate(tmp_path, 1, "tiny-siglip", first(0), ("vsr",))
    ablation = read(tmp_path, "official")
    found = ablation.difference("tiny-siglip", mean_of(["VSR", "POPE"]))
    assert found is not None and (found.ours, *found.interval_95) == pytest.approx((0, 0, 0))
    alone = ablation.difference("tiny-siglip", {"VSR": 1})
    assert alone is not None and alone.ours == pytest.approx(-37.5)
    text = " ".join(ablation_report.report(ablation).split())
    assert "with 0 to 1 degrees of freedom, by column: barely known" in text and "No row has two seeds" not in text


def test_rows_that_answer_alike_differ_by_nothing(tmp_path: Path) -> None:
    """Differences are paired: what the questions do to both rows is not in the interval."""
    for row in ("tiny-full", "tiny-ldpv2"):
        evaluate(tmp_path, 0, row, first(17))
    ablation = read(tmp_path, "official")
    found, accuracy = ablation.difference("tiny-ldpv2", {"VSR": 1}), ablation.accuracy("tiny-full", {"VSR": 1})
    assert found is not None and (found.ours, *found.interval_95) == pytest.approx((0, 0, 0))
    assert accuracy is not None and accuracy.interval_95[1] - accuracy.interval_95[0] > 20
    assert found.verdict == "does not appear"  # the paper's is -2.3


def test_interval_holds_the_truth_with_two_seeds() -> None:
    """Six rows that are equally good, whose seeds differ: of many made-up ablations, 95 % of the intervals hold 0."""
    rng, times = np.random.default_rng(0), 200
    chance = 0.5 + rng.normal(0, 0.15, (times, 6, 2, 1)) + rng.normal(0, 0.12, (times, 1, 1, 40))
    right = (rng.random((times, 6, 2, 40)) < chance).astype(float)
    means = 100 * redrawn(right[:, :2].reshape(-1, 40).tolist(), range(40), [""] * 40).reshape(-1, times, 2, 2)
    spread = (100 * right.mean(axis=3)).var(axis=2, ddof=1).mean(axis=1)  # of each ablation's rows
    differences = means[:, :, 1] - means[:, :, 0]
    held = redrawn_seeds = 0
    for i in range(times):
        low, high = central_95(with_seeds(differences[:, i].mean(axis=1), spread[i], 6))
        held += low <= 0 <= high
        drawn = rng.integers(2, size=(len(means), 2))  # two of the two seeds, as images are drawn
        low, high = central_95(np.take_along_axis(differences[:, i], drawn, axis=1).mean(axis=1))
        redrawn_seeds += low <= 0 <= high
    assert held >= 0.94 * times > 0.9 * times > redrawn_seeds


@pytest.mark.parametrize(
    ("low", "high", "paper", "verdict"),
    [
        (-9, -1, -3, "appears"), (1, 9, 3, "appears"), (1, 9, -3, "the opposite appears"),
        (-2, 4, -3, "does not appear"), (-4, 2, -3, "cannot be told"), (-4, 2, 3, "does not appear"),
    ],
)  # fmt: skip
def test_verdict_follows_from_the_interval(low: float, high: float, paper: float, verdict: str) -> None:
    assert Estimate(ours=(low + high) / 2, interval_95=(low, high), paper=paper).verdict == verdict


def test_paper_numbers_are_those_of_its_ablation_table() -> None:
    assert paper_sum({"tiny-ldpv2": 1, "tiny-full": -1}, {"RefCOCOg": 1}) == pytest.approx(46.9 - 48.9)
    assert paper_sum({"tiny-base": 1, "tiny-full": -1}, {"VQA-v2": 1}) == 0
    for claim in ablation_report.CLAIMS:  # each is what the paper's numbers say: worse
        for row in claim.rows:
            for columns in claim.columns:
                assert paper_sum({row: 1, claim.against: -1}, columns) < 0, claim.text


def test_findings_are_those_of_the_evaluations(tmp_path: Path) -> None:
    """All rows, two seeds: one epoch is far worse everywhere, LDPv2 better, others alike."""
    right = dict.fromkeys(ROWS, 60) | {"tiny-one-epoch": 20, "tiny-ldpv2": 90}
    for row, count in right.items():
        for seed in range(2):
            evaluate(tmp_path, seed, row, first(count + seed), SEVEN, questions=100)
    ablation = read(tmp_path, "official")
    verdicts = {found.text: found.verdict for found in ablation_report.find(ablation)}
    assert verdicts["One epoch is worse in every column"] == "appears"
    assert verdicts["LDPv2 is worse on TextVQA"] == "the opposite appears"
    assert verdicts["SigLIP alone is worse on VSR"] == "does not appear"
    assert verdicts["Each change makes the mean of all columns worse"] == "does not appear"
    assert verdicts["PT+FT is worse than one epoch (mean)"] == "the opposite appears"
    assert verdicts["One epoch costs more on RefCOCO, + and g (mean) than elsewhere"] != "appears"
    text = ablation_report.report(ablation)
    assert "**-40.0** (" in text and "*-14.6*" in text and "Not there" not in text
    assert "with 6 degrees of freedom: barely known" in " ".join(text.split())

    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n{ablation_report.BEGIN}\nRESULTS OF BEFORE\n{ablation_report.END}\n\nThe end.\n")
    ablation_report.update_page(page, ablation)
    content = page.read_text()
    assert content.startswith("# A page\n") and content.endswith("\n\nThe end.\n") and "BEFORE" not in content
    assert content.count(text) == 1
    with Image.open(tmp_path / "ablation.png") as image:
        assert image.width == 1200


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / "ablation.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_script_shows_what_is_missing(tmp_path: Path) -> None:
    results = evaluate(tmp_path / "results", 0, "tiny-full", first(30), ("vsr", "pope"))
    evaluate(results, 1, "tiny-base", first(10))
    half = results / "seed-1" / "vsr" / "tiny-full"
    half.mkdir()
    (half / "predictions.jsonl").touch()  # not finished
    done = run_script("--results", results, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "No row has two seeds" in done.stdout and "| w/ LDPv2 | none |" in done.stdout
    words = " ".join(done.stdout.split())
    assert "full, seed 0: VQA-v2, GQA, VizWiz, TextVQA, RefCOCO, RefCOCO+, RefCOCOg; full, seed 1: all" in words
    assert "One epoch is worse in every column: not evaluated yet." in done.stdout
    data = json.loads((tmp_path / "out" / "ablation.json").read_text())
    base = data["rows"]["tiny-base"]
    assert base["by_seed"] == {"1": {"VSR": 25.0}} and base["columns"]["VSR"]["difference"]["ours"] == -50
    assert base["columns"]["VSR"]["difference"]["verdict"] == "appears" and "POPE" not in base["columns"]
    assert data["rows"]["tiny-ldpv2"]["columns"] == {}
    with Image.open(tmp_path / "out" / "ablation.png") as image:
        image.load()


def test_errors_are_kind(tmp_path: Path) -> None:
    done = run_script("--results", tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has no finished evaluation" in done.stderr and "`make ablation`" in done.stderr
    results = evaluate(tmp_path / "results", 0, "tiny-full", first(3))
    other = evaluate(results, 0, "tiny-base", first(3)) / "seed-0" / "vsr" / "tiny-base" / "scores.jsonl"
    lines = other.read_text()
    other.write_text(lines.replace("vsr-0", "vsr-a"))
    with pytest.raises(DataError, match=r"tiny-full of seed 0 saw vsr-0\.png, tiny-base of seed 0 saw vsr-a\.png"):
        read(results, "official")
    other.write_text(lines.replace('"/', '"b/'))
    with pytest.raises(DataError, match="no question was answered by all rows"):
        read(results, "official")
    other.write_text(lines)
    with pytest.raises(DataError, match=r"no page with the marks <!-- begin"):
        ablation_report.update_page(tmp_path / "page.md", read(results, "official"))


def make(folder: Path, python: str, *arguments: str) -> tuple[int, list[list[str]]]:
    """Run `make ablation` with another program in Python's place; return the commands that it was asked to run."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$*" >> "{folder}/log"\n{python}\n')
    program.chmod(0o755)
    command = ["make", "-o", ".venv/user", "ablation", f"BIN={folder}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return done.returncode, [shlex.split(line) for line in (folder / "log").read_text().splitlines()]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_ablation_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from _command_line import renamed

    code, commands = make(tmp_path, "exit 0", "SEEDS=4 7")
    assert code == 0 and commands.pop() == ["scripts/ablation.py"]
    commands, others = commands[: len(commands) // 2], commands[len(commands) // 2 :]
    assert others == [
        [word.replace("seed=4", "seed=7").replace("seed-4", "seed-7") for word in one] for one in commands
    ]
    trained: list[str] = []
    for script, *overrides in commands:
        if script == "scripts/pretrain.py":
            with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
                cfg = hydra.compose("pretrain", overrides=overrides)
            config = as_config(PretrainConfig, cfg)
            trained.append(f"{cfg.paths.runs}/{config.run.name}")
            name = overrides[0].removeprefix("+experiment=")
            assert config.run.seed == 4 and trained[-1] == f"runs/ablation/seed-4/{name}"
            assert config.init_from in (None, *trained)
        else:
            rest = [f"model={trained[-1]}", "paths.results=results/ablation/seed-4"]
            assert [script, *overrides] == ["scripts/evaluate.py", "benchmark=all", "data_root=data/toy", *rest]
    overrides = [renamed(renamed(word, "model", "load"), "data_root", "paths.data") for word in overrides[1:]]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        hydra.compose("evaluate", overrides=["benchmark=vsr", *overrides])
    wanted = {*ROWS, "tiny-align"}
    assert {Path(folder).name for folder in trained} == wanted and len(trained) == len(wanted)
    assert len(commands) == len(trained) + len(ROWS)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_ablation_stops_at_an_error(tmp_path: Path) -> None:
    code, commands = make(tmp_path, 'case "$1" in *evaluate*) exit 3;; esac', "SEEDS=0")
    assert code != 0 and [Path(command[0]).stem for command in commands] == ["pretrain", "evaluate"]
