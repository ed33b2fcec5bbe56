"""What weights of fewer bits cost and gain: bytes, tokens per second, and how far the answers move.

    python benchmarks/quantization.py                         # Mamba 130M shapes, random weights, on this device
    python benchmarks/quantization.py --model runs/tiny       # a run folder or released model, its own text
    python benchmarks/quantization.py --model runs/tiny --easy-vqa data/easy-vqa --rows 2000

Against the float32 weights: `KL` is the Kullback-Leibler divergence of the next token's distribution (mean and 99th
percentile, in nats, over every position of some prompts, after images if there is a benchmark), `same` the share of
positions whose likeliest token is the same, `accuracy` the benchmark's, on its first rows. `MB` is what one token reads: the language model without the
embedding's table. Ways take turns; tokens/s is from the median step of one row, `x` its multiple of float32.

`torchao` is that library's weight-only int8 (a scale per row) and int4 (groups of 64)
in our modules, where it is installed. Random weights have nothing to say: their KL orders ways, no more.
"""

# pyright: basic
import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cobra
from cobra.config import LLMConfig
from cobra.eval.benchmark import Question
from cobra.eval.benchmarks.easyvqa import EasyVQA
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaLM
from cobra.models.quantized import FORMATS, quantize_projections
from cobra.models.state import MambaState
from cobra.runtime import pick_device

MAMBA_130M = LLMConfig(d_model=768, num_layers=24, vocab_size=50277, tokenizer="", prompt="mamba")
PROMPTS = (
    "What is on the table?",
    "Describe the image specifically.",
    "What color is the circle in the picture?",
    "Is there a dog to the left of the bench? Answer with True or False.",
    "Please provide the bounding box coordinates of the region described by: the man in the red shirt",
    "What does the sign say? Answer the question using a single word or phrase.",
    "How many people are riding bicycles, and is it raining in the background of the photograph?",
)
BATCH_SIZE = 64
RUNS_PER_TURN = 4  # consecutive, as in real decoding, after one that does not count


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to hold the weights."""

    way: str
    megabytes: float
    tokens_per_second: float
    times_float32: float
    kl_mean: float
    kl_99: float
    same: float
    accuracy: float | None


def float32(llm: MambaLM) -> None:
    """As they are."""


def bfloat16(llm: MambaLM) -> None:
    cast_parameters(llm, torch.bfloat16)


def torchao(name: str) -> Callable[[MambaLM], None]:
    """Weight-only quantisation of the same projections."""

    def apply(llm: MambaLM) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

        llm.lm_head.weight = nn.Parameter(llm.lm_head.weight.detach().clone())
        config = Int8WeightOnlyConfig() if name == "int8" else IntxWeightOnlyConfig(torch.int4, PerGroup(64))
        wanted = ("in_proj", "x_proj", "out_proj", "lm_head")
        quantize_(llm, config, filter_fn=lambda module, path: path.split(".")[-1] in wanted)

    return apply


def all_ways() -> dict[str, Callable[[MambaLM], None]]:
    ways: dict[str, Callable[[MambaLM], None]] = {"float32": float32, "bfloat16": bfloat16}
    ways |= {name: lambda llm, name=name: quantize_projections(llm, name) for name in FORMATS}
    if importlib.util.find_spec("torchao"):
        ways |= {f"torchao {name}": torchao(name) for name in FORMATS}
    return ways


def bytes_per_token(llm: MambaLM) -> int:
    """Of everything that a step reads; the embedding's table only where it is the head's weight, too."""
    tensors = {id(tensor): tensor for tensor in (*llm.parameters(), *llm.buffers())}
    if getattr(llm.lm_head, "weight", None) is not llm.backbone.embedding.weight:
        tensors.pop(id(llm.backbone.embedding.weight))
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: Tensor) -> int:
    """Also of torchao's tensors, whose own count is of the numbers that they stand for."""
    names = getattr(tensor, "tensor_data_names", None)
    if names is None and hasattr(tensor, "__tensor_flatten__"):
        names = tensor.__tensor_flatten__()[0]
    return sum(_nbytes(getattr(tensor, name)) for name in names) if names else tensor.nbytes


@dataclass(frozen=True)
class Text:
    """Token ids to be predicted, after an image or from the start."""

    ids: list[int]
    prefix: MambaState | None = None


@torch.inference_mode()
def log_probabilities(llm: MambaLM, text: Text) -> Tensor:
    """Of the next token at every position: [positions, vocabulary]."""
    ids = torch.tensor([text.ids], device=llm.backbone.embedding.weight.device)
    prefix = text.prefix
    hidden, _ = llm(llm.embed(ids), state=prefix)
    return F.log_softmax(llm.head(hidden)[0, :, : llm.config.vocab_size].float(), dim=-1)


