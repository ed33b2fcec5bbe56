"""Write miniatures of all nine benchmarks, in the official files, and the training set that goes with them.

    python scripts/make_toy_benchmarks.py [--out data/toy] [--seed 0] [--train N] [--gqa N] ...
    python scripts/make_toy_benchmarks.py --chance        # and the scores of answers without looking

The numbers are numbers of images. Takes seconds and writes the same bytes every time; the folder serves as data_root.
"""

import argparse
from dataclasses import fields
from pathlib import Path

import yaml
from hydra.utils import instantiate

from cobra.data.conversations import read_rows
from cobra.data.toy import Toy, prepare
from cobra.errors import CobraError
from cobra.eval.benchmark import Benchmark
from cobra.eval.blind import SimilarQuestions, best_constants

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BENCHMARKS = ("vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco")  # the last one is three
NEXT = """
Train a tiny model on {out}/train.json (docs/toy.md has times and results):
  COBRA_DATA={data} python scripts/pretrain.py +experiment=tiny-toy
Evaluate it on each of them:
  COBRA_DATA={out} python scripts/evaluate.py --multirun benchmark={benchmarks} model=runs/tiny-toy"""


def open_benchmark(name: str, data_root: Path) -> Benchmark:
    config = yaml.safe_load((CONFIGS / "benchmark" / f"{name}.yaml").read_text(encoding="utf-8"))
    return instantiate(config | {"data_root": str(data_root)}, _convert_="all")


def print_chance(folder: Path) -> None:
    known = [
        (turn[0].removeprefix("<image>\n"), turn[1]) for row in read_rows(folder / "train.json") for turn in row.turns
    ]
    similar = SimilarQuestions(known)
    print("\nOfficial accuracy without looking: the best constant answer, and the usual one to such a question")
    for name in BENCHMARKS:
        benchmark = open_benchmark(name, folder)
        questions = benchmark.questions()
        guessed = benchmark.score(similar.predictions(questions), questions).parts["official"]
        for part, (answer, score) in best_constants(benchmark, questions, [answer for _, answer in known]).items():
            print(f"  {name:8} {part:12} {score:5.1f} % ({answer})   {guessed[part].accuracy:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--chance", action="store_true", help="score answers without looking, too")
    for field in fields(Toy):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    arguments = parser.parse_args()
    sizes = {field.name: getattr(arguments, field.name) for field in fields(Toy)}
    try:
        prepare(arguments.out, Toy(**sizes))
    except CobraError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"{arguments.out} holds")
    for name in BENCHMARKS:
        questions = open_benchmark(name, arguments.out).questions()
        print(f"  {name:8} {len(questions):6,} questions, {len({one.image for one in questions}):4,} images")
    print(f"  train    {sizes['train']:,} images")
    if arguments.chance:
        print_chance(arguments.out)
    print(NEXT.format(out=arguments.out, data=arguments.out.parent, benchmarks=",".join(BENCHMARKS)))


if __name__ == "__main__":
    main()
