"""Questions per second of the evaluation engine, against the same questions asked one by one.

    python benchmarks/evaluation.py                                       # runs/tiny on the CPU
    python benchmarks/evaluation.py --model shapes:cobra-3b --dtype bfloat16  # random weights, on a GPU
    python benchmarks/evaluation.py --answers 2000                        # more questions whose answers are compared

`engine` is what `scripts/evaluate.py` does: an image is read once, its questions continue from its state, in batches,
answers written to disk. `one by one` is a loop over `cobra.generate` and `cobra.score` with an image's path, on some
of the questions. Images are JPEG, 640 x 480, made up. The loads have as many questions per image as the benchmarks they
are named after; the questions are easy-VQA's, so that runs/tiny answers in a few tokens. With `shapes:` the model has
random weights and would never end, so answers have as many tokens as `--new-tokens` says.
`same` is the share of equal texts; of probabilities, of equal likeliest words. `ahead` is how far, of the answers that
differ, the model's first choice was ahead of its second where the texts part: a tie when it is about the rounding error
of a sum (in logits; the largest of all of them). `all nine` is the time for the questions and images of the nine
benchmarks at the engine's speed.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from PIL import Image

import cobra
from cobra.config import PretrainConfig, as_config
from cobra.data.scenes import COLORS, SHAPES, random_scene
from cobra.describe import build_on_meta
from cobra.describe.flops import blocks_flops
from cobra.describe.meta import trace_image
from cobra.eval import engine
from cobra.eval.benchmark import Benchmark, Choices, FreeText, Prediction, Question
from cobra.eval.store import AnswerStore
from cobra.generation.engine import prefill
from cobra.models.build import cast_parameters
from cobra.models.vlm import CobraVLM
from cobra.models.weights import self_contained
from cobra.runtime import pick_device
from cobra.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]

# Questions per image; whether words are compared; questions and images of the benchmark (facts of docs/benchmarks.md).
LOADS = {
    "GQA": (31, False),
    "POPE": (18, True),
    "VQA-v2": (5, False),
    "RefCOCO": (7, False),
    "VizWiz": (1, False),
}
PARTS = {  # questions, images, and the load whose speed counts
    "vqav2": (214_354, 40_504, "VQA-v2"),
    "gqa": (12_578, 398, "GQA"),
    "vizwiz": (4_319, 4_319, "VizWiz"),
    "textvqa": (3 * 5_000, 3_166, "VQA-v2"),
    "vsr": (1_222, 715, "VizWiz"),
    "pope": (9_000, 500, "POPE"),
    "refcoco": (10_834 + 10_758 + 4_896, 4_500, "RefCOCO"),
}
WORDS = ("Yes", "No")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One load. Speeds in questions per second."""

    load: str
    per_image: int
    questions: int
    engine: float
    one_by_one: float
    ratio: float
    compared: int
    same: float  # percent
    ahead: float  # logits; 0 when all are the same


class Made(Benchmark):
    """Made-up questions about made-up images."""

    def __init__(self, name: str, questions: Sequence[Question]) -> None:
        self.name, self._questions = name, list(questions)

    def questions(self) -> list[Question]:
        """All of them."""
        return self._questions

    def score_answer(self, prediction: Prediction, question: Question) -> tuple[float, ...]:
        """Nothing is scored."""
        return (0.0, 0.0)


