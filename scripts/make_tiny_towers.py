"""Pretrain the two tiny vision towers that ship with Cobra, on scenes it renders itself.

    python scripts/make_tiny_towers.py [--out cobra/assets/tiny] [--steps N] [--seed 0]

The shipped pair (7,000 steps, seed 0) took 21 minutes on 2 CPU cores that other work kept busy as well; a tower alone
on an idle core makes 13 steps or more a second, which is 9 minutes. Linear heads on the mean of the second-to-last
block's patch tokens, fitted to 8,000 further scenes, name this share of shapes and colours rightly:

    tower   asked       scenes  easy-VQA
    dino    shape       99.98%   100.00%
    dino    color      100.00%   100.00%
    siglip  shape       99.98%   100.00%
    siglip  color      100.00%   100.00%
    both    shape       99.98%   100.00%
    both    color      100.00%   100.00%

"scenes" are 4,000 unseen ones; "easy-VQA" are its train images, wherever their questions state the answer (3,793
shapes and 3,710 colours of 4,000). No image of easy-VQA is learnt from: they are only measured on.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

from cobra.data.scenes import COLORS, SHAPES, random_scene

SIZE, PATCH, WIDTH = 64, 8, 64
COMMON = {"num_classes": 0, "img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": 3, "num_heads": 4}
TOWERS = {
    "dino": ("vit_small_patch14_reg4_dinov2", COMMON | {"init_values": 1.0}),
    "siglip": ("vit_base_patch16_siglip_224", COMMON | {"global_pool": "avg", "fc_norm": False}),
}
COLOR_NAMES = tuple(COLORS)
BATCH, RATE = 32, 2e-3

Render = Callable[[np.random.Generator, int], tuple[Tensor, dict[str, Tensor]]]  # pixels and what is to be learnt


def render(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`count` scenes of one object: uint8 pixels [N, 3, S, S] and, per scene, what there is to be learnt.

    shape, color: int64 [N]; box: [N, 4] in 0..1; cover: [N, patches], the share of every patch that is covered.
    """
    scenes = [random_scene(rng, SIZE) for _ in range(count)]
    items = [scene.items[0] for scene in scenes]
    cover = np.stack([item.coverage(SIZE) for item in items]).reshape(count, SIZE // PATCH, PATCH, SIZE // PATCH, PATCH)
    truth = {
        "shape": torch.tensor([SHAPES.index(item.shape) for item in items]),
        "color": torch.tensor([COLOR_NAMES.index(item.color) for item in items]),
        "box": torch.tensor([item.box for item in items]) / SIZE,
        "cover": torch.from_numpy(cover.mean((2, 4)).reshape(count, -1)).float(),
    }
    return torch.from_numpy(np.stack([scene.pixels() for scene in scenes])).permute(0, 3, 1, 2), truth


class Tower(nn.Module):
    """A timm tower that reads uint8 pixels; subclasses add the heads that it learns from, which are thrown away."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__()
        timm_name, common = TOWERS[name]
        self.tower: Any = timm.create_model(timm_name, pretrained=False, **common | kwargs)
        wanted = self.tower.pretrained_cfg
        self.mean, self.std = (torch.tensor(wanted[key])[:, None, None] for key in ("mean", "std"))

    def tokens(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The patch tokens [N, patches, WIDTH] of the second-to-last block, which Cobra reads, and of the output."""
        block = len(self.tower.blocks) - 2
        output, (read,) = self.tower.forward_intermediates(self.normal(pixels), indices=[block], output_fmt="NLC")
        return read, output[:, self.tower.num_prefix_tokens :]

    def finish(self, pixels: Tensor) -> None:
        """What there is to be done after training, on some pictures."""

    def normal(self, pixels: Tensor) -> Tensor:
        """What the tower is fed with."""
        return (pixels.float() / 255 - self.mean) / self.std


class Pretraining(Tower):
    """For a tower's second-to-last block as for its output, linear heads.

    As their namesakes do, "siglip" learns from what a caption could say of the whole picture (shape, colour, place),
    "dino" from every patch as well (how far it is covered, and by what).
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.dense = name == "dino"
        self.caption = nn.ModuleList(nn.Linear(WIDTH, len(SHAPES) + len(COLORS) + 4) for _ in range(2))
        self.patch = nn.ModuleList(nn.Linear(WIDTH, len(SHAPES) + len(COLORS) + 1) for _ in range(2))

    def forward(self, pixels: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """The sum of all heads' losses on a batch from `render`."""
        loss = torch.zeros(())
        for tokens, caption, patch in zip(self.tokens(pixels), self.caption, self.patch, strict=True):
            shape, color, box = caption(tokens.mean(1)).split([len(SHAPES), len(COLORS), 4], -1)
            loss = loss + F.cross_entropy(shape, truth["shape"]) + F.cross_entropy(color, truth["color"])
            loss = loss + 10 * F.mse_loss(box, truth["box"])
            if self.dense:
                covered = truth["cover"] > 0
                index = covered.nonzero()[:, 0]
                shape, color, cover = patch(tokens).split([len(SHAPES), len(COLORS), 1], -1)
                loss = loss + F.binary_cross_entropy_with_logits(cover[..., 0], truth["cover"])
                loss = loss + F.cross_entropy(shape[covered], truth["shape"][index])
                loss = loss + F.cross_entropy(color[covered], truth["color"][index])
        return loss


def train(name: str, steps: int, seed: int, kind: type[Tower] = Pretraining, render: Render = render) -> bytes:
    """Pretrain one tower on one CPU core; its weights as a safetensors file, in half precision."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = kind(name)
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        loss = model(*render(rng, BATCH))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"{name:6} step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)
    model.finish(render(rng, BATCH)[0])
    return save({key: value.half().contiguous() for key, value in model.tower.state_dict().items()})


def make(out: Path, steps: int, seed: int, file: str, kind: type[Tower], render: Render) -> dict[str, bytes]:
    """Pretrain all towers side by side, a core each, and write them; `file` names one, with {} for the tower."""
    with ProcessPoolExecutor(len(TOWERS), get_context("spawn")) as pool:
        made = pool.map(train, TOWERS, *map(repeat, (steps, seed, kind, render)))
        weights = dict(zip(TOWERS, made, strict=True))
    out.mkdir(parents=True, exist_ok=True)
    for name, data in weights.items():
        part = out / f".{name}.part"
        part.write_bytes(data)
        part.replace(out / file.format(name))
    return weights


def easy_vqa_train() -> tuple[Tensor, dict[str, Tensor]] | None:
    """easy-VQA's 4,000 train images and what their questions state about them (-1: nothing), if it is installed."""
    try:
        import easy_vqa
    except ImportError:
        return None
    paths = easy_vqa.get_train_image_paths()
    names = {"shape": SHAPES, "color": COLOR_NAMES}
    truth = {key: torch.full((len(paths),), -1) for key in names}
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        words = {*question.rstrip("?").split()}
        is_so = answer not in ("yes", "no") or (answer == "yes") != bool(words & {"no", "not"})
        for key, values in names.items():
            for stated in ({*words, answer} if is_so else set()) & {*values}:
                truth[key][image] = values.index(stated)
    pixels = np.stack([np.asarray(Image.open(paths[image]).convert("RGB")) for image in range(len(paths))])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), truth


