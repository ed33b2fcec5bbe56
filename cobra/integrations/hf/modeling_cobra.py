"""A Cobra vision-language model in transformers.

This file is shipped with every exported model and needs nothing but transformers, torch and timm. The language model is
transformers' own Mamba. Parameters have Cobra's names, but for `backbone.embeddings`, which transformers calls so.

Shapes: B rows, L length, I images, P patches, T image tokens of an image, D width, V vocabulary.
"""

# transformers' own declarations do not describe subclasses, and torch's take every attribute for a Tensor
# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportIndexIssue=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import GenerationMixin, MambaForCausalLM, PreTrainedModel
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput

from .configuration_cobra import CobraConfig


class CobraVisionTower(nn.Module):
    """One timm vision transformer, read at one inner block, without class and register tokens."""

    def __init__(self, tower: dict[str, Any], mean: list[float], std: list[float]) -> None:
        super().__init__()
        arguments = {"pretrained": False, "num_classes": 0, "img_size": tower["image_size"]}
        self.model = timm.create_model(tower["timm"], **(tower.get("args", {}) | arguments))
        self.layer = range(len(self.model.blocks))[tower["layer"]]
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        """uint8 images [I, 3, H, W] -> patch features [I, P, width]."""
        # numbers and no buffers: those would be rounded with the weights
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=images.device).view(3, 1, 1) * 255
            for values in (self.mean, self.std)
        )
        pixels = ((images - mean) / std).to(next(self.model.patch_embed.parameters()).dtype)
        return self.model.forward_intermediates(
            pixels, indices=[self.layer], norm=False, stop_early=True, output_fmt="NLC", intermediates_only=True
        )[0]


