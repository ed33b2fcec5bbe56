"""Training: what a step costs in memory, what a second rank brings, and how fast full-size shapes are on this device.

    python benchmarks/training.py memory [--layers 12 --images 4]    peak of a step: our loss against full logits
    python benchmarks/training.py ranks                             one and two CPU ranks on the same global batch
    python benchmarks/training.py speed +experiment=cobra-3b [--layers 64 --batch 16 --text 300]   tokens/s, MFU, parts

Every measurement runs in a process of its own. Weights are random. `speed` takes the settings of scripts/pretrain.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra.config import LLMConfig, PretrainConfig, as_config
from cobra.models.build import set_trainable
from cobra.models.lora import attach_adapters
from cobra.models.loss import labelled_loss
from cobra.models.mamba import MambaLM
from cobra.models.vlm import CobraVLM
from cobra.runtime import peak_memory_gib, pick_device
from cobra.text.prompt import IGNORE_INDEX
from cobra.train.metrics import Counts, Flops, peak_flops
from cobra.train.optim import build_optimizer
from cobra.train.parallel import autocasts, prepare

ROOT = Path(__file__).resolve().parent.parent
IMAGE_TOKENS, LABELLED = 729, 100  # of 300 text tokens, a third are answers

MEMORY_VARIANTS = {
    "ours": "Cobra: labelled positions, in chunks",
    "ours-recompute-2": "the same, every second block computed again",
    "ours-recompute-1": "the same, every block computed again",
    "full": "logits of all positions in float32, cross-entropy",
}


def child(*arguments: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Measure in a process of its own; return what it prints as its last line."""
    command = [sys.executable, __file__, *map(str, arguments), "--child"]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | (environment or {}))
    if answer.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{answer.stderr}")
    return json.loads(answer.stdout.splitlines()[-1])


