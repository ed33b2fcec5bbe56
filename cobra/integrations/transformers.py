"""An image-text-to-text model of transformers with the interface that the evaluation asks through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cobra.config import DTYPES, one_of
from cobra.errors import CheckpointError, ConfigError, NumericsError, ShapeError
from cobra.hub import open_image
from cobra.runtime import pick_device

_NEEDED = "it needs transformers 5 or newer: pip install 'cobra-vlm[transformers]'"
_PLACEHOLDER = "question"  # stands for any question where only what follows it matters


@dataclass(frozen=True)
class Images:
    """Decoded images; a list of numbers selects and repeats them."""

    images: list[Image.Image]

    def __getitem__(self, rows: list[int]) -> Images:
        return Images([self.images[row] for row in rows])


class TransformersModel:
    """A transformers model to ask questions of: greedily, one image and one user message each.

    The message is put into the processor's chat template. A processor without one gets its image token, a new line and
    the question, as base models know it.
    """

    def __init__(self, model: Any, processor: Any, name: str) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self._tokenizer = processor.tokenizer
        self._tokenizer.padding_side = "left"  # every row's answer begins where the longest prompt ends
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def prepare_image(self, image: str | Path) -> Image.Image:
        """Decode an image. Safe in several threads."""
        return open_image(image).convert("RGB")

    def encode_image(self, image: Sequence[str | Path | Image.Image]) -> Images:
        """Decode images, once for all questions about them; the model itself reads them anew for every question."""
        return Images([open_image(item).convert("RGB") for item in image])

    def generate(self, image: Images, prompt: Sequence[str], *, max_new_tokens: int) -> list[str]:
        """Answer one prompt per image; special tokens and white space around an answer are removed."""
        inputs = self._inputs(image, prompt)
        ids = self._run(inputs, max_new_tokens=max_new_tokens)
        answers = self._tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def score(self, image: Images, prompt: Sequence[str], choices: Sequence[str]) -> list[list[float]]:
        """Return the probability of each choice as the answer's first token, per image; a row sums to 1.

        Raises:
            ConfigError: a choice is not a single token.
            NumericsError: logits that are NaN or infinite.
        """
        choice_ids = self.choice_ids(choices)
        # generate, not forward: it derives positions from the padding, each model in its own way
        output = self._run(
            self._inputs(image, prompt), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        logits = output.logits[0][:, choice_ids].float()
        if not bool(logits.isfinite().all()):
            raise NumericsError(
                f"The logits of {self.name} for {list(choices)} hold NaN or infinity. Try dtype=float32, and check the "
                "weights."
            )
        return torch.softmax(logits, dim=-1).tolist()

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """Return the token of each choice at the beginning of an answer.

        A space goes before the word, unless what the template leaves there is white space or a special token: after
        "ASSISTANT:" an answer begins with " Yes", after "<|assistant|>\\n" with "Yes".

        Raises:
            ConfigError: a choice is not a single token there, or one that the tokenizer does not know.
        """
        before = self._render(_PLACEHOLDER)
        closed = before[-1:].isspace() or any(before.endswith(token) for token in self._tokenizer.all_special_tokens)
        start = self._ids(before)
        found: list[int] = []
        for choice in choices:
            ids = self._ids(f"{before}{'' if closed else ' '}{choice}")
            if ids[: len(start)] != start or len(ids) != len(start) + 1 or ids[-1] == self._tokenizer.unk_token_id:
                raise ConfigError(
                    f"The answer choice {choice!r} is not a single token of {self.name} after its prompt's end "
                    f"{before[-20:]!r}; choices must be single tokens."
                )
            found.append(ids[-1])
        return found

    @torch.inference_mode()
    def _run(self, inputs: Any, **options: Any) -> Any:
        # what a model's own generation config may say of sampling is not wanted here
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        return self.model.generate(**inputs, **greedy, pad_token_id=self._tokenizer.pad_token_id, **options)

    def _inputs(self, image: Images, prompt: Sequence[str]) -> Any:
        if len(image.images) != len(prompt):
            raise ShapeError(f"{len(image.images)} images and {len(prompt)} prompts; pass as many.")
        texts = [self._render(text) for text in prompt]
        inputs = self.processor(
            text=texts,
            images=[[picture] for picture in image.images],
            padding=True,
            add_special_tokens=not self._has_start(texts[0]),
            return_tensors="pt",
        )
        return inputs.to(self.model.device, self.model.dtype)

    def _render(self, question: str) -> str:
        """Return the text that the answer follows, the image's placeholder in it."""
        token = getattr(self.processor, "image_token", None)
        question = question.replace(token, "").strip() if token else question.strip()  # one image, one placeholder
        if self.processor.chat_template is None:
            return f"{token}\n{question}" if token else question
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _has_start(self, text: str) -> bool:
        """Whether a template has written the token that the tokenizer would put at a text's beginning."""
        start = self._tokenizer.bos_token
        return start is not None and text.startswith(start)


def load_transformers(name: str, *, device: str = "auto", dtype: str = "float32") -> TransformersModel:
    """Load a model folder or Hub repository with transformers: safetensors only, and no code of the repository's.

    Raises:
        ConfigError: transformers is not installed, or an argument is not known.
        CheckpointError: transformers cannot load it.
    """
    one_of("dtype", dtype, DTYPES)
    target = pick_device(device)
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise ConfigError(f"transformers:{name} cannot be loaded ({error}); {_NEEDED}.") from None
    folder = _local(name)
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype), use_safetensors=True, weights_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any library below it
        raise _not_loaded(name, error) from None
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CheckpointError(f"transformers:{name} has no processor for images and text; only such models are asked.")
    return TransformersModel(model.requires_grad_(False).to(target), processor, name)


def hub_commit(name: str) -> str:
    """Return the commit of a Hub repository that transformers reads, from its cache if the Hub is out of reach.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: there is no such model.
    """
    try:
        from transformers.utils.hub import cached_file
    except ImportError as error:
        raise ConfigError(f"transformers:{name} cannot be loaded ({error}); {_NEEDED}.") from None
    try:
        file = cached_file(name, "config.json")
    except Exception as error:  # of any library below it
        raise _not_loaded(name, error) from None
    return Path(str(file)).parent.name  # the cache keeps each commit in a folder of this name


def _local(name: str) -> str:
    """Return the full path of a folder, or a Hub name as it is."""
    folder = Path(name).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name


def _not_loaded(name: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [""]
    return CheckpointError(
        f"transformers:{name} cannot be loaded ({type(error).__name__}: {lines[0].rstrip('.')}). Give a folder or a "
        "Hub repository with an image-text-to-text model in safetensors. A model that brings its own code can be "
        "wrapped as python:MODULE:FACTORY."
    )
