"""What lmms-eval's tasks ask, in Cobra's terms: one image, one message, the options of `Cobra.generate`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cobra.api import GenerateOptions
from cobra.errors import ConfigError
from cobra.text.prompt import PromptFormat

log = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128  # where a task sets no limit
_KNOWN = ("until", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Query:
    """One image or none, and the message about it."""

    image: Any | None  # what `Cobra.encode_image` takes
    message: str


def read_messages(messages: Sequence[Mapping[str, Any]], prompt: PromptFormat) -> Query:
    """Return what a conversation asks; the last turn is the user's. What a system message says goes before the user's.

    Wherever the image stands, Cobra reads it before the text.

    Raises:
        ConfigError: several images, another medium than images and text, or an assistant who has the last word.
    """
    images: list[Any] = []
    turns: list[tuple[str, str]] = []
    said: list[str] = []  # since the assistant's last answer
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        other = {part["type"] for part in parts} - {"text", "image"}
        if other:
            raise ConfigError(f"The task shows {', '.join(sorted(other))}; Cobra reads images and text alone.")
        images += [part["url"] for part in parts if part["type"] == "image"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if message["role"] == "assistant":
            turns.append(("\n".join(said), text))
            said = []
        else:
            said.append(text)
    if not said:
        raise ConfigError("The task's last message is not the user's, and Cobra does not continue a given answer.")
    if len(images) > 1:
        raise ConfigError(f"The task shows {len(images)} images at once; Cobra reads one image per conversation.")
    before = "".join(segment.text for segment in prompt.conversation(turns))
    whole = before + prompt.question("\n".join(said), is_first=not turns)
    # `Cobra.generate` wraps a message in the first user turn's words, so these two come back.
    return Query(images[0] if images else None, whole.removeprefix(prompt.before).removesuffix(prompt.after))


def read_visuals(visuals: Sequence[Any] | None, text: str, prompt: PromptFormat) -> Query:
    """Return what a task of the older kind asks: its visuals and its text."""
    parts: list[dict[str, Any]] = [{"type": "image", "url": visual} for visual in visuals or []]
    return read_messages([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], prompt)


def read_options(given: Mapping[str, Any]) -> GenerateOptions:
    """Return a task's generation settings as options of `Cobra.generate`; greedy unless a temperature says otherwise.

    Raises:
        ConfigError: beam search.
    """
    kept = {name: value for name, value in given.items() if value is not None}
    if kept.pop("num_beams", 1) != 1:
        raise ConfigError(f"num_beams={given['num_beams']}: Cobra has no beam search; use --gen_kwargs num_beams=1.")
    unknown = sorted(kept.keys() - set(_KNOWN))
    if unknown:
        log.warning("Generation settings without effect on Cobra: %s.", ", ".join(unknown))
    until = kept.get("until", [])
    options: GenerateOptions = {
        "max_new_tokens": kept.get("max_new_tokens", MAX_NEW_TOKENS),
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
    }
    if "repetition_penalty" in kept:
        options["repetition_penalty"] = kept["repetition_penalty"]
    is_drawn = kept.get("do_sample", True) and kept.get("temperature", float(kept.get("do_sample", False))) > 0
    if is_drawn:  # tasks that are greedy carry any top_p
        options["temperature"] = kept.get("temperature", 1.0)
        for name in ("top_p", "top_k", "min_p"):
            if name in kept:
                options[name] = kept[name]
    return options


def image_key(image: Any) -> Hashable:
    """Return what is equal for equal images: lmms-eval decodes an image anew for each question about it."""
    if isinstance(image, Image.Image):
        return image.mode, image.size, hashlib.sha256(image.tobytes()).digest()
    return image if isinstance(image, str) else id(image)
