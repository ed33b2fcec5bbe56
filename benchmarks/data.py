"""Time and memory of a data set of many rows: its index, opening it, planning an epoch, a worker that loads it.

    python benchmarks/data.py                   # 1.2 million rows, as in the paper's mixture: minutes, 3 GB
    python benchmarks/data.py --rows 100000
    python benchmarks/data.py --tokenizer gpt-neox/tokenizer.json

The file is made up: rows of two or three turns, some 95 words and 220 GPT-NeoX tokens, as frequent as in English
(Zipf), one row in twenty without image, three rows to an image, 1,000 empty image files to a folder. `index` is
everything from the annotation file to a checked data set: validation, token counts, a look for every image. Every
measurement has a process of its own. Memory is in MB: the peak that was resident; of a worker, what it shares with
nobody (`private`) and its share of all it uses (`PSS`), from /proc.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from torch import Tensor

from cobra.config import TrainConfig
from cobra.config.train import DataConfig
from cobra.data.dataset import ConversationDataset, open_data
from cobra.data.sampler import BatchPlan
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

TINY = Path(__file__).resolve().parents[1] / "cobra" / "assets" / "tiny" / "tokenizer.json"
ROWS_PER_IMAGE, IMAGES_PER_FOLDER, TEXT_EVERY = 3, 1000, 20
COMMON = (
    "the of and a to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part image picture"
)
IMAGE_TOKENS, MAX_LENGTH = 729, 2048
LIMITS = {"index": (180, 1000), "open": (5, None), "plan": (10, None), "worker": (None, 300)}  # seconds, MB


def make_words(rng: random.Random, count: int = 50_000) -> list[str]:
    """The commonest English words, then made-up ones; some are not ASCII, and some bring punctuation."""
    words: list[str] = list(COMMON.split())
    syllables = [a + b for a in "bcdfghlmnprstvwz" for b in ("a", "e", "i", "o", "u", "ar", "en", "in", "on")]
    for i in range(len(words), count):
        word = "".join(rng.choices(syllables, k=1 + min(2, i // 500)))
        words.append(word + "é" if i % 97 == 96 else word + rng.choice([".", ",", ""]) if i % 5 == 4 else word)
    return words


def make_file(folder: Path, num_rows: int) -> int:
    """Write annotations and empty images; return the size of the annotations in bytes."""
    rng = random.Random(0)
    words = make_words(rng)
    weights = [1 / (i + 2) for i in range(len(words))]
    text = rng.choices(words, weights, k=2_000_000)
    with (folder / "train.json").open("w", encoding="utf-8") as file:
        file.write("[")
        for i in range(num_rows):
            messages = []
            for turn in range(rng.choice((2, 3))):
                for role, low, high in (("human", 6, 14), ("gpt", 10, 45)):
                    start = rng.randrange(len(text) - high)
                    value = " ".join(text[start : start + rng.randint(low, high)])
                    messages.append(
                        {"from": role, "value": f"<image>\n{value}" if not turn and role == "human" else value}
                    )
            row = {"id": i if i % 2 else f"{i:012d}", "conversations": messages}
            if i % TEXT_EVERY:
                row["image"] = image_name(i // ROWS_PER_IMAGE)
            file.write((",\n" if i else "") + json.dumps(row, ensure_ascii=False))
        file.write("]")
    for image in range(-(-num_rows // ROWS_PER_IMAGE)):
        path = folder / "images" / image_name(image)
        if image % IMAGES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        path.touch()
    return (folder / "train.json").stat().st_size


def image_name(image: int) -> str:
    return f"{image // IMAGES_PER_FOLDER:05d}/{image:09d}.jpg"


def no_pixels(_: Image.Image) -> list[Tensor]:
    return []


def open_all(folder: Path, tokenizer: Path) -> ConversationDataset:
    config = DataConfig(
        name="made-up",
        annotations=str(folder / "train.json"),
        images=str(folder / "images"),
        index=str(folder / "index"),
    )
    prompt = prompt_format("zephyr")
    return open_data(config, Tokenizer(tokenizer), prompt, no_pixels, max_length=MAX_LENGTH, captions_only=False)


def measure(what: str, folder: Path, tokenizer: Path) -> dict[str, float]:
    """Measure one thing in this process: seconds, and MB of memory."""
    before, cpu = time.perf_counter(), time.process_time()
    dataset = open_all(folder, tokenizer)
    if what in ("index", "open"):
        used = time.process_time() - cpu
        tokens = float(sum(int(part.lengths.sum()) for part in dataset.parts)) / dataset.num_rows
        return {"seconds": time.perf_counter() - before, "CPU seconds": used, "peak": peak(), "tokens per row": tokens}
    train = TrainConfig(stage="finetune", global_batch_size=128, per_device_batch_size=16, learning_rate=1e-5, epochs=2)
    before = time.perf_counter()
    plan = BatchPlan(dataset.parts, train, rows_per_image=1, seed=0, image_tokens=IMAGE_TOKENS)
    plan.step(0, 0, 8)
    seconds = time.perf_counter() - before
    if what == "plan":
        return {"seconds": seconds, "peak": peak()}
    context = multiprocessing.get_context("fork")  # as DataLoader's workers on Linux
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=work, args=(dataset, sender))
    worker.start()
    found = receiver.recv()
    worker.join()
    return found


def work(dataset: ConversationDataset, sender) -> None:  # type: ignore[no-untyped-def]
    """Read rows all over the data set, as a worker does in an epoch, and tell what memory that takes."""
    rng = random.Random(0)
    before = time.perf_counter()
    count = min(dataset.num_rows, 100_000)
    for _ in range(count):
        _, row = dataset.row(rng.randrange(dataset.num_rows))
        dataset.tokenize(row)
    seconds = time.perf_counter() - before
    fields: dict[str, int] = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, value, _ = line.split()
        fields[key.rstrip(":")] = int(value) // 1000
    sender.send(
        {
            "seconds": seconds,
            "rows": count,
            "private": fields["Private_Clean"] + fields["Private_Dirty"],
            "PSS": fields["Pss"],
            "RSS": fields["Rss"],
        }
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_200_000)
    parser.add_argument("--tokenizer", type=Path, default=TINY, help="tokenizer.json (default: the tiny model's)")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    parser.add_argument("--folder", type=Path, help="keep the made-up data here, for another measurement")
    parser.add_argument("--measure", choices=LIMITS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.folder, arguments.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder: Path = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "train.json").exists():
            before = time.perf_counter()
            size = make_file(folder, arguments.rows)
            seconds = time.perf_counter() - before
            print(f"made {arguments.rows:,} rows, {size / 1e6:,.0f} MB, in {seconds:.0f} s", flush=True)
        results = {}
        for what, (seconds, memory) in LIMITS.items():
            command = [sys.executable, __file__, "--measure", what, "--folder", str(folder)]
            command += ["--tokenizer", str(arguments.tokenizer)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=os.environ)
            results[what] = json.loads(done.stdout)
            wanted = [f"< {seconds} s"] * (seconds is not None) + [f"< {memory} MB"] * (memory is not None)
            found = ", ".join(f"{key} {value:,.1f}" for key, value in results[what].items())
            print(f"{what:8}{found:100} target {', '.join(wanted)}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps({"rows": arguments.rows, **results}, indent=2))


if __name__ == "__main__":
    main()
