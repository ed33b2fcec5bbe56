"""Settings of an exported Cobra model.

This file is shipped with every exported model and needs nothing but transformers.
"""

from __future__ import annotations

from typing import Any

from transformers import MambaConfig, PreTrainedConfig
from transformers.utils.versions import require_version

require_version("transformers>=5.23", "pip install -U transformers")  # older ones place images otherwise


class CobraConfig(PreTrainedConfig):
    """Vision towers, projector and Mamba language model, as Cobra's own `config.json` describes them.

    Args:
        name: of the model.
        vision: `towers` (timm name, `image_size`, `layer`, `args`) and `resize`.
        inputs: for each tower the `view` of the image that it reads, and its `mean` and `std` of a channel in 0..1.
        projector: `kind`, `expansion` and `grid`.
        llm: sizes, vocabulary and prompt format. The sizes also stand in `text_config`, where transformers wants them.
        max_text_length: text tokens of one training example.
        image_token_id: stands in the prompt for the image, once for each image token.
        text_config: of transformers' own Mamba.
    """

    model_type = "cobra"
    sub_configs_defaults = {"text_config": MambaConfig}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        name: str = "cobra",
        vision: dict[str, Any] | None = None,
        inputs: list[dict[str, Any]] | None = None,
        projector: dict[str, Any] | None = None,
        llm: dict[str, Any] | None = None,
        max_text_length: int = 2048,
        image_token_id: int = 50277,
        text_config: dict[str, Any] | MambaConfig | None = None,
        **kwargs: Any,
    ) -> None:
        self.name = name
        self.vision = vision or {"towers": [], "resize": "resize-naive"}
        self.inputs = inputs or []
        self.projector = projector or {"kind": "linear"}
        self.llm = llm or {}
        self.max_text_length = max_text_length
        self.image_token_id = image_token_id
        self.text_config = text_config if isinstance(text_config, MambaConfig) else MambaConfig(**(text_config or {}))
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)