def difference(llm: MambaLM, texts: list[Text], expected: list[Tensor]) -> tuple[float, float, float]:
    """Mean and 99th percentile of the KL divergence in nats, share of positions with the same likeliest token."""
    divergences, same = [], []
    for text, before in zip(texts, expected, strict=True):
        after = log_probabilities(llm, text)
        divergences.append((before.exp() * (before - after)).sum(dim=-1))
        same.append(before.argmax(dim=-1) == after.argmax(dim=-1))
    all_of_them = torch.cat(divergences).clamp(min=0)
    return all_of_them.mean().item(), all_of_them.quantile(0.99).item(), torch.cat(same).float().mean().item()


def stepper(llm: MambaLM) -> Callable[[], Tensor]:
    """Decode one token of one row."""
    device = llm.backbone.embedding.weight.device
    _, state = llm(llm.embed(torch.zeros(1, 8, dtype=torch.int64, device=device)))
    token = torch.ones(1, dtype=torch.int64, device=device)
    return lambda: llm.head(llm.step(token, state)[0])


def take_turns(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for name, way in ways.items():
            way()
            for _ in range(RUNS_PER_TURN):
                start = time.perf_counter()
                way()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def accuracy(vlm: cobra.Cobra, questions: list[Question], benchmark: EasyVQA) -> float:
    """The benchmark's own score on these questions."""
    answers: list[str] = []
    for start in range(0, len(questions), BATCH_SIZE):
        part = questions[start : start + BATCH_SIZE]
        images, prompts = [question.image for question in part], [question.text for question in part]
        answers += vlm.generate(images, prompts, max_new_tokens=benchmark.max_new_tokens)
    scores = [benchmark.score_answer(a, q)[0] for a, q in zip(answers, questions, strict=True)]
    return statistics.mean(scores)


def texts_of(vlm: cobra.Cobra, questions: list[Question]) -> list[Text]:
    """Questions and their true answers after their images; without any, questions of the usual kinds alone."""
    if not questions:
        return [Text(vlm.tokenizer.encode(vlm.prompt.question(prompt))) for prompt in PROMPTS]
    return [
        Text(
            vlm.tokenizer.encode(vlm.prompt.question(question.text) + vlm.prompt.answer(question.truth)),
            vlm.encode_image(question.image).state,
        )
        for question in questions[:BATCH_SIZE]
    ]


def random_model() -> tuple[MambaLM, list[Text]]:
    generator = torch.Generator().manual_seed(0)
    llm = MambaLM(MAMBA_130M).requires_grad_(False).eval()
    llm.init_weights(generator)
    return llm, [Text(torch.randint(50_000, (32,), generator=generator).tolist()) for _ in range(8)]


def measure(options: argparse.Namespace) -> list[Row]:
    vlm, questions, benchmark = None, [], None
    if options.easy_vqa:
        benchmark = EasyVQA(folder=str(options.easy_vqa))
        questions = benchmark.questions()[: options.rows]
    if options.model:
        vlm = cobra.load(options.model, device=options.device)
        llm, texts = vlm.model.llm, texts_of(vlm, questions)
    else:
        llm, texts = random_model()
        llm.to(pick_device(options.device))
    expected = [log_probabilities(llm, text) for text in texts]
    models, found = {}, {}
    for name, convert in all_ways().items():
        models[name] = changed = copy.deepcopy(llm)
        convert(changed)
        right = None
        if vlm is not None and benchmark is not None:
            vlm.model.llm = changed
            right = accuracy(vlm, questions, benchmark)
            vlm.model.llm = llm
        found[name] = (*difference(changed, texts, expected), right)
        sys.stderr.write(f"{name}: done\n")
    seconds = take_turns({name: stepper(model) for name, model in models.items()}, options.seconds)
    return [
        Row(
            way=name,
            megabytes=bytes_per_token(model) / 1e6,
            tokens_per_second=1 / seconds[name],
            times_float32=seconds["float32"] / seconds[name],
            kl_mean=found[name][0],
            kl_99=found[name][1],
            same=found[name][2],
            accuracy=found[name][3],
        )
        for name, model in models.items()
    ]


def table(rows: list[Row]) -> str:
    lines = [f"{'way':14} {'MB':>8} {'tokens/s':>9} {'x':>5} {'KL':>9} {'KL 99 %':>9} {'same':>7} {'accuracy':>9}"]
    for row in rows:
        right = "" if row.accuracy is None else f"{100 * row.accuracy:8.2f}%"
        lines.append(
            f"{row.way:14} {row.megabytes:8.1f} {row.tokens_per_second:9.1f} {row.times_float32:5.2f} "
            f"{row.kl_mean:9.2e} {row.kl_99:9.2e} {100 * row.same:6.2f}% {right:>9}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what cobra.load takes; random weights of Mamba 130M by default")
    parser.add_argument("--device", default="cpu", help="of all ways")
    parser.add_argument("--easy-vqa", type=Path, help="this benchmark's folder, made where it is not there")
    parser.add_argument("--rows", type=int, default=1000, help="questions of the benchmark")
    parser.add_argument("--threads", type=int, help="threads; PyTorch's choice by default")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, all ways together")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.easy_vqa and not options.model:
        parser.error("--easy-vqa needs a --model that can answer")
    with torch.inference_mode():
        rows = measure(options)
    sys.stdout.write(f"{torch.get_num_threads()} threads\n{table(rows)}\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
