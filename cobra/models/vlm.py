"""CobraVLM: vision encoder, projector and Mamba language model in one module (paper, section 3).

The image always comes first, so its tokens are a *prefix* whose Mamba state does not depend on the text. The model
therefore reads each image once, and every text that belongs to it starts from the image's state: several rows of a
batch may share an image, and gradients of all of them flow back through its state. An image with one text is simply
read with it as one sequence, which is the same and saves a pass.

Shapes: I images, R text rows, T image tokens (the patches, or fewer where the projector pools), S text tokens,
D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cobra.config import LLMConfig, ModelConfig
from cobra.errors import ConfigError, ShapeError
from cobra.models.loss import labelled_loss
from cobra.models.mamba import MambaLM
from cobra.models.projector import Projector
from cobra.models.state import MambaState
from cobra.models.vision import VisionEncoder
from cobra.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CobraOutput:
    """What `CobraVLM.forward` returns.

    Attributes:
        text: final hidden states at the text positions, [R, S, D].
        prefix: final hidden states at the image positions, [I, T, D]; None for text rows.
        image_index: int64 [R], the image of each row; None: row r has image r.
        state: Mamba state after each row's last real token.
        loss_sum: cross-entropy summed over the labelled tokens, float32 (float64 in a float64 model);
            None without labels.
        num_labels: how many labelled tokens that were; a tensor, so that no device waits for the host.
    """

    text: Tensor
    prefix: Tensor | None
    image_index: Tensor | None
    state: MambaState
    head: Callable[[Tensor], Tensor]
    loss_sum: Tensor | None = None
    num_labels: Tensor | None = None

    @property
    def loss(self) -> Tensor | None:
        """Mean cross-entropy over the labelled tokens of this batch."""
        if self.loss_sum is None or self.num_labels is None:
            return None
        return self.loss_sum / self.num_labels.clamp(min=1)

    @property
    def hidden(self) -> Tensor:
        """Final hidden states over image and text positions, [R, T + S, D] ([R, S, D] for text rows)."""
        if self.prefix is None:
            return self.text
        prefix = self.prefix if self.image_index is None else self.prefix[self.image_index]
        return torch.cat([prefix, self.text], dim=1)

    @property
    def logits(self) -> Tensor:
        """Logits at every position, [R, T + S, V]; computed when asked for, as training never needs them all."""
        return self.head(self.hidden)


def check_vocabulary(tokenizer: Tokenizer, config: LLMConfig, remedy: str) -> None:
    """Refuse a tokenizer that cannot be the language model's: one with more entries than it has, or far fewer.

    Fewer are normal, as vocabularies are padded to a multiple that is not always known: GPT-NeoX's 50277 entries are
    50280 in Mamba-2.8B and 50432 in Mamba-7B. Padding is under 1 % of a vocabulary, and at most 256.

    Raises:
        ConfigError: it does not fit; the message ends with `remedy`.
    """
    rows, entries = config.padded_vocab_size, len(tokenizer)
    if not 0 <= rows - entries < max(config.pad_vocab_multiple, min(256, rows // 128)):
        how = "less" if rows < entries else "far more"
        raise ConfigError(
            f"The language model's vocabulary of {rows} is {how} than the tokenizer's {entries} entries in "
            f"{tokenizer.file}: the two do not belong together. {remedy}"
        )


class CobraVLM(nn.Module):
    """Images and token ids -> next-token predictions.

    Attributes:
        num_image_tokens: image tokens that the language model reads for one image, T.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Build the parts that `config` describes.

        Raises:
            ConfigError: no such encoder, or the projector's grid is finer than the encoder's patches.
            ShapeError: the projector pools a square, and the patches fill none.
        """
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = Projector(config.projector, self.vision.width, config.llm.d_model)
        self.num_image_tokens = self.projector.num_tokens(self.vision.num_patches)
        self.llm = MambaLM(config.llm)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.llm.backbone.embedding.weight.device

    def embed_images(self, pixels: list[Tensor]) -> Tensor:
        """Views of images, uint8 [I, 3, H, W] each -> image tokens [I, T, D]."""
        frozen = not any(parameter.requires_grad for parameter in self.vision.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features = self.vision(pixels)
        return self.projector(features)

    def read_images(self, pixels: list[Tensor]) -> tuple[Tensor, MambaState]:
        """Read images as prefixes: hidden states [I, T, D] and the state after each image."""
        return self.llm(self.embed_images(pixels))

    def forward(
        self,
        input_ids: Tensor,
        *,
        pixels: list[Tensor] | Tensor | None = None,
        labels: Tensor | None = None,
        image_index: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> CobraOutput:
        """Run a batch that is either all image rows or all text rows.

        Args:
            input_ids: int64 [R, S], padded on the right.
            pixels: the image transform's views, uint8 [I, 3, H, W] each; a single view may stand without a list;
                None for a batch of text rows.
            labels: int64 [R, S], the token wanted at each text position, `IGNORE_INDEX` where none is. The token at a
                position is predicted from the one before it, the first text token from the last image token. Image
                positions carry no labels.
            image_index: int64 [R], which image each row belongs to; None: row r has image r.
            lengths: int64 [R], real tokens of each row; None: all S. It matters for the returned state alone: as
                everything is causal, padding on the right changes no real position.

        Raises:
            ShapeError: numbers of rows, images or labels that do not fit together.
            DataError: a label that is no token, see `labelled_loss`.
        """
        if labels is not None and labels.shape != input_ids.shape:
            raise ShapeError(f"labels {list(labels.shape)} and input_ids {list(input_ids.shape)} differ in shape.")
        if pixels is None and image_index is not None:
            raise ShapeError("image_index names images, but there are none; pass pixels, or leave image_index out.")
        embedded = self.llm.embed(input_ids)  # [R, S, D]
        prefix, state = None, None
        if pixels is None:
            text, state = self.llm(embedded, lengths=lengths)
        else:
            images = self.embed_images([pixels] if isinstance(pixels, Tensor) else pixels)  # [I, T, D]
            num_rows = images.shape[0] if image_index is None else image_index.shape[0]
            if num_rows != input_ids.shape[0]:
                raise ShapeError(
                    f"input_ids has {input_ids.shape[0]} rows but there are images for {num_rows}; "
                    "pass image_index to say which image each row belongs to."
                )
            if image_index is None:  # nothing is shared: image and text are one sequence, in one pass
                num_tokens = images.shape[1]
                whole = None if lengths is None else lengths + num_tokens
                hidden, state = self.llm(torch.cat([images, embedded], dim=1), lengths=whole)
                prefix, text = hidden[:, :num_tokens], hidden[:, num_tokens:]
            else:
                prefix, state = self.llm(images)
                text, state = self.llm(embedded, state=state[image_index], lengths=lengths)
        loss_sum, num_labels = None, None
        if labels is not None:
            last = None if prefix is None else prefix[:, -1:]  # [I, 1, D], predicts the first text token
            if last is not None and image_index is not None:
                last = last.index_select(0, image_index)  # with repeatable gradients, see MambaState
            loss_sum, num_labels = self._loss(last, text, labels)
        return CobraOutput(
            text=text,
            prefix=prefix,
            image_index=image_index,
            state=state,
            head=self.llm.head,
            loss_sum=loss_sum,
            num_labels=num_labels,
        )

    def _loss(self, last: Tensor | None, text: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the cross-entropy of the labels, each predicted from the hidden state before its position."""
        if last is None:
            before, labels = text[:, :-1], labels[:, 1:]
        else:
            before = torch.cat([last, text[:, :-1]], dim=1)
        return labelled_loss(self.llm.head, before, labels)