@torch.no_grad()
def features(name: str, weights: bytes, pixels: Tensor) -> Tensor:
    """Mean over the patch tokens that Cobra will read: [N, WIDTH]."""
    model = Pretraining(name).eval()
    model.tower.load_state_dict(load(weights))
    return torch.cat([model.tokens(part)[0].mean(1) for part in pixels.split(500)])


def accuracies(train: Tensor, labels: Tensor, tests: list[tuple[Tensor, Tensor]]) -> list[float]:
    """What share a linear softmax head, fitted to features [N, D] and labels [N], gets right of each test set."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    head = nn.Linear(train.shape[1], int(labels.max()) + 1)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head((train - mean) / std), labels) + 1e-5 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    known = [(x[y >= 0], y[y >= 0]) for x, y in tests]
    return [(head((x - mean) / std).argmax(1) == y).float().mean().item() for x, y in known]


def probe(weights: dict[str, bytes], seed: int) -> None:
    """Print how well linear heads, fitted to rendered scenes, tell shapes and colours apart on unseen images."""
    rng = np.random.default_rng([seed, 1])  # not the one that trained the towers
    sets = {"train": render(rng, 8000), "scenes": render(rng, 4000)}
    if easy := easy_vqa_train():
        sets["easy-VQA"] = easy
    found = {key: {name: features(name, w, pixels) for name, w in weights.items()} for key, (pixels, _) in sets.items()}
    for by_tower in found.values():
        by_tower["both"] = torch.cat(list(by_tower.values()), 1)
    tests = [key for key in sets if key != "train"]
    print(f"{'tower':8}{'asked':8}" + "".join(f"{key:>10}" for key in tests))
    for tower in found["train"]:
        for asked in ("shape", "color"):
            pairs = [(found[key][tower], sets[key][1][asked]) for key in tests]
            shares = accuracies(found["train"][tower], sets["train"][1][asked], pairs)
            print(f"{tower:8}{asked:8}" + "".join(f"{share:10.2%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cobra/assets/tiny"))
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    weights = make(args.out, args.steps, args.seed, "{}.safetensors", Pretraining, render)
    probe(weights, args.seed)


if __name__ == "__main__":
    main()
