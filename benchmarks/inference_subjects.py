"""The language models that `inference.py` compares, of one size and with random weights, behind one interface."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cobra.config import LLMConfig
from cobra.generation.engine import decode
from cobra.generation.sampling import Sampling
from cobra.models.build import cast_parameters
from cobra.models.mamba import MambaLM
from cobra.models.quantized import is_quantized, quantize_projections
from cobra.models.state import state_bytes

Generate = Callable[[Tensor, int, Callable[[], None]], Tensor]
NEVER = -2  # no token has this id: no answer ends before its limit


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A Mamba, and a transformer of the Llama kind with about as many parameters."""

    mamba: LLMConfig
    width: int
    layers: int
    heads: int
    inner: int


SIZES = {
    "tiny": Sizes(
        mamba=LLMConfig(d_model=128, num_layers=4, vocab_size=512, tokenizer="", prompt="mamba"),
        width=128, layers=2, heads=4, inner=344,
    ),
    "130m": Sizes(
        mamba=LLMConfig(d_model=768, num_layers=24, vocab_size=50277, tokenizer="", prompt="mamba"),
        width=768, layers=12, heads=12, inner=2048,
    ),
    "2.8b": Sizes(
        mamba=LLMConfig(d_model=2560, num_layers=64, vocab_size=50277, tokenizer="", prompt="mamba"),
        width=2560, layers=33, heads=32, inner=6912,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A language model that continues prompts greedily.

    Attributes:
        generate: ids [B, L], a number of new tokens, and what is called when the first of them is there -> ids [B, N].
        weight_bytes: read for each token.
        row_bytes: context length -> bytes that one row's memory has, read for each token.
        rewrites: whether this memory is also written anew with each token, as a Mamba's state is.
        mamba: the model, where it is Cobra's own.
    """

    name: str
    generate: Generate
    weight_bytes: int
    row_bytes: Callable[[int], int]
    rewrites: bool
    mamba: MambaLM | None = None

    def step_bytes(self, batch: int, context: int) -> int:
        """Bytes that a token of `batch` rows cannot do without."""
        return self.weight_bytes + batch * self.row_bytes(context) * (2 if self.rewrites else 1)


def _weights(module: nn.Module) -> int:
    """Bytes of parameters and buffers; a tied head counts once, as the look-up reads but a row of it."""
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


def random_mamba(config: LLMConfig, device: torch.device, dtype: torch.dtype) -> MambaLM:
    """A Mamba with the authors' initial weights, on a device, in the dtypes that `cobra.load` gives."""
    model = MambaLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    cast_parameters(model, dtype)
    return model.to(device).requires_grad_(False).eval()


def cobra_subject(name: str, model: MambaLM) -> Subject:
    """Cobra's engine as it is."""

    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int, on_first: Callable[[], None]) -> Tensor:
        steps = decode(
            model, ids.tolist(), None, max_new_tokens=new_tokens, end_id=NEVER, sampling=Sampling()
        )  # fmt: skip
        rows: list[list[int]] = [[] for _ in ids]
        for number, pairs in enumerate(steps):
            if number == 0:
                on_first()
            for row, token in pairs:
                rows[row].append(token)
        return torch.tensor(rows)

    looked_up = model.backbone.embedding.weight.nbytes if is_quantized(model) else 0  # else it is the head's as well
    return Subject(
        name=name,
        generate=generate,
        weight_bytes=_weights(model) - looked_up,
        row_bytes=lambda _: state_bytes(model.config),
        rewrites=True,
        mamba=model,
    )


def _quantized(kind: str, config: LLMConfig, device: torch.device, dtype: torch.dtype) -> Subject:
    model = random_mamba(config, device, dtype)
    quantize_projections(model, kind)
    return cobra_subject(f"Cobra {kind}", model)


class _Watch:
    """A streamer, as transformers calls it: with the prompt, then with each token."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.calls, self.on_first = 0, on_first

    def put(self, _value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.on_first()

    def end(self) -> None:
        pass


def _greedy(model: Any) -> Generate:
    """The `generate` of a transformers model, for exactly so many tokens."""

    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int, on_first: Callable[[], None]) -> Tensor:
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None, streamer=_Watch(on_first),
        )  # fmt: skip
        return out[:, ids.shape[1] :].cpu()

    return generate


def transformers_mamba(ours: MambaLM) -> Subject:
    """transformers' Mamba with the same weights."""
    from decoding import transformers_model

    weight = ours.backbone.embedding.weight
    theirs = transformers_model(ours).to(weight.device, weight.dtype)
    return Subject(
        name="transformers Mamba",
        generate=_greedy(theirs),
        weight_bytes=_weights(theirs),
        row_bytes=lambda _: state_bytes(ours.config),
        rewrites=True,
    )


def transformers_llama(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Subject:
    """A transformer of the same size with a KV cache, with PyTorch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=sizes.mamba.padded_vocab_size, hidden_size=sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, intermediate_size=sizes.inner, tie_word_embeddings=True,
        max_position_embeddings=2**17,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.to(device, dtype).eval()
    per_token = 2 * sizes.layers * sizes.width * dtype.itemsize
    return Subject(
        name="transformer (Llama)",
        generate=_greedy(model),
        weight_bytes=_weights(model),
        row_bytes=lambda context: context * per_token,
        rewrites=False,
    )


def official_mamba(ours: MambaLM) -> Subject | None:
    """`mamba_ssm`'s own generation with CUDA graphs; None where it is not installed, or has no device."""
    weight = ours.backbone.embedding.weight
    if importlib.util.find_spec("mamba_ssm") is None or not weight.is_cuda:
        return None
    from mamba_ssm.models.config_mamba import MambaConfig  # type: ignore[import-not-found]
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # type: ignore[import-not-found]

    config = ours.config
    theirs = MambaLMHeadModel(
        MambaConfig(d_model=config.d_model, n_layer=config.num_layers, vocab_size=config.vocab_size,
                    pad_vocab_size_multiple=config.pad_vocab_multiple),
        device=weight.device, dtype=weight.dtype,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())

    @torch.inference_mode()
    def generate(ids: Tensor, new_tokens: int, on_first: Callable[[], None]) -> Tensor:
        watch = _Watch(on_first)
        out = theirs.generate(ids, max_length=ids.shape[1] + new_tokens, cg=True, streamer=watch)
        return out[:, ids.shape[1] :].cpu()

    return Subject(
        name="mamba_ssm",
        generate=generate,
        weight_bytes=_weights(theirs),
        row_bytes=lambda _: state_bytes(config),
        rewrites=True,
    )


def subjects(
    size: str,
    device: torch.device,
    dtype: torch.dtype,
    quantized: Sequence[str],
    *,
    with_peers: bool = True,
    only: str | None = None,
) -> list[Subject]:
    """Cobra, its quantised forms, and the peers that are installed; `only` the one of that name."""
    sizes = SIZES[size]
    ours = random_mamba(sizes.mamba, device, dtype)
    makers: dict[str, Callable[[], Subject | None]] = {"Cobra": lambda: cobra_subject("Cobra", ours)}
    for kind in quantized:
        makers[f"Cobra {kind}"] = partial(_quantized, kind, sizes.mamba, device, dtype)
    if with_peers and importlib.util.find_spec("transformers"):
        makers["transformers Mamba"] = lambda: transformers_mamba(ours)
        makers["transformer (Llama)"] = lambda: transformers_llama(sizes, device, dtype)
    if with_peers:
        makers["mamba_ssm"] = lambda: official_mamba(ours)
    found = [make() for name, make in makers.items() if only in (None, name)]
    return [subject for subject in found if subject is not None]
