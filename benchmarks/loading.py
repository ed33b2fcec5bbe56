"""Memory and time of loading a large model: `python benchmarks/loading.py [--gigabytes 2.5] [--json FILE]`.

Makes up a checkpoint in every layout, in a temporary folder, and loads each in a process of its own into a bfloat16
model on the CPU: a Mamba alone as `model.llm.weights` does, a whole model (two thirds Mamba, one third the paper's two
towers with fewer blocks) as `cobra.load` does. Two peaks are given, both above what the process had after its imports
and divided by the size of the model's weights:
  anonymous  memory that only this process has (RssAnon of /proc/self/status, looked at every millisecond)
  resident   with the mapped pages of the file, which the system may take back at any time (VmHWM)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cobra.config import LLMConfig, ModelConfig, ProjectorConfig, TowerConfig, VisionConfig
from cobra.loading import read_model, settings
from cobra.models.export import write_hugging_face_mamba, write_original_mamba, write_public_run
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import load_llm
from cobra.models.vlm import CobraVLM
from cobra.models.weights import assign, parameters_on_meta, save_model_folder, untied_state
from cobra.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[1] / "cobra" / "assets" / "tiny" / "tokenizer.json"
TOWERS = ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_384")
TOWER_BLOCKS_PER_GIGABYTE = 18  # one of each tower, 12.6 and 15.2 million parameters, in bfloat16


def mamba_config(gigabytes: float, width: int, vocabulary: int = 50280) -> LLMConfig:
    layers = (1e9 * gigabytes / 2 - vocabulary * width) / (6.25 * width**2)  # 6.25 D^2 parameters each, or some more
    return LLMConfig(
        d_model=width, num_layers=max(1, round(layers)), vocab_size=vocabulary, tokenizer="", prompt="mamba"
    )


def model_config(gigabytes: float, width: int) -> ModelConfig:
    args = {"depth": max(2, round(gigabytes / 3 * TOWER_BLOCKS_PER_GIGABYTE))}
    towers = [TowerConfig(timm=name, image_size=384, ignore_rest=True, args=args) for name in TOWERS]
    return ModelConfig(
        name="made-up",
        vision=VisionConfig(towers=towers),
        projector=ProjectorConfig(kind="linear"),
        llm=mamba_config(gigabytes * 2 / 3, width, vocabulary=len(Tokenizer(TOKENIZER))),
        max_length=64,
    )


def made_up(build: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A model whose values are all alike, which costs less than drawing random ones."""
    with parameters_on_meta():
        model: nn.Module = build()
    shapes = {name: tensor.shape for name, tensor in untied_state(model).items()}
    assign(model, {name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}, "made up")
    return model


def split(folder: Path, shards: int = 4) -> None:
    """Turn the one safetensors file of a folder into shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    names, places = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file)
        places |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def write(layout: str, folder: Path, gigabytes: float, width: int) -> None:
    """Write a made-up checkpoint of one of the LAYOUTS."""
    dtype = torch.float32 if "float32" in layout else torch.bfloat16
    if layout.startswith("Mamba"):
        folder.mkdir()
        llm = made_up(lambda: MambaLM(mamba_config(gigabytes, width)), dtype)
        is_original = "original" in layout
        (write_original_mamba if is_original else write_hugging_face_mamba)(llm, None, folder)
        if "shards" in layout:
            split(folder)
        return
    model = made_up(lambda: CobraVLM(model_config(gigabytes, width)), dtype)
    (write_public_run if "public" in layout else save_model_folder)(model, TOKENIZER, folder)


LAYOUTS = (
    "Mamba, original, float32",
    "Mamba, original, bfloat16",
    "Mamba, Hugging Face, bfloat16",
    "Mamba, Hugging Face, float32, shards",
    "whole, model folder, bfloat16",
    "whole, public run, float32",
    "whole, public run, bfloat16",
)


def load(layout: str, folder: Path, gigabytes: float, width: int) -> nn.Module:
    """Load it as users do, straight into bfloat16."""
    if layout.startswith("whole"):
        vision, llm = (
            (settings(folder / f"{part}.yaml", part) for part in ("vision", "llm"))
            if "public" in layout
            else (None, None)
        )
        return read_model(folder, vision, llm, dtype=torch.bfloat16)[0]
    with parameters_on_meta():
        llm = MambaLM(mamba_config(gigabytes, width))
    load_llm(llm, str(folder), "llm.weights", dtype=torch.bfloat16)
    return llm


def memory(key: str) -> int:
    """One line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"This benchmark reads {key} of /proc/self/status, which only Linux has.")


def measure(call: Callable[[], nn.Module]) -> dict[str, float]:
    """Peaks and seconds of a call that returns a model; for the first call of a process."""
    torch.full((1000,), 1.0, dtype=torch.bfloat16).aminmax()  # what torch sets up on first use
    before = {key: memory(key) for key in ("RssAnon", "VmRSS")}
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            peak[0] = max(peak[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    model = call()
    seconds = time.perf_counter() - started
    is_over.set()
    watcher.join()
    size = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "gigabytes": size / 1e9,
        "anonymous": (max(peak[0], memory("RssAnon")) - before["RssAnon"]) / size,
        "resident": (memory("VmHWM") - before["VmRSS"]) / size,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="approximate size of the loaded bfloat16 model")
    parser.add_argument("--width", type=int, default=2560, help="of the Mamba")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, metavar="LAYOUT")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the processes started here do
    given = parser.parse_args()
    size = (given.gigabytes, given.width)
    if given.load:
        row = measure(lambda: load(given.layouts[0], given.load, *size))
        sys.stdout.write(json.dumps(row) + "\n")
        return
    rows = []
    sys.stdout.write(f"{'layout':<38}{'weights GB':>11}{'anonymous':>11}{'resident':>10}{'seconds':>9}\n")
    for layout in given.layouts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "weights"
            write(layout, folder, *size)
            arguments = ["--gigabytes", str(size[0]), "--width", str(size[1]), "--layouts", layout]
            command = [sys.executable, __file__, *arguments, "--load", str(folder)]
            row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append({"layout": layout} | row)
        sys.stdout.write(
            f"{layout:<38}{row['gigabytes']:>11.2f}{row['anonymous']:>11.3f}{row['resident']:>10.3f}"
            f"{row['seconds']:>9.2f}\n"
        )
        sys.stdout.flush()
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