def memory_of(variant: str, layers: int, images: int, text: int) -> dict[str, float]:
    """Peak memory of one forward and backward pass over mamba-130m's widths, and its loss."""
    device = pick_device("auto")
    config = LLMConfig(d_model=768, num_layers=layers, vocab_size=50277, tokenizer="none", prompt="zephyr")
    model = MambaLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    recompute = variant.rpartition("-")[2]
    model.checkpoint_activations(int(recompute) if recompute.isdigit() else None)
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(images, IMAGE_TOKENS, config.d_model, generator=generator).to(device)
    ids = torch.randint(1, 50277, (images, text), generator=generator).to(device)
    labels = torch.full((images, IMAGE_TOKENS + text), IGNORE_INDEX, device=device)
    labels[:, -LABELLED:] = ids[:, -LABELLED:]
    before = peak_memory_gib(device)
    hidden, _ = model(torch.cat([patches, model.embed(ids)], dim=1))
    if variant == "full":
        logits = model.head(hidden[:, :-1]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
    else:
        loss_sum, count = labelled_loss(model.head, hidden[:, :-1], labels[:, 1:])
        loss = loss_sum / count
    loss.backward()
    return {"gib": peak_memory_gib(device) - before, "loss": float(loss)}


def memory(layers: int, images: int, text: int) -> dict[str, Any]:
    shape = f"{images} x ({IMAGE_TOKENS} image + {text} text tokens, {LABELLED} labelled)"
    print(f"{shape}, {layers} blocks of mamba-130m's widths")
    print(f"{'variant':52} {'peak GiB':>9} {'of full':>8} {'loss':>10}")
    arguments = ("--layers", layers, "--images", images, "--text", text)
    found = {name: child("memory", "--variant", name, *arguments) for name in MEMORY_VARIANTS}
    for name, title in MEMORY_VARIANTS.items():
        share = found[name]["gib"] / found["full"]["gib"]
        print(f"{title:52} {found[name]['gib']:9.2f} {share:8.2f} {found[name]['loss']:10.6f}")
    return found


def ranks(steps: int) -> dict[str, Any]:
    """Seconds per step of the tiny recipe on one and on two CPU processes, one thread each."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2):
            settings = [f"train.max_steps={steps}", "train.log_every=5", "train.save_every=100000", "data.check=exists"]
            settings += [
                f"parallel.processes={count}",
                f"train.per_device_batch_size={32 // count}",
                "data.rows_per_image=6",
            ]
            settings += [
                "parallel.device=cpu",
                f"run.name=on-{count}",
                f"paths.runs={folder}",
                f"paths.data={folder}/data",
            ]
            command = [sys.executable, str(ROOT / "scripts" / "pretrain.py"), *settings]
            answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            if answer.returncode:
                sys.exit(answer.stderr)
            rows = [json.loads(line) for line in (Path(folder) / f"on-{count}" / "metrics.jsonl").open()]
            rate = statistics.median(row["examples_per_second"] for row in rows[2:])  # the first ones compile
            found[str(count)] = {"rows_per_second": rate, "loss": rows[-1]["loss"]}
    ratio = found["1"]["rows_per_second"] / found["2"]["rows_per_second"]
    print(f"{'ranks':>6} {'rows/s':>9} {'time':>6} {'last loss':>10}")
    for count, relative in (("1", 1.0), ("2", ratio)):
        print(f"{count:>6} {found[count]['rows_per_second']:9.1f} {relative:6.2f} {found[count]['loss']:10.6f}")
    return found | {"ratio": ratio}


def speed(overrides: list[str], layers: int | None, batch: int, text: int, repeats: int) -> dict[str, Any]:
    """Tokens/s and MFU of a step at full-size shapes on one device, and where its time goes."""
    with hydra.initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = as_config(PretrainConfig, hydra.compose("pretrain", overrides=overrides))
    if layers is not None:
        config = replace(config, model=replace(config.model, llm=replace(config.model.llm, num_layers=layers)))
    device = pick_device(config.parallel.device)
    with device:  # random weights, made where they are used
        model = CobraVLM(config.model)
    model.llm.init_weights(torch.Generator().manual_seed(0)) if device.type == "cpu" else _fill(model)
    set_trainable(model, config.train.stage)
    if config.train.lora is not None:
        attach_adapters(model, config.train.lora, torch.Generator().manual_seed(0))
    prepare(model, config.parallel)
    optimizer = build_optimizer(model.named_parameters(), config.train)
    views = model.vision.transform.views
    pixels = [torch.randint(0, 256, (batch, 3, v.size, v.size), dtype=torch.uint8, device=device) for v in views]
    ids = torch.randint(1, config.model.llm.vocab_size, (batch, text), device=device)
    labels = torch.where(torch.arange(text, device=device) >= text - text // 3, ids, IGNORE_INDEX)

    def timed(run: Callable[[], Any]) -> tuple[float, Any]:
        _wait(device)
        started = time.perf_counter()
        result = run()
        _wait(device)
        return time.perf_counter() - started, result

    def features() -> Tensor:
        with torch.no_grad():
            return model.vision(pixels)

    def loss() -> Tensor:
        output = model(ids, pixels=pixels, labels=labels)
        assert output.loss is not None
        return output.loss

    seconds: dict[str, list[float]] = {"vision": [], "forward": [], "backward": [], "optimizer": []}
    for _ in range(repeats + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=autocasts(config.parallel, model)):
            seconds["vision"].append(timed(features)[0])
            took, value = timed(loss)
        seconds["forward"].append(took)
        seconds["backward"].append(timed(value.backward)[0])
        seconds["optimizer"].append(timed(optimizer.step)[0])
        optimizer.zero_grad(set_to_none=True)
    median = {part: statistics.median(values[1:]) for part, values in seconds.items()}
    total = median["forward"] + median["backward"] + median["optimizer"]
    tokens = batch * (model.num_image_tokens + text)
    work = Flops(config.model, config.train).of(Counts(images=batch, text_tokens=batch * text))
    peak = peak_flops(config.parallel, device)
    shape = f"{batch} x ({model.num_image_tokens} + {text}) tokens"
    print(f"{config.model.name}, {config.model.llm.num_layers} blocks, {shape}")
    print(f"{tokens / total:,.0f} tokens/s, {batch / total:.2f} examples/s, {work / total / 1e12:.1f} TFLOP/s", end="")
    print(
        "" if peak is None else f", MFU {100 * work / total / peak:.1f} %", f", peak {peak_memory_gib(device):.1f} GiB"
    )
    median["forward"] -= median["vision"]
    for part, value in median.items():
        name = "forward, vision aside" if part == "forward" else part
        print(f"  {name:24} {value * 1e3:9.1f} ms {100 * value / total:5.1f} %")
    return {"seconds": median, "tokens_per_second": tokens / total, "flops_per_second": work / total}


def _fill(model: nn.Module) -> None:
    """Small random numbers: what they are does not change the time."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("A_log", ".D")):
                parameter.normal_(std=0.01)
            else:
                parameter.zero_()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "ranks", "speed"])
    parser.add_argument("overrides", nargs="*", help="speed: settings of scripts/pretrain.py")
    parser.add_argument("--layers", type=int, help="blocks of the language model")
    parser.add_argument("--images", type=int, default=4, help="memory: examples")
    parser.add_argument("--text", type=int, default=300, help="text tokens of an example")
    parser.add_argument("--batch", type=int, default=16, help="speed: examples")
    parser.add_argument("--repeats", type=int, default=5, help="speed: steps that are timed")
    parser.add_argument("--steps", type=int, default=60, help="ranks: training steps")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    layers = given.layers or (12 if given.what == "memory" else None)
    if given.child:
        print(json.dumps(memory_of(given.variant, layers or 12, given.images, given.text)))
        return
    if given.what == "memory":
        found = memory(layers or 12, given.images, given.text)
    elif given.what == "ranks":
        found = ranks(given.steps)
    else:
        found = speed(given.overrides, layers, given.batch, given.text, given.repeats)
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
