"""Pictures and conversations to the inputs of an exported Cobra model.

This file is shipped with every exported model and needs nothing but transformers, torch and Pillow.
"""

from __future__ import annotations

from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .image_processing_cobra import CobraImageProcessor as CobraImageProcessor  # shipped with this file


class CobraProcessor(ProcessorMixin):
    """A tokenizer and an image processor; `<image>` in a prompt becomes as many tokens as the model has for an image.

    Args:
        image_processor: a `CobraImageProcessor`.
        tokenizer: knows `<image>`, and pads on the left, where padding does not touch Mamba's state.
        chat_template: puts the image first, as in training.
        num_image_tokens: of one image.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int = 729,
    ) -> None:
        self.num_image_tokens = num_image_tokens
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        videos: Any = None,
        audio: Any = None,
        audios: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenise prompts and resize the images whose places they name; see transformers' `ProcessorMixin`.

        Raises:
            ValueError: videos or audio; or as many `<image>` in the prompts as images are needed.
        """
        if videos or audio or audios:  # empty lists are what evaluation harnesses pass
            raise ValueError("Cobra reads images and text; leave out videos and audio.")
        is_empty = isinstance(images, (list, tuple)) and not any(
            image if isinstance(image, (list, tuple)) else True for image in images
        )
        return super().__call__(images=None if is_empty else images, text=text, **kwargs)  # type: ignore[arg-type]

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Return what stands in the prompt for one image."""
        return self.image_token * self.num_image_tokens
