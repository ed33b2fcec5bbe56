"""Cobra: a loaded model with its tokenizer and image transform; what `cobra.load` returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image

from cobra.config import one_of
from cobra.errors import ConfigError, ShapeError
from cobra.generation.engine import choice_probabilities, decode
from cobra.generation.sampling import Sampling
from cobra.hub import open_image, resolve_model_folder
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaState
from cobra.models.vlm import CobraVLM
from cobra.models.weights import load_model_folder
from cobra.runtime import pick_device
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImageState:
    """One or several images as the language model remembers them; stands in for images in every call."""

    state: MambaState

    def __len__(self) -> int:
        return self.state.batch_size

    def __getitem__(self, rows: Sequence[int] | torch.Tensor | slice | int) -> ImageState:
        """Select or repeat images; what comes back is always an ImageState, of one image for a single number."""
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"image {rows} of {len(self)}")
            rows = [rows]
        return ImageState(self.state[rows])


# A PIL image, a path, an http(s) URL, an array [height, width(, channels)] of uint8, or a state made from one.
ImageLike = Image.Image | str | Path | np.ndarray | ImageState


class Cobra:
    """A vision-language model to ask questions of."""

    def __init__(self, model: CobraVLM, tokenizer: Tokenizer, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.prompt = prompt_format(model.config.llm.prompt)

    @overload
    def generate(
        self,
        image: ImageLike | None,
        prompt: str,
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        prompt: list[str],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        seed: int = ...,
    ) -> str | list[str]: ...

    @torch.inference_mode()
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike] | None,
        prompt: str | Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str | list[str]:
        """Answer a question about an image; lists in, list out.

        Args:
            image: one image or a list (`ImageLike`), or None for text alone. One image serves every prompt of a list.
            prompt: one question or a list; one question is asked of every image of a list.
            max_new_tokens: limit of the answer's length in tokens.
            temperature: 0 is greedy; above, tokens are drawn.
            top_p: draw from the smallest set of tokens with this probability.
            seed: of the draws; the same call gives the same answer.

        Raises:
            ShapeError: as many prompts as images are needed when both are lists.
            DataError: an image is missing or does not decode.
        """
        state, prompts = self._pair(image, prompt)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        answers: list[list[int]] = [[] for _ in prompts]
        for step in decode(
            self.model.llm,
            [self._encode(text) for text in prompts],
            state,
            max_new_tokens=max_new_tokens,
            end_id=self.tokenizer.end_id,
            sampling=sampling,
        ):
            for row, token in step:
                answers[row].append(token)
        texts = [self.tokenizer.decode(ids).strip() for ids in answers]
        return texts if _is_list(image) or _is_list(prompt) else texts[0]

    def stream(
        self,
        image: ImageLike | None,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; a character of several bytes is never cut. Arguments as in `generate`."""
        ids: list[int] = []
        done = ""
        with torch.inference_mode():
            state, prompts = self._pair(image, prompt)
            steps = decode(
                self.model.llm,
                [self._encode(text) for text in prompts],
                state,
                max_new_tokens=max_new_tokens,
                end_id=self.tokenizer.end_id,
                sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            )
        while True:
            with torch.inference_mode():  # not across a yield: the caller's code runs there
                step = next(steps, None)
            if step is not None:
                ids.append(step[0][1])
            text = self.tokenizer.decode(ids)
            if step is None or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                if len(text) > len(done):
                    yield text[len(done) :]
                done = text
            if step is None:
                return

    @torch.inference_mode()
    def score(
        self, image: ImageLike | Sequence[ImageLike] | None, prompt: str | Sequence[str], choices: Sequence[str]
    ) -> Any:
        """Return the probability of each choice as the answer's first token; they sum to 1.

        Args:
            image: as in `generate`.
            prompt: as in `generate`.
            choices: answers that are single tokens, such as "Yes" and "No".

        Returns:
            One probability per choice; a list of such lists when `image` or `prompt` is a list.

        Raises:
            ConfigError: a choice is not a single token.
        """
        if not choices:
            raise ConfigError("score needs at least one choice, such as ['Yes', 'No'].")
        choice_ids = [self.tokenizer.single_id(choice) for choice in choices]
        state, prompts = self._pair(image, prompt)
        ids = [self._encode(text) for text in prompts]
        rows = choice_probabilities(self.model.llm, ids, state, choice_ids).tolist()
        return rows if _is_list(image) or _is_list(prompt) else rows[0]

    @torch.inference_mode()
    def encode_image(self, image: ImageLike | Sequence[ImageLike]) -> ImageState:
        """Read images into the language model's state, once for all questions about them."""
        if isinstance(image, ImageState):
            return image
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise ShapeError("The list of images is empty.")
        is_state = [isinstance(item, ImageState) for item in images]
        if any(is_state) and not all(is_state):
            raise ShapeError("A list of images holds both states and images; encode the images first, or none.")
        if all(is_state):
            return ImageState(MambaState.concat([item.state for item in images]))  # type: ignore[union-attr]
        views = zip(*(self.model.vision.transform(open_image(item)) for item in images), strict=True)  # type: ignore[arg-type]
        pixels = [torch.stack(view).to(self.model.device) for view in views]
        _, state = self.model.read_images(pixels)
        return ImageState(state)

    def _encode(self, message: str) -> list[int]:
        return self.tokenizer.encode(self.prompt.question(message))

    def _pair(
        self, image: ImageLike | Sequence[ImageLike] | None, prompt: str | Sequence[str]
    ) -> tuple[MambaState | None, list[str]]:
        """Return a state row and a prompt for every answer wanted."""
        prompts = list(prompt) if not isinstance(prompt, str) else [prompt]
        if not prompts:
            raise ShapeError("The list of prompts is empty.")
        if image is None:
            return None, prompts
        images = self.encode_image(image)
        if len(prompts) == 1:
            prompts = prompts * len(images)
        if len(images) == 1:
            images = images[[0] * len(prompts)]
        if len(images) != len(prompts):
            raise ShapeError(f"{len(images)} images and {len(prompts)} prompts; pass as many, or one of either.")
        return images.state, prompts


def load(name: str | Path, *, device: str = "auto", dtype: str = "float32") -> Cobra:
    """Load a model from a run folder or a model folder.

    Args:
        name: the folder.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32" or "bfloat16", of the weights; the scan's own parameters and states stay float32.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged; the message says what to do.
    """
    one_of("dtype", dtype, ("float32", "bfloat16"))
    folder = resolve_model_folder(name)
    target = pick_device(device)
    model = cast_parameters(load_model_folder(folder), getattr(torch, dtype)).to(target)
    model.requires_grad_(False)
    return Cobra(model, Tokenizer(folder / model.config.llm.tokenizer), model.config.name)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, ImageState) and len(value) > 1)
