"""The tiny model's training step, and the same step with transformers' MambaForCausalLM in place of our Mamba.

    python benchmarks/training_step.py [--rows 190] [--skip-slow]

All variants start from the same weights, see the same batch (32 images, `--rows` questions in all) and must report the
same loss. transformers' Mamba takes no initial state, so it reads the image once per question; ours reads it once per
image. Each variant runs in a process of its own, which also gives its peak memory. The slow path takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
import torch
from torch import Tensor

from cobra.config import ModelConfig, as_config
from cobra.data.batch import Batch
from cobra.models.build import build_model, set_trainable
from cobra.models.vlm import CobraVLM
from cobra.runtime import peak_memory_gib
from cobra.text.prompt import IGNORE_INDEX

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
VARIANTS = {
    "ours": "Cobra",
    "mambapy": "transformers, use_mambapy=True",
    "slow": "transformers, use_mambapy=False",
}
IMAGES, TEXT_LENGTH, ANSWER_LENGTH = 32, 16, 2


def make_batch(rows: int, vocab_size: int) -> Batch:
    """A batch of easy-VQA's shape: 32 images of 64 pixels, rows of 16 tokens of which the last 2 are the answer."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (IMAGES, 3, 64, 64), generator=generator, dtype=torch.uint8)
    input_ids = torch.randint(1, vocab_size, (rows, TEXT_LENGTH), generator=generator)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    labels[:, -ANSWER_LENGTH:] = input_ids[:, -ANSWER_LENGTH:]
    return Batch(
        input_ids=input_ids,
        labels=labels,
        lengths=torch.full((rows,), TEXT_LENGTH),
        pixels=[image],
        image_index=torch.arange(rows) * IMAGES // rows,
        num_labels=rows * ANSWER_LENGTH,
    )


def transformers_llm(model: CobraVLM, *, use_mambapy: bool) -> torch.nn.Module:
    """A MambaForCausalLM with the weights of `model.llm`."""
    from transformers import MambaConfig, MambaForCausalLM

    ours = model.config.llm
    config = MambaConfig(
        vocab_size=ours.padded_vocab_size,
        hidden_size=ours.d_model,
        num_hidden_layers=ours.num_layers,
        state_size=ours.d_state,
        conv_kernel=ours.d_conv,
        expand=ours.expand,
        time_step_rank=ours.rank,
        use_mambapy=use_mambapy,
        use_cache=False,
    )
    theirs = MambaForCausalLM(config)
    state = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in model.llm.state_dict().items()}
    theirs.load_state_dict(state)
    return theirs


def build_step(variant: str, rows: int) -> Callable[[], float]:
    """Return a function that makes one training step (forward, backward, AdamW) and returns its loss."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = as_config(ModelConfig, hydra.compose("pretrain").model)
    model = build_model(config, seed=0)
    set_trainable(model, "finetune")
    batch = make_batch(rows, config.llm.vocab_size)
    theirs = None if variant == "ours" else transformers_llm(model, use_mambapy=variant == "mambapy")
    learnt = [*model.projector.parameters(), *(theirs or model.llm).parameters()]
    optimizer = torch.optim.AdamW(learnt, lr=1e-4, fused=True)

    def their_loss() -> Tensor:
        assert theirs is not None and batch.image_index is not None and batch.pixels is not None
        image = model.embed_images(batch.pixels)[batch.image_index]  # [R, P, D]
        text = theirs.get_input_embeddings()(batch.input_ids)  # type: ignore[operator]
        labels = torch.cat([batch.labels.new_full(image.shape[:2], IGNORE_INDEX), batch.labels], dim=1)
        return theirs(inputs_embeds=torch.cat([image, text], dim=1), labels=labels).loss

    def our_loss() -> Tensor:
        output = model(batch.input_ids, pixels=batch.pixels, labels=batch.labels, image_index=batch.image_index)
        assert output.loss is not None
        return output.loss

    def step() -> float:
        loss = our_loss() if theirs is None else their_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


def measure(variant: str, rows: int, repeats: int) -> dict[str, float]:
    """Time `repeats` steps after a first one that compiles and warms up (the slow path has nothing to warm up)."""
    step = build_step(variant, rows)
    seconds = []
    first_loss = None
    for _ in range(repeats + (variant != "slow")):
        started = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - started)
        first_loss = loss if first_loss is None else first_loss
    assert first_loss is not None
    return {
        "seconds": statistics.median(seconds[-repeats:]),
        "loss": first_loss,
        "memory_gib": peak_memory_gib(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=190, help="questions in the batch")
    parser.add_argument("--skip-slow", action="store_true", help="leave out transformers' own path")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # one child process
    arguments = parser.parse_args()
    if arguments.variant:
        repeats = {"ours": 10, "mambapy": 3, "slow": 1}[arguments.variant]
        print(json.dumps(measure(arguments.variant, arguments.rows, repeats)))
        return
    results: dict[str, dict[str, float]] = {}
    threads = torch.get_num_threads()
    print(f"{arguments.rows} questions about {IMAGES} images, {threads} threads, torch {torch.__version__}")
    print(f"{'variant':34} {'ms/step':>10} {'x ours':>8} {'loss':>9} {'peak GiB':>9}")
    for variant, name in VARIANTS.items():
        if variant == "slow" and arguments.skip_slow:
            continue
        command = [sys.executable, __file__, "--variant", variant, "--rows", str(arguments.rows)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"{name} failed:\n{answer.stderr}")
        result = results[variant] = json.loads(answer.stdout.splitlines()[-1])
        ratio = result["seconds"] / results["ours"]["seconds"]
        print(
            f"{name:34} {result['seconds'] * 1e3:10.1f} {ratio:8.1f} {result['loss']:9.5f} {result['memory_gib']:9.2f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
