"""Time per token of Mamba 130M on the CPU, as a multiple of the time to read its weights once from memory.

    python benchmarks/decoding.py               # float32, bfloat16, int8 and int4, one row and four
    python benchmarks/decoding.py --threads 1

The weights are random and lie in one block of memory; `read` is PyTorch's sum over this block, so no way to decode one
token at a time can be much faster. `fused` is `MambaLM.step` and `head`, `torch ops` the same blocks module by module,
`transformers` MambaForCausalLM with its cache and the same weights. Ways take turns within rounds; `least` and `median`
are over all rounds. Ratios are between medians: other users of a machine slow reading and decoding alike, and the
luckiest moments of two ways do not compare. `int8` and `int4` are `fused` with projections and head quantised, and the
rest as above them. Ways whose logits disagree with the blocks (in float32; of quantised weights, with their own blocks)
are marked. bfloat16 keeps the scan's own parameters in float32, as Cobra does.
"""

import argparse
import copy
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cobra.config import QUANTIZED, LLMConfig
from cobra.models.build import KEPT_IN_FLOAT32
from cobra.models.mamba import MambaLM, MambaState
from cobra.models.quantized import quantize_projections

MAMBA_130M = LLMConfig(d_model=768, num_layers=24, vocab_size=50277, tokenizer="", prompt="mamba")
PREFIX_LENGTH = 8
RUNS_PER_TURN = 4  # consecutive, as in real decoding, after one that does not count
TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2}  # relative to the largest logit

Way = Callable[[], Tensor]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to decode; times in milliseconds per step of the whole batch."""

    dtype: str
    batch: int
    way: str
    least: float
    median: float
    ratio: float
    agrees: bool


def build(dtype: torch.dtype) -> tuple[MambaLM, Tensor]:
    """A model whose parameters are views of one block of memory, and the block as bytes."""
    model = MambaLM(MAMBA_130M)
    model.init_weights(torch.Generator().manual_seed(0))
    parameters = {
        name: p.detach() if name.endswith(KEPT_IN_FLOAT32) else p.detach().to(dtype)
        for name, p in model.named_parameters()
    }
    block = torch.empty(sum(p.nbytes for p in parameters.values()), dtype=torch.uint8)
    start = 0
    for name, parameter in model.named_parameters():
        values = parameters[name]
        parameter.data = block[start : start + values.nbytes].view(values.dtype).view(values.shape).copy_(values)
        start += values.nbytes
    return model, block


def fused(model: MambaLM, ids: Tensor, state: MambaState) -> Way:
    return lambda: model.head(model.step(ids, state)[0])


def torch_ops(model: MambaLM, ids: Tensor, state: MambaState) -> Way:
    def step() -> Tensor:
        hidden, residual = model.backbone.embedding(ids), None
        for i, block in enumerate(model.backbone.layers):
            hidden, residual, _ = block.step(hidden, residual, (state.conv[i], state.ssm[i]))  # type: ignore[operator]
        hidden, _ = model.backbone.norm_f(hidden, residual)
        return model.lm_head(hidden)

    return step


def transformers_model(model: MambaLM) -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    ours = model.config
    theirs = MambaForCausalLM(
        MambaConfig(
            vocab_size=ours.padded_vocab_size,
            hidden_size=ours.d_model,
            num_hidden_layers=ours.num_layers,
            state_size=ours.d_state,
            conv_kernel=ours.d_conv,
            expand=ours.expand,
            time_step_rank=ours.rank,
            layer_norm_epsilon=ours.norm_eps,
        )
    )
    theirs.load_state_dict({k.replace(".embedding.", ".embeddings."): v for k, v in model.state_dict().items()})
    return theirs.eval()


def transformers_way(theirs: nn.Module, prefix: Tensor, ids: Tensor) -> Way:
    cache = theirs(input_ids=prefix, use_cache=True).cache_params
    return lambda: theirs(input_ids=ids[:, None], cache_params=cache, use_cache=True).logits[:, 0]


def take_turns(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every run of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        for name, way in ways.items():
            way()  # what the way before has left in caches, and threads of its that still spin, fade
            for _ in range(RUNS_PER_TURN):
                start = time.perf_counter()
                way()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def measure(dtype_name: str, batches: list[int], seconds: float) -> list[Row]:
    dtype, rows = getattr(torch, dtype_name), []
    model, block = build(dtype)
    theirs = transformers_model(model).to(dtype) if importlib.util.find_spec("transformers") else None
    quantised = {name: copy.deepcopy(model) for name in QUANTIZED}
    for name, small in quantised.items():
        quantize_projections(small, name)
    numbers = block.view(torch.float32)  # as fast to add up for both dtypes
    for batch in batches:
        generator = torch.Generator().manual_seed(batch)
        prefix = torch.randint(50_000, (batch, PREFIX_LENGTH), generator=generator)
        ids = torch.randint(50_000, (batch,), generator=generator)
        _, state = model(model.embed(prefix))
        ways: dict[str, Way] = {"fused": fused(model, ids, state), "torch ops": torch_ops(model, ids, state)}
        if theirs is not None:
            ways["transformers"] = transformers_way(theirs, prefix, ids)
        logits = {name: way().float() for name, way in ways.items()}  # the first step, which also compiles
        expected = dict.fromkeys(ways, logits["torch ops"])
        for name, small in quantised.items():
            ways[name] = fused(small, ids, state)
            logits[name], expected[name] = ways[name]().float(), torch_ops(small, ids, state)().float()
        agree = {
            name: bool((values - expected[name]).abs().max() < TOLERANCE[dtype_name] * expected[name].abs().max())
            for name, values in logits.items()
        }
        times = take_turns({"read": numbers.sum, **ways}, seconds)
        rows += [
            Row(
                dtype=dtype_name,
                batch=batch,
                way=name,
                least=min(values),
                median=statistics.median(values),
                ratio=statistics.median(values) / statistics.median(times["read"]),
                agrees=agree.get(name, True),
            )
            for name, values in times.items()
        ]
        sys.stdout.write(f"{dtype_name}, batch {batch}: read at {block.nbytes / min(times['read']) / 1e6:.1f} GB/s\n")
    return rows


def table(rows: list[Row]) -> str:
    lines = [f"{'dtype':9} {'batch':>5} {'way':13} {'least ms':>9} {'median ms':>10} {'x read':>7}"]
    for row in rows:
        lines.append(
            f"{row.dtype:9} {row.batch:5} {row.way:13} {row.least:9.2f} {row.median:10.2f} {row.ratio:7.2f}"
            f"{'' if row.agrees else '  WRONG RESULT'}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads; PyTorch's choice by default")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="rows decoded at once")
    parser.add_argument("--seconds", type=float, default=15.0, help="per dtype and batch")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)

    with torch.no_grad():
        rows = [row for name in TOLERANCE for row in measure(name, options.batches, options.seconds)]
    sys.stdout.write(f"{torch.get_num_threads()} threads\n{table(rows)}\n")
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