def make_images(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of 640 x 480: a scene in front of noise, which costs a decoder as much as a photograph."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:06d}.jpg" for i in range(count)]
    for path in paths:
        scene = np.asarray(random_scene(rng, 64).image().resize((640, 480)), dtype=np.int16)
        noise = rng.normal(0, 12, scene.shape).astype(np.int16)
        Image.fromarray((scene + noise).clip(0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def make_questions(images: Sequence[Path], per_image: int, kind: FreeText | Choices) -> list[Question]:
    """easy-VQA's ways of asking."""
    texts = ["what shape is in the image?", "what color is the shape?", "what is the color of the object?"]
    for names, noun in ((SHAPES, ""), (tuple(COLORS), " shape")):
        for name in names:
            texts += [f"is there a {name}{noun}?", f"is there not a {name}{noun} in the image?"]
            texts += [f"does the image contain a {name}{noun}?"]
    return [
        Question(id=f"{image.stem}/{i}", image=image, text=texts[i % len(texts)], answer=kind, truth="")
        for image in images
        for i in range(per_image)
    ]


def one_by_one(model: cobra.Cobra, questions: Sequence[Question]) -> dict[str, Prediction]:
    """Ask as a loop over the public calls does."""
    answers: dict[str, Prediction] = {}
    for question in questions:
        kind = question.answer
        if isinstance(kind, Choices):
            answers[question.id] = dict(
                zip(kind.words, model.score(question.image, question.text, kind.words), strict=True)
            )
        else:
            answers[question.id] = model.generate(question.image, question.text, max_new_tokens=kind.max_new_tokens)
    return answers


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def shapes(name: str, device: str, dtype: str) -> cobra.Cobra:
    """A model of `configs/model/<name>.yaml` with random weights, and the tiny tokenizer."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = as_config(PretrainConfig, hydra.compose("pretrain", overrides=[f"model={name}"])).model
    tokenizer = ROOT / "cobra" / "assets" / "tiny" / "tokenizer.json"
    torch.manual_seed(0)
    with torch.device(device):
        model = CobraVLM(self_contained(config))
        model.projector.init_weights()
        model.llm.init_weights()
    cast_parameters(model, getattr(torch, dtype))
    return cobra.Cobra(model.requires_grad_(False), Tokenizer(tokenizer), name)


def floor_seconds(model: cobra.Cobra, images: int, tokens: int, peak_tflops: float) -> float:
    """Seconds that the matrix products and scans of reading images and text tokens take at a device's peak."""
    trace = trace_image(build_on_meta(model.model.config))
    llm = model.model.config.llm
    read = sum(tower.matmul + tower.attention for tower in trace.vision) + trace.projector.matmul
    flops = images * (read + trace.tokens * blocks_flops(llm)) + tokens * blocks_flops(llm)
    return flops / (peak_tflops * 1e12)


def measure(model: cobra.Cobra, load: str, images: Sequence[Path], options: argparse.Namespace) -> Row:
    """Ask the load by the engine, and some of it one by one."""
    per_image, compares_words = LOADS[load]
    kind = Choices(words=WORDS) if compares_words else FreeText(max_new_tokens=options.new_tokens)
    count = max(1, min(len(images), -(-options.questions // per_image)))
    questions = make_questions(images[:count], per_image, kind)
    rng = np.random.default_rng(0)
    chosen = [questions[i] for i in sorted(rng.permutation(len(questions))[: options.answers].tolist())]
    warm = questions[: per_image + 1]
    one_by_one(model, warm[:3])
    with tempfile.TemporaryDirectory() as folder:
        for name, asked in (("warm", warm), ("all", questions)):
            benchmark = Made(load, asked)
            store = AnswerStore(Path(folder) / name, {}, benchmark, asked)
            seconds, _ = timed(lambda a=asked, s=store: engine.ask(engine.Engine(model, options.batch_size), a, s))
            store.close()
    alone_seconds, alone = timed(lambda: one_by_one(model, chosen))
    differing = [question for question in chosen if said(alone[question.id]) != said(store.answers[question.id])]
    engine_speed, alone_speed = len(questions) / seconds, len(chosen) / alone_seconds
    return Row(
        load=load,
        per_image=per_image,
        questions=len(questions),
        engine=engine_speed,
        one_by_one=alone_speed,
        ratio=engine_speed / alone_speed,
        compared=len(chosen),
        same=100 * (1 - len(differing) / len(chosen)),
        ahead=max((lead(model, question, alone[question.id], store.answers[question.id]) for question in differing),
                  default=0.0),
    )  # fmt: skip


def said(prediction: Prediction) -> str:
    """The text, or the likeliest word."""
    return prediction if isinstance(prediction, str) else max(prediction, key=lambda word: prediction[word])


def lead(model: cobra.Cobra, question: Question, one: Prediction, other: Prediction) -> float:
    """How far apart, in logits, the two best tokens are where two answers to a question part."""
    ids = [model.tokenizer.encode(model.prompt.question(question.text))]
    if isinstance(one, str) and isinstance(other, str):
        answers = [[*model.tokenizer.encode(text), model.tokenizer.end_id] for text in (one, other)]
        parts = next(i for i, (a, b) in enumerate(zip(*answers, strict=False)) if a != b)
        ids[0] += answers[0][:parts]
    with torch.inference_mode():
        logits, _ = prefill(model.model.llm, ids, model.encode_image(question.image).state)
    best, second = logits[0].float().topk(2).values.tolist()
    return best - second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/tiny", help="what cobra.load takes, or shapes:NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--questions", type=int, default=2000, help="of each load, for the engine")
    parser.add_argument("--answers", type=int, default=200, help="of each load, one by one")
    parser.add_argument("--batch-size", type=int, help="of the engine; without it, what the model says")
    parser.add_argument("--new-tokens", type=int, default=8, help="limit of an answer")
    parser.add_argument("--peak-tflops", type=float, help="of the device: adds the floor of the GQA load")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    device = str(pick_device(options.device))
    is_shapes = options.model.startswith("shapes:")
    if is_shapes:
        model = shapes(options.model.removeprefix("shapes:"), device, options.dtype)
    else:
        model = cobra.load(options.model, device=device, dtype=options.dtype)
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    print(f"{options.model} on {device} ({machine}, {torch.get_num_threads()} threads), {options.dtype}")
    print(f"{'load':8} {'per image':>9} {'questions':>9} {'engine/s':>9} {'one by one/s':>12} {'ratio':>6} "
          f"{'compared':>8} {'same':>8} {'ahead':>8}")  # fmt: skip
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory() as name:
        needed = max(-(-options.questions // LOADS[load][0]) for load in options.loads)
        images = make_images(Path(name), needed)
        for load in options.loads:
            row = rows[load] = measure(model, load, images, options)
            print(f"{row.load:8} {row.per_image:9} {row.questions:9,} {row.engine:9.1f} {row.one_by_one:12.1f} "
                  f"{row.ratio:5.1f}x {row.compared:8,} {row.same:7.2f}% {row.ahead:8.1e}", flush=True)  # fmt: skip
    if set(rows) == set(LOADS):
        seconds = sum(questions / rows[load].engine for questions, _, load in PARTS.values())
        print(f"all nine: {sum(part[0] for part in PARTS.values()):,} questions in {seconds / 60:.1f} min")
    if options.peak_tflops and "GQA" in rows:
        row = rows["GQA"]
        tokens = row.questions * (20 + (options.new_tokens if is_shapes else 2))
        floor = floor_seconds(model, row.questions // row.per_image, tokens, options.peak_tflops)
        print(f"GQA: {100 * floor * row.engine / row.questions:.1f} % of the peak of {options.peak_tflops:g} TFLOP/s")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows.values()], indent=1) + "\n")


if __name__ == "__main__":
    main()