class CobraVision(nn.Module):
    """All towers, joined on the channel axis."""

    def __init__(self, config: CobraConfig) -> None:
        super().__init__()
        towers = list(zip(config.vision["towers"], config.inputs, strict=True))
        self.towers = nn.ModuleList(CobraVisionTower(tower, own["mean"], own["std"]) for tower, own in towers)
        sizes = {own["view"]: tower["image_size"] for tower, own in towers}
        self.sizes = [sizes[view] for view in sorted(sizes)]
        self.view_of_tower = [own["view"] for own in config.inputs]
        self.width = sum(tower.model.embed_dim for tower in self.towers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Views side by side, uint8 [I, 3, height, width] -> patch features [I, P, width]."""
        starts = [sum(self.sizes[:view]) for view in range(len(self.sizes))]
        views = [
            pixel_values[:, :, :size, start : start + size] for size, start in zip(self.sizes, starts, strict=True)
        ]
        features = [tower(views[view]) for tower, view in zip(self.towers, self.view_of_tower, strict=True)]
        return torch.cat(features, dim=-1)


class CobraGridPool(nn.Module):
    """Average the patches of a square grid down to a smaller square of tokens."""

    def __init__(self, side: int | None) -> None:
        """Take the tokens' side; None: half the patches', rounded up."""
        super().__init__()
        self.side = side

    def forward(self, tokens: Tensor) -> Tensor:
        """[I, P, D] -> [I, T, D]."""
        side = self.side or math.ceil(math.isqrt(tokens.shape[1]) / 2)
        return nn.functional.adaptive_avg_pool2d(_as_grid(tokens), side).flatten(2).transpose(1, 2)


class CobraPositionMixer(nn.Module):
    """A depthwise 3 x 3 convolution over the square of tokens, added to them (arXiv:2402.03766)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[I, T, D] -> [I, T, D]."""
        return tokens + self.peg(_as_grid(tokens)).flatten(2).transpose(1, 2)


def _as_grid(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


class CobraProjector(nn.Module):
    """Patch features to image tokens."""

    def __init__(self, config: CobraConfig, vision_width: int) -> None:
        super().__init__()
        kind, width = config.projector["kind"], config.text_config.hidden_size
        widths = [vision_width, width]
        if kind.startswith("fused"):
            widths.insert(1, config.projector["expansion"] * vision_width)
        if kind in ("gelu-mlp", "fused-gelu-mlp", "ldpv2"):
            widths.append(width)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.GELU(), nn.Linear(fan_in, fan_out)]
        if kind.endswith("ldpv2"):
            layers += [CobraGridPool(config.projector.get("grid")), CobraPositionMixer(width)]
        self.projector = nn.Sequential(*layers[1:])

    def forward(self, features: Tensor) -> Tensor:
        """[I, P, vision_width] -> [I, T, D]."""
        return self.projector(features)


# "Mamba" in the name is how transformers knows that the cache is called `cache_params`.
class CobraMambaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A vision-language model with Mamba: one image or none, then text."""

    config_class = CobraConfig
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _tied_weights_keys = {"llm.lm_head.weight": "llm.backbone.embeddings.weight"}  # noqa: RUF012
    _no_split_modules = ["CobraVisionTower", "MambaBlock"]  # noqa: RUF012
    # rounding the scan's own parameters to 16 bits moves every step of the recurrence
    _keep_in_fp32_modules_strict = ["A_log", "mixer.D", "dt_proj.bias"]  # noqa: RUF012
    supports_gradient_checkpointing = True  # of the language model
    _is_stateful = True  # a state cannot be taken back by some tokens

    def __init__(self, config: CobraConfig) -> None:
        super().__init__(config)
        self.vision = CobraVision(config)
        self.projector = CobraProjector(config, self.vision.width)
        self.llm = MambaForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding of token ids."""
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, which shares the embedding's weight."""
        return self.llm.lm_head

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "init_non_persistent_buffers"):  # timm computes some that no file holds
            module.init_non_persistent_buffers()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Views side by side, uint8 [I, 3, height, width] -> image tokens [I, T, D]."""
        return self.projector(self.vision(pixel_values))

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return a step's inputs: image and padding belong to the prompt, and the state remembers them."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            use_cache=use_cache,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if use_cache and not is_first_iteration:
            inputs.pop("attention_mask", None)
        return inputs

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_params: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MambaCausalLMOutput:
        """Read images and text.

        Args:
            input_ids: [B, L], with T `image_token_id` in the place of each image.
            pixel_values: what the image processor makes.
            attention_mask: [B, L], 0 at padding: on the left to generate, on the right to train.
            inputs_embeds: [B, L, D] instead of `input_ids` and `pixel_values`.
            cache_params: the state of what was read before; then one token per row follows.
            labels: [B, L], shifted inside; -100 where there is no loss, as at images.
            use_cache: whether to return the state.
            output_hidden_states: whether to return those after each block.
            logits_to_keep: this many last positions get logits; 0: all.
            kwargs: of the loss, such as `num_items_in_batch`.

        Raises:
            ValueError: padding where Mamba would read it, several tokens after a state, images that do not fit.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values)
        self._check_padding(attention_mask, makes_state=labels is None and use_cache is not False)
        if cache_params is not None and cache_params.has_previous_state() and inputs_embeds.shape[1] > 1:
            raise ValueError("Mamba's state continues by one token at a time; pass the whole text without a cache.")
        output = self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache_params=cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            logits_to_keep=logits_to_keep,
        )
        output.logits = self._only_tokens(output.logits)
        if labels is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=output.logits.shape[-1], **kwargs
            )
        return output

    def _embed(self, input_ids: Tensor | None, pixel_values: Tensor | None) -> Tensor:
        """Return embeddings, the images' tokens in their places."""
        if input_ids is None:
            raise ValueError("Pass input_ids or inputs_embeds.")
        is_image = input_ids == self.config.image_token_id
        embedded = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))  # `<image>` may have no row
        num_places = int(is_image.sum())
        if pixel_values is None:
            if num_places:
                raise ValueError(f"input_ids hold {num_places} places for image tokens; pass their pixel_values, too.")
            return embedded
        images = self.get_image_features(pixel_values).to(embedded.dtype)
        if num_places != images.shape[0] * images.shape[1]:
            raise ValueError(
                f"input_ids hold {num_places} places for image tokens, and {images.shape[0]} images have "
                f"{images.shape[1]} each; make both with the processor."
            )
        return embedded.masked_scatter(is_image.unsqueeze(-1), images)

    def _check_padding(self, attention_mask: Tensor | None, *, makes_state: bool) -> None:
        """Refuse padding that would reach a state: Mamba has no positions to mask, only an order of reading."""
        if attention_mask is None:
            return
        if self.training and not bool(attention_mask[:, 0].all()):
            raise ValueError("Pad on the right for training: Mamba's fused kernels do not skip padding before a text.")
        if not self.training and makes_state and not bool(attention_mask[:, -1].all()):
            raise ValueError("Pad on the left to generate: processor.tokenizer.padding_side = 'left'.")

    def _only_tokens(self, logits: Tensor) -> Tensor:
        """Return logits for the tokenizer's tokens: rows beyond the vocabulary fill up the embedding and mean none."""
        num_tokens = self.config.llm["vocab_size"]
        width = max(num_tokens, self.config.image_token_id + 1)
        return nn.functional.pad(logits[..., :num_tokens], (0, width - num_tokens), value=-torch.inf)
