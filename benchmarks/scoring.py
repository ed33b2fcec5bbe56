"""Time and memory of scoring all of VQA-v2's validation set: `scripts/score.py` on one core.

    python benchmarks/scoring.py                     # 214,354 questions: under 30 s and 2 GB
    python benchmarks/scoring.py --questions 20000

The files are made up, in the official format and size: 10 answers a question out of 30,000 (as unequal as words are),
one prediction in five with capitals, punctuation or articles. The process is kept on one core, and everything counts:
the start, reading, both rules, intervals, scores.jsonl.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_QUESTIONS, NUM_IMAGES, NUM_TYPES = 214_354, 40_504, 65
LIMITS = {"seconds": 30, "megabytes": 2000}
WRAPPINGS = ("The {}.", "{}!", "a {}, I think", "{} ", "{}-{}")


def make_files(folder: Path, count: int) -> None:
    """Write questions, annotations and predictions."""
    rng = random.Random(0)
    words = ["yes", "no", "2", "1,000", "don't", *(f"word{i} of{i % 97}" for i in range(30_000))]
    weights = list(accumulate(1 / (i + 1) for i in range(len(words))))
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    rows: list[str] = []
    for i in range(count):
        image = i % NUM_IMAGES + 1
        number = image * 1000 + i // NUM_IMAGES
        common = rng.choices(words, cum_weights=weights, k=3)
        answers = [common[min(2, int(rng.expovariate(1.5)))] for _ in range(10)]
        questions.append({"image_id": image, "question": "What is on the wooden table?", "question_id": number})
        annotations.append(
            {
                "question_type": f"what is number {i % NUM_TYPES}",
                "multiple_choice_answer": answers[0],
                "answers": [
                    {"answer": answer, "answer_confidence": "maybe", "answer_id": j + 1}
                    for j, answer in enumerate(answers)
                ],
                "image_id": image,
                "answer_type": ("yes/no", "number", "other")[i % 3],
                "question_id": number,
            }
        )
        prediction = rng.choice(answers)
        prediction = rng.choice(WRAPPINGS).format(prediction, i) if rng.random() < 0.2 else prediction
        rows.append(json.dumps({"question_id": number, "prediction": prediction}))
    data = folder / "vqa-v2"
    data.mkdir()
    (data / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (data / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    (folder / "predictions.jsonl").write_text("\n".join(rows) + "\n")


def measure(folder: Path) -> dict[str, Any]:
    """Run the script on one core of those that this process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    arguments = ["benchmark=vqav2", f"data_root={folder}", f"predictions={folder / 'predictions.jsonl'}"]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "score.py"), *arguments, f"output={folder / 'scores'}"],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit("The script failed.")
    seconds = time.perf_counter() - started
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(seconds, 1), "megabytes": round(peak / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    count = parser.parse_args().questions
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name), count)
        result = measure(Path(name))
    for what, value in result.items():
        print(f"{what:10} {value:8}   limit {LIMITS[what]}   {'met' if value < LIMITS[what] else 'MISSED'}")
    print(json.dumps({"questions": count} | result))


if __name__ == "__main__":
    main()
