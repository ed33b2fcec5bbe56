"""Cobra: a loaded model with its tokenizer and image transform; what `cobra.load` returns."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from PIL import Image

from cobra.config import weight_format
from cobra.errors import ConfigError, ShapeError
from cobra.generation.chat import Chat
from cobra.generation.engine import choice_probabilities, decode, prefill, start_state
from cobra.generation.options import GenerateOptions, checked
from cobra.generation.prompts import Prompt
from cobra.generation.stopping import AnswerText
from cobra.hub import open_image, upload_folder
from cobra.loading import read_model, settings
from cobra.models.export import check_replaceable, model_card
from cobra.models.quantized import quantize_projections
from cobra.models.state import MambaState, state_bytes
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.runtime import pick_device, total_memory
from cobra.text.prompt import prompt_format
from cobra.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class ImageState:
    """One or several images as the language model remembers them; stands in for images in every call."""

    state: MambaState

    def __repr__(self) -> str:
        return f"ImageState({len(self)} image{'s' * (len(self) != 1)}, {self.state!r})"

    def __len__(self) -> int:
        return self.state.batch_size

    def __getitem__(self, rows: Sequence[int] | torch.Tensor | slice | int) -> ImageState:
        """Select or repeat images; what comes back is always an ImageState, of one image for a single number."""
        if isinstance(rows, int):
            if not -len(self) <= rows < len(self):
                raise IndexError(f"image {rows} of {len(self)}")
            rows = [rows]
        return ImageState(self.state[rows])


@dataclass(frozen=True)
class Pixels:
    """An image as the vision encoder reads it: one uint8 tensor [3, size, size] for each size that it wants."""

    views: list[torch.Tensor]


# A PIL image, a path, an http(s) URL, a uint8 array [height, width(, channels)], or what was made from one of these.
ImageLike = Image.Image | str | Path | np.ndarray | Pixels | ImageState

# Image tokens that are read at once: 44 images of 729 tokens; 0.6 GiB for the widest activation of Mamba-2.8B in bf16.
IMAGE_TOKENS = 2**15
MAX_BATCH_SIZE = 512  # more questions at once are hardly faster


class Cobra:
    """A vision-language model to ask questions of."""

    def __init__(self, model: CobraVLM, tokenizer: Tokenizer, name: str) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.prompt = prompt_format(model.config.llm.prompt)

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return f"Cobra({self.name!r}, {count:,} parameters on {self.model.device})"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a model folder, whole or not at all, that `cobra.load` reads; return it.

        Raises:
            CheckpointError: the folder exists and is not a model folder, or cannot be made.
            ConfigError: the model is quantised.
        """
        if not isinstance(folder, (str, Path)):
            raise ConfigError(f"folder={folder!r} is no path; name the folder to write.")
        folder = Path(folder).expanduser()
        check_replaceable(folder)
        save_model_folder(self.model, self.tokenizer.file, folder)
        return folder

    def push_to_hub(self, repository: str, *, private: bool = False) -> str:
        """Upload the model folder with a model card to `organisation/name` on the Hugging Face Hub; return the address.

        Raises:
            CheckpointError: the Hub refuses or cannot be reached.
        """
        with TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model")
            (folder / "README.md").write_text(model_card(self.model.config, repository), encoding="utf-8")
            return upload_folder(folder, repository, private=private, message="Upload a Cobra model")

    @overload
    def generate(self, image: ImageLike | None, prompt: str | Prompt, **options: Unpack[GenerateOptions]) -> str: ...

    @overload
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: list[str],
        **options: Unpack[GenerateOptions],
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: str | Prompt | Sequence[str | Prompt],
        **options: Unpack[GenerateOptions],
    ) -> str | list[str]: ...

    @torch.inference_mode()
    def generate(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: str | Prompt | Sequence[str | Prompt],
        **options: Unpack[GenerateOptions],
    ) -> str | list[str]:
        """Answer a question about an image; lists in, list out.

        Args:
            image: one image (`ImageLike`), or None for text alone, or a list of these. One image serves every prompt of
                a list. It is read before the prompt.
            prompt: one question or a list; one question is asked of every image of a list. A question is a string, or a
                `cobra.Prompt` with images in the middle of its text.
            max_new_tokens: limit of the answer's length in tokens; 128.
            stop: a string or a list of strings. The answer ends before the first of them that appears in it. They are
                compared with the text as the model writes it, white space at its beginning included.
            temperature: 0, the default, is greedy; above, tokens are drawn, the more evenly the higher it is.
            top_k: draw from this many likeliest tokens; 0, the default: from all.
            top_p: draw from the smallest set of tokens with this probability; 1, the default: from all.
            min_p: draw from tokens at least this many times as likely as the likeliest; 0, the default: from all.
            repetition_penalty: above 1, tokens that are in the prompt or the answer become less likely; 1.
            seed: of the draws; the same call gives the same answer. Answer r of a list is the one that a call for it
                alone gives with `seed + r`. A list gives each answer its own seed. 0.

        White space around an answer is removed. `cobra.generation.sampling.Sampling` defines the options exactly.

        Raises:
            ShapeError: as many prompts as images are needed when both are lists.
            DataError: an image is missing or does not decode.
            ConfigError: an option is out of its range.
            NumericsError: the model's output is NaN or infinite.
        """
        texts, steps = self._answer(image, prompt, **options)
        for _ in steps:
            pass
        answers = [text.finish() for text in texts]
        return answers if _is_list(image) or _is_list(prompt) else answers[0]

    def stream(
        self, image: ImageLike | None, prompt: str | Prompt, **options: Unpack[GenerateOptions]
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the pieces join to what `generate` returns. Arguments as in `generate`.

        Closing the iterator ends the work.
        A character of several bytes is never cut, and nothing of a stop string is yielded: text that might be the
        beginning of one waits until that is decided.

        Raises:
            ShapeError: at once, several images or prompts; all other errors as in `generate`.
        """
        with torch.inference_mode():
            texts, steps = self._answer(image, prompt, **options)
        if len(texts) > 1:
            raise ShapeError(f"stream gives one answer, and this asks for {len(texts)}; use generate for several.")

        def pieces() -> Iterator[str]:
            is_last = False
            with closing(steps):
                while not is_last:
                    is_last = next(steps, None) is None
                    piece = texts[0].finish() if is_last else texts[0].take()
                    if piece:
                        yield piece

        return pieces()

    @torch.inference_mode()
    def score(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: str | Prompt | Sequence[str | Prompt],
        choices: Sequence[str],
    ) -> Any:
        """Return the probability of each choice as the answer's first token; they sum to 1.

        Args:
            image: as in `generate`.
            prompt: as in `generate`.
            choices: answers that are single tokens, such as "Yes" and "No".

        Returns:
            One probability per choice; a list of such lists when `image` or `prompt` is a list.

        Raises:
            ConfigError: a choice is not a single token of this model's tokenizer.
        """
        choice_ids = self.choice_ids(choices)
        state, ids = self._read_prompts(image, prompt)
        rows = choice_probabilities(self.model.llm, ids, state, choice_ids).tolist()
        return rows if _is_list(image) or _is_list(prompt) else rows[0]

    def choice_ids(self, choices: Sequence[str]) -> list[int]:
        """Return the token id of each choice.

        Raises:
            ConfigError: choices is no list or empty, or one is not a single token of this model's tokenizer.
        """
        if isinstance(choices, str):
            raise ConfigError(f"score needs a list of choices, such as ['Yes', 'No'], not the text {choices!r}.")
        if not choices:
            raise ConfigError("score needs at least one choice, such as ['Yes', 'No'].")
        return [self.tokenizer.single_id(choice) for choice in choices]

    def prepare_image(self, image: Image.Image | str | Path | np.ndarray) -> Pixels:
        """Read, decode and resize an image; the result stands in for it in `encode_image`. Safe in several threads.

        Raises:
            DataError: the image is missing or does not decode.
        """
        return Pixels(self.model.vision.transform(open_image(image)))

    def max_batch_size(self) -> int:
        """Return how many questions about as many images should fit into memory at once: a power of two up to 512.

        A quarter of what the device has left beside the weights is for the rows' states, of which there are three at a
        time: the image's, the row's own, and the one after the next token. (On a GPU up to three more, of captured
        steps and of rows that move, are within the other quarters.)
        """
        weights = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        free = total_memory(self.model.device) - weights
        rows = max(1, free // 4 // (3 * state_bytes(self.model.config.llm)))
        return min(MAX_BATCH_SIZE, 1 << (rows.bit_length() - 1))

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
        prepared = [item if isinstance(item, Pixels) else self.prepare_image(item) for item in images]  # type: ignore[arg-type]
        at_once = max(1, IMAGE_TOKENS // self.model.num_image_tokens)
        parts = [self._read(prepared[start : start + at_once]) for start in range(0, len(prepared), at_once)]
        return ImageState(parts[0] if len(parts) == 1 else MambaState.concat(parts))

    def _read(self, images: Sequence[Pixels]) -> MambaState:
        views = zip(*(image.views for image in images), strict=True)
        _, state = self.model.read_images([torch.stack(view).to(self.model.device) for view in views])
        return state

    def _answer(
        self,
        image: ImageLike | Sequence[ImageLike | None] | None,
        prompt: str | Prompt | Sequence[str | Prompt],
        **options: Unpack[GenerateOptions],
    ) -> tuple[list[AnswerText], Generator[object]]:
        """Return the texts of all answers, empty yet, and an iterator whose steps make them grow."""
        limit, stops, sampling = checked(**options)  # before an image is read
        state, ids = self._read_prompts(image, prompt)
        texts = [AnswerText(self.tokenizer.decode, stops) for _ in ids]

        def is_over(row: int, token: int) -> bool:
            texts[row].add(token)
            return texts[row].is_over

        steps = decode(
            self.model.llm,
            ids,
            state,
            max_new_tokens=limit,
            end_id=self.tokenizer.end_id,
            sampling=sampling,
            is_over=is_over,
        )
        return texts, steps

    def _read_prompts(
        self, image: ImageLike | Sequence[ImageLike | None] | None, prompt: str | Prompt | Sequence[str | Prompt]
    ) -> tuple[MambaState | None, list[list[int]]]:
        """Return for every answer wanted the state after its last image, and the tokens of the text that follows."""
        state, prompts = self._pair(image, prompt)
        texts = [one.framed(self.prompt) if isinstance(one, Prompt) else [self.prompt.question(one)] for one in prompts]
        ids = [self.tokenizer.encode(parts[-1]) for parts in texts]
        if not any(isinstance(one, Prompt) and one.images for one in prompts):
            return state, ids
        rows = [start_state(self.model.llm)] * len(prompts) if state is None else [state[[i]] for i in range(len(ids))]
        for i, one in enumerate(prompts):
            if isinstance(one, Prompt):
                rows[i] = self._read_pieces(rows[i], texts[i], one.images)
        return MambaState.concat(rows), ids

    def _read_pieces(self, state: MambaState, texts: Sequence[str], images: Sequence[Any]) -> MambaState:
        """Return the state after images and the text before each of them, one row."""
        for text, image in zip(texts, images, strict=False):  # the last text has no image behind it
            if isinstance(image, (ImageState, list, tuple)) or image is None:
                raise ShapeError(f"An image in a prompt is one image and no state, not {type(image).__name__}.")
            if ids := self.tokenizer.encode(text):
                _, state = prefill(self.model.llm, [ids], state)
            pixels = image if isinstance(image, Pixels) else self.prepare_image(image)
            views = [view[None].to(self.model.device) for view in pixels.views]
            _, state = self.model.llm(self.model.embed_images(views), state=state)
        return state

    def _pair(
        self, image: ImageLike | Sequence[ImageLike | None] | None, prompt: str | Prompt | Sequence[str | Prompt]
    ) -> tuple[MambaState | None, list[str | Prompt]]:
        """Return a state row and a prompt for every answer wanted."""
        prompts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        for one in prompts:
            if not isinstance(one, (str, Prompt)):
                raise ConfigError(f"A prompt is text or a cobra.Prompt, not {one!r}.")
        if not prompts:
            raise ShapeError("The list of prompts is empty.")
        if image is None:
            return None, prompts
        images = self._states(image)
        if len(prompts) == 1:
            prompts = prompts * len(images)
        if len(images) == 1:
            images = images[[0] * len(prompts)]
        if len(images) != len(prompts):
            raise ShapeError(f"{len(images)} images and {len(prompts)} prompts; pass as many, or one of either.")
        return images.state, prompts

    def _states(self, image: ImageLike | Sequence[ImageLike | None]) -> ImageState:
        """Encode images; None in a list stands for the start of a text."""
        if not isinstance(image, (list, tuple)) or all(one is not None for one in image):
            return self.encode_image(image)  # type: ignore[arg-type]
        start = start_state(self.model.llm)
        given = [one for one in image if one is not None]
        states = self.encode_image(given).state if given else start
        order = iter(range(1, 1 + len(given)))
        return ImageState(MambaState.concat([start, states])[[0 if one is None else next(order) for one in image]])

    def chat(self, image: ImageLike | None = None, **options: Unpack[GenerateOptions]) -> Chat:
        """Begin a conversation about an image, or of text alone: `chat.ask(question)`, `chat.stream(question)`.

        The image is read once, here, and every turn once: it costs the same after a hundred others.

        Args:
            image: one image (`ImageLike`), or None.
            options: as of `generate`, for every turn; a turn may bring its own.

        Raises:
            ShapeError: several images.
            DataError: the image is missing or does not decode.
            ConfigError: an option is out of its range.
        """
        if isinstance(image, (list, tuple)) or (isinstance(image, ImageState) and len(image) != 1):
            raise ShapeError(f"A chat is about one image, and these are {len(image)}; begin a chat for each.")
        source = str(image) if isinstance(image, (str, Path)) else None
        prefix = None if image is None else self.encode_image(image).state
        return Chat(self.model.llm, self.tokenizer, self.prompt, prefix, source=source, **options)


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "float32",
    quantize: str | None = None,
    vision: Mapping[str, Any] | str | Path | None = None,
    llm: Mapping[str, Any] | str | Path | None = None,
) -> Cobra:
    """Load a model.

    Args:
        name: a run folder or model folder; a run in the public release's layout; a released model (`available_models`);
            or a repository on the Hugging Face Hub that holds one of these, with `/folder` for a folder in it. The
            folder that the environment variable COBRA_WEIGHTS names is searched before the Hub.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32" or "bfloat16", of the weights; the scan's own parameters and states stay float32.
        quantize: "int8" or "int4", of the language model's projections and head, which are then smaller and faster to
            read for every token: for answering only, neither to train nor to save. The rest keeps `dtype`. A scale for
            every row (int8) or every 64 columns (int4). None: not at all. int4 changes the answers: about one greedy
            token in nine of the tiny model.
        vision: settings of `cobra.config.VisionConfig` that replace what the model's own config says, as a mapping or a
            YAML file: for parts that its ids do not name, and for local weight files.
        llm: settings of `cobra.config.LLMConfig`, likewise.

    Raises:
        CheckpointError: the model is missing, incomplete, damaged or does not fit; the message says what to do.
        ConfigError: an argument, or a setting in one, is not known or has no effect.
    """
    weight_format(dtype, quantize)
    target = pick_device(device)
    model, tokenizer = read_model(
        name, settings(vision, "vision"), settings(llm, "llm"), device=target, dtype=getattr(torch, dtype)
    )
    model.requires_grad_(False)
    if quantize is not None:
        quantize_projections(model.llm, quantize)
    return Cobra(model, tokenizer, model.config.name)


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, ImageState) and len(value) > 1)
