"""Train the tiny model's tokenizer: a byte-level BPE of the GPT-NeoX kind, from easy-VQA's training conversations.

    python scripts/make_tiny_tokenizer.py

Takes 2 seconds and writes cobra/assets/tiny/tokenizer.json, the same bytes every time. Every word of the training text
becomes one token, and so do "Yes", "No", "True" and "False", which closed questions are scored by.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import easy_vqa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cobra.data.easyvqa import conversations
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import END_OF_TEXT

CLOSED_ANSWERS = ("Yes", "No", "True", "False")


def training_text() -> Iterator[str]:
    """Yield each segment as training will tokenise it."""
    prompt = prompt_format("mamba")
    for row in conversations("train", *easy_vqa.get_train_questions()):
        question, answer = (message["value"] for message in row["conversations"])
        yield prompt.question(question)
        yield answer
        yield from CLOSED_ANSWERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cobra/assets/tiny/tokenizer.json"))
    parser.add_argument("--vocab-size", type=int, default=400, help="upper limit; fewer are used when no pair repeats")
    arguments = parser.parse_args()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.out))
    print(f"{tokenizer.get_vocab_size()} tokens -> {arguments.out}")
    for text in ("In: does the image not contain a gray shape?\nOut: ", *CLOSED_ANSWERS):
        print(repr(text), tokenizer.encode(text).tokens)


if __name__ == "__main__":
    main()
