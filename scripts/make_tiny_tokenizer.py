"""Train a tiny tokenizer: a byte-level BPE of the GPT-NeoX kind, from the conversations of a small training set.

    python scripts/make_tiny_tokenizer.py                 # of easy-VQA: cobra/assets/tiny/tokenizer.json
    python scripts/make_tiny_tokenizer.py --text toy      # of the toy: cobra/assets/tiny/toy-tokenizer.json

Takes seconds and writes the same bytes every time. Every word of the training text becomes one token, and so do "Yes",
"No", "True" and "False", which closed questions are scored by. In the toy's, numbers are spelt digit by digit, and what
stays the same in a benchmark's messages, or in all boxes, is one token: far less to read.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cobra.data import easyvqa, toy
from cobra.data.toy.prompts import PROMPTS
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import END_OF_TEXT

CLOSED_ANSWERS = ("Yes", "No", "True", "False")
NAMES = {"easyvqa": "tokenizer.json", "toy": "toy-tokenizer.json"}


def training_rows(source: str) -> list[dict[str, Any]]:
    """Return the rows of a training set, made anew."""
    prepare = {"easyvqa": easyvqa.prepare, "toy": toy.prepare}[source]
    with tempfile.TemporaryDirectory() as temporary:
        prepare(folder := Path(temporary) / source)
        return json.loads((folder / "train.json").read_text(encoding="utf-8"))


def training_text(source: str) -> Iterator[str]:
    """Yield each segment as training will tokenise it."""
    prompt = prompt_format("mamba")
    for row in training_rows(source):
        question, answer = (message["value"] for message in row["conversations"])
        yield prompt.question(question)
        yield answer
        yield from CLOSED_ANSWERS


def fixed_phrases() -> list[str]:
    """Return what stands between the blanks of the toy's messages and boxes."""
    parts = (part.strip(' "') for prompt in PROMPTS.values() for part in re.split(r"{\w+}", prompt))
    return [*dict.fromkeys(part for part in parts if len(part) > 1), "[0.", ", 0."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=NAMES, default="easyvqa")
    parser.add_argument("--out", type=Path, help="default: where it ships")
    parser.add_argument("--vocab-size", type=int, default=800, help="upper limit; fewer are used when no pair repeats")
    arguments = parser.parse_args()
    out: Path = arguments.out or Path("cobra/assets/tiny") / NAMES[arguments.text]

    tokenizer = Tokenizer(models.BPE())
    split: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if arguments.text == "toy" else []
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, words]) if split else words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(arguments.text), trainer)
    if arguments.text == "toy":
        tokenizer.add_tokens(fixed_phrases())
    out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out))
    print(f"{tokenizer.get_vocab_size()} tokens -> {out}")
    for text in ("In: does the image not contain a gray shape?\nOut: ", *CLOSED_ANSWERS):
        print(repr(text), tokenizer.encode(text).tokens)


if __name__ == "__main__":
    main()
