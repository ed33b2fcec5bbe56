"""What weights of fewer bits cost and gain: bytes, tokens per second, and how far the answers move.

    python benchmarks/quantization.py                         # Mamba 130M shapes, random weights, on this device
    python benchmarks/quantization.py --model runs/tiny       # a run folder or released model, its own text
    python benchmarks/quantization.py --model runs/tiny --easy-vqa data/easy-vqa --rows 2000

Against the float32 weights: `KL` is the Kullback-Leibler divergence of the next token's distribution (mean and 99th
percentile, in nats, over every position of some prompts, which follow images if there is a benchmark), `same` the share
of positions whose likeliest token is the same, `accuracy` the benchmark's on its first rows. `MB` is what one token
reads: the language model without the embedding's table. tokens/s is from the median step of one row, on a GPU a CUDA
graph as in generation; ways take turns; `x` is the multiple of float32.

`torchao` is that library's weight-only int8 (a scale per row) and int4 (groups of 64) in our modules, where it is
installed. Random weights have nothing to say: their KL orders ways, no more.
"""

# pyright: basic
from __future__ import annotations

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
from typing import Any

import torch
import torch.nn.functional as F
from step_cases import as_graph
from torch import Tensor, nn

import cobra
from cobra.config import QUANTIZED, LLMConfig
from cobra.eval.benchmark import Question
from cobra.eval.benchmarks.easyvqa import EasyVQA
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaLM
from cobra.models.quantized import quantize_projections
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
        from torchao.quantization import (  # type: ignore[import-not-found]
            Int8WeightOnlyConfig,
            IntxWeightOnlyConfig,
            PerGroup,
            quantize_,
        )

        llm.lm_head.weight = nn.Parameter(llm.lm_head.weight.detach().clone())
        int4: Any = torch.int4  # type: ignore[attr-defined]
        config = Int8WeightOnlyConfig() if name == "int8" else IntxWeightOnlyConfig(int4, PerGroup(64))
        wanted = ("in_proj", "x_proj", "out_proj", "lm_head")
        quantize_(llm, config, filter_fn=lambda module, path: path.split(".")[-1] in wanted)

    return apply


def all_ways() -> dict[str, Callable[[MambaLM], None]]:
    ways: dict[str, Callable[[MambaLM], None]] = {"float32": float32, "bfloat16": bfloat16}
    ways |= {name: lambda llm, name=name: quantize_projections(llm, name) for name in QUANTIZED}
    if importlib.util.find_spec("torchao"):
        ways |= {f"torchao {name}": torchao(name) for name in QUANTIZED}
    return ways


def bytes_per_token(llm: MambaLM) -> int:
    """Of everything that a step reads; the embedding's table only where it is the head's weight, too."""
    tensors = {id(tensor): tensor for tensor in (*llm.parameters(), *llm.buffers())}
    if getattr(llm.lm_head, "weight", None) is not llm.backbone.embedding.weight:
        tensors.pop(id(llm.backbone.embedding.weight))
    return sum(_nbytes(tensor) for tensor in tensors.values())


