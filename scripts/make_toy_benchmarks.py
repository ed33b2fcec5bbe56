"""Write miniatures of all nine benchmarks, in the official files, and the training set that goes with them.

    python scripts/make_toy_benchmarks.py [--out data/toy] [--seed 0] [--train N] [--gqa N] ... [--chance]

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
from cobra.eval.blind import SimilarQuestions, best_constants

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "benchmark"
BENCHMARKS = ("vqav2", "gqa", "vizwiz", "textvqa", "vsr", "pope", "refcoco")  # the last one is three
NEXT = """
Train a tiny model on {out}/train.json, and evaluate it on all of them (docs/toy.md has times and results):
  COBRA_DATA={data} python scripts/pretrain.py +experiment=tiny-toy
  python scripts/evaluate.py benchmark=all data_root={out} model=runs/tiny-toy"""


def print_chance(folder: Path) -> None:
    turns = (turn for row in read_rows(folder / "train.json") for turn in row.turns)
    known = [(message.removeprefix("<image>\n"), answer) for message, answer in turns]
    similar = SimilarQuestions(known)
    print("Official accuracy without looking: the best constant answer, and the usual one to such a question")
    for name in BENCHMARKS:
        config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
        benchmark = instantiate(config | {"data_root": str(folder)}, _convert_="all")
        guessed = benchmark.score(similar.predictions(questions := benchmark.questions()), questions).parts["official"]
        for part, (answer, score) in best_constants(benchmark, questions, [answer for _, answer in known]).items():
            print(f"  {name:8} {part:12} {score:5.1f} % ({answer})   {guessed[part].accuracy:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/toy"))
    parser.add_argument("--chance", action="store_true", help="score answers without looking, too")
    for field in fields(Toy):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help="default: %(default)s")
    sizes = vars(parser.parse_args())
    out, chance = sizes.pop("out"), sizes.pop("chance")
    try:
        prepare(out, Toy(**sizes))
    except CobraError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None
    print(f"{out} holds the benchmarks and a training set of {sizes['train']:,} images.")
    if chance:
        print_chance(out)
    print(NEXT.format(out=out, data=out.parent))


if __name__ == "__main__":
    main()
