"""Memory and time of loading a large model: `python benchmarks/loading.py [--gigabytes 2.5] [--json FILE]`.

Makes a synthetic Mamba checkpoint in every layout in a temporary folder and loads each in a process of its own into a
bfloat16 model on the CPU. Two peaks are given, both above what the process had before and divided by the size of the
model's weights:
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
from pathlib import Path

LAYERS_PER_GIGABYTE = 8.8  # of width 2560 in bfloat16, beside an embedding of 0.26 GB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the loaded bfloat16 model")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "LAYERS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        sys.stdout.write(json.dumps(load(given.load[0], int(given.load[1]))) + "\n")
        return
    layers = max(1, round((given.gigabytes - 0.26) * LAYERS_PER_GIGABYTE))
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for layout in (
            "original, float32",
            "original, bfloat16",
            "Hugging Face, bfloat16",
            "Hugging Face, float32, shards",
        ):
            folder = Path(temporary) / "weights"
            subprocess.run([sys.executable, __file__, *write_command(layout, folder, layers)], check=True)
            command = [sys.executable, __file__, "--load", str(folder), str(layers)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            rows.append({"layout": layout} | row)
            for file in folder.iterdir():
                file.unlink()
    sys.stdout.write(f"{'layout':<32}{'weights GB':>11}{'anonymous':>11}{'resident':>10}{'seconds':>9}\n")
    for row in rows:
        sys.stdout.write(
            f"{row['layout']:<32}{row['gigabytes']:>11.2f}{row['anonymous']:>11.3f}{row['resident']:>10.3f}"
            f"{row['seconds']:>9.2f}\n"
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


def write_command(layout: str, folder: Path, layers: int) -> list[str]:
    return ["--write", layout, str(folder), str(layers)]


def config(layers: int):
    from cobra.config import LLMConfig

    return LLMConfig(d_model=2560, num_layers=layers, vocab_size=50277, tokenizer="", prompt="mamba")


def write(layout: str, folder: Path, layers: int) -> None:
    """Write a checkpoint whose values are all alike, as if random ones had been trained."""
    import torch
    from safetensors.torch import save_file

    from cobra.models.mamba import MambaLM
    from cobra.models.weights import parameters_on_meta, untied_state

    folder.mkdir(exist_ok=True)
    dtype = torch.float32 if "float32" in layout and "bfloat16" not in layout else torch.bfloat16
    with parameters_on_meta():
        state = untied_state(MambaLM(config(layers)))
    tensors = {name: torch.full(tensor.shape, 0.01, dtype=dtype) for name, tensor in state.items()}
    if layout.startswith("original"):
        embedding = tensors["backbone.embedding.weight"]
        torch.save(tensors | {"lm_head.weight": embedding}, folder / "pytorch_model.bin")
        return
    tensors = {name.replace("embedding.", "embeddings."): tensor for name, tensor in tensors.items()}
    if "shards" not in layout:
        save_file(tensors, folder / "model.safetensors")
        return
    names, places = list(tensors), {}
    for i in range(4):
        file = f"model-{i + 1:05}-of-00004.safetensors"
        save_file({name: tensors[name] for name in names[i::4]}, folder / file)
        places |= dict.fromkeys(names[i::4], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def memory(key: str) -> int:
    """One line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("This benchmark reads /proc/self/status, which only Linux has.")


def load(folder: str, layers: int) -> dict[str, float]:
    import torch

    from cobra.models.mamba import MambaLM
    from cobra.models.pretrained import load_llm
    from cobra.models.weights import parameters_on_meta

    torch.full((1000,), 1.0, dtype=torch.bfloat16).aminmax()  # what torch sets up on first use
    before = {key: memory(key) for key in ("RssAnon", "VmRSS")}
    peak, is_over = [0], threading.Event()

    def watch() -> None:
        while not is_over.wait(0.001):
            peak[0] = max(peak[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    with parameters_on_meta():
        lm = MambaLM(config(layers))
    load_llm(lm, folder, "llm.weights", dtype=torch.bfloat16)
    seconds = time.perf_counter() - started
    is_over.set()
    watcher.join()
    size = sum(parameter.nbytes for parameter in lm.parameters())
    return {
        "gigabytes": size / 1e9,
        "anonymous": (peak[0] - before["RssAnon"]) / size,
        "resident": (memory("VmHWM") - before["VmRSS"]) / size,
        "seconds": seconds,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