def _nbytes(tensor: Any) -> int:
    """Also of torchao's tensors, whose own count is of the numbers that they stand for."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return sum(_nbytes(getattr(tensor, name)) for name in names) if names else tensor.nbytes


@dataclass(frozen=True)
class Subject:
    """What is measured: a language model, that of a whole model where there is one, and what both are to read."""

    llm: MambaLM
    vlm: cobra.Cobra | None
    texts: list[list[int]]
    questions: list[Question]

    def changed(self, convert: Callable[[MambaLM], None]) -> Subject:
        """A copy with other weights; encoders and projector keep theirs, cast to the language model's dtype."""
        if self.vlm is None:
            llm = copy.deepcopy(self.llm)
            convert(llm)
            return Subject(llm, None, self.texts, self.questions)
        model = copy.deepcopy(self.vlm.model)
        convert(model.llm)
        for part in (model.vision, model.projector):
            cast_parameters(part, model.llm.backbone.embedding.weight.dtype)
        vlm = cobra.Cobra(model, self.vlm.tokenizer, self.vlm.name)
        return Subject(model.llm, vlm, self.texts, self.questions)

    def log_probabilities(self) -> list[Tensor]:
        """Of the next token at every position of every text: [positions, vocabulary]."""
        prefixes = [None] * len(self.texts)
        if self.vlm is not None and self.questions:
            images = self.vlm.encode_image([question.image for question in self.questions[: len(self.texts)]])
            prefixes = [images[i].state for i in range(len(images))]
        rows = []
        for text, prefix in zip(self.texts, prefixes, strict=True):
            ids = torch.tensor([text], device=self.llm.backbone.embedding.weight.device)
            hidden, _ = self.llm(self.llm.embed(ids), state=prefix)
            logits = self.llm.head(hidden)[0, :, : self.llm.config.vocab_size]
            rows.append(F.log_softmax(logits.float(), dim=-1))
        return rows

    def accuracy(self, benchmark: EasyVQA | None) -> float | None:
        """The benchmark's own score on the questions."""
        if benchmark is None or self.vlm is None:
            return None
        answers: list[str] = []
        for start in range(0, len(self.questions), BATCH_SIZE):
            part = self.questions[start : start + BATCH_SIZE]
            images, prompts = [question.image for question in part], [question.text for question in part]
            answers += self.vlm.generate(images, prompts, max_new_tokens=benchmark.max_new_tokens)
        return statistics.mean(benchmark.score_answer(a, q)[0] for a, q in zip(answers, self.questions, strict=True))


def difference(before: list[Tensor], after: list[Tensor]) -> tuple[float, float, float]:
    """Mean and 99th percentile of the KL divergence in nats, share of positions with the same likeliest token."""
    p, q = torch.cat(before), torch.cat(after)
    divergences = (p.exp() * (p - q)).sum(dim=-1).clamp(min=0)
    same = p.argmax(dim=-1) == q.argmax(dim=-1)
    return divergences.mean().item(), divergences.quantile(0.99).item(), same.float().mean().item()


def stepper(llm: MambaLM) -> Callable[[], object]:
    """Decode one token of one row."""
    device = llm.backbone.embedding.weight.device
    _, state = llm(llm.embed(torch.zeros(1, 8, dtype=torch.int64, device=device)))
    token = torch.ones(1, dtype=torch.int64, device=device)

    def step() -> tuple[Tensor]:
        return (llm.head(llm.step(token, state)[0]),)

    return as_graph(step) if device.type == "cuda" else step


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


def random_subject(device: torch.device) -> Subject:
    generator = torch.Generator().manual_seed(0)
    llm = MambaLM(MAMBA_130M).requires_grad_(False).eval()
    llm.init_weights(generator)
    texts = [torch.randint(50_000, (32,), generator=generator).tolist() for _ in range(8)]
    return Subject(llm.to(device), None, texts, [])


def trained_subject(vlm: cobra.Cobra, questions: list[Question]) -> Subject:
    """Texts are questions and their true answers; without a benchmark, questions of the usual kinds alone."""
    texts = [vlm.prompt.question(q.text) + vlm.prompt.answer(q.truth) for q in questions[:BATCH_SIZE]]
    texts = texts or [vlm.prompt.question(prompt) for prompt in PROMPTS]
    return Subject(vlm.model.llm, vlm, [vlm.tokenizer.encode(text) for text in texts], questions)


def measure(options: argparse.Namespace) -> list[Row]:
    benchmark = EasyVQA(folder=str(options.easy_vqa)) if options.easy_vqa else None
    if options.model:
        vlm = cobra.load(options.model, device=options.device)
        subject = trained_subject(vlm, benchmark.questions()[: options.rows] if benchmark else [])
    else:
        subject = random_subject(pick_device(options.device))
    expected = subject.log_probabilities()
    models: dict[str, MambaLM] = {}
    found: dict[str, tuple[float, float, float]] = {}
    right: dict[str, float | None] = {}
    for name, convert in all_ways().items():
        changed = subject.changed(convert)
        models[name] = changed.llm
        found[name], right[name] = difference(expected, changed.log_probabilities()), changed.accuracy(benchmark)
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
            accuracy=right[name],
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
