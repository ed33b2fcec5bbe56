"""Pretrain the pair of tiny vision towers that reads the miniature benchmarks, on scenes like theirs.

    python scripts/make_toy_towers.py [--out cobra/assets/tiny] [--steps N] [--seed 0]

The shipped pair (4,500 steps, seed 0) took 12 minutes on 2 CPU cores that other work kept busy as well. Linear heads on
single patch tokens of the last block, fitted to 400 further pictures, get this share of the patches of 300 unseen ones
right: the object (of 15 kinds, or none), the first decimal of its left and its lower edge, whether it is the leftmost
one, and the word on a sign. The words have not been learnt (chance: 10%).

    tower          object   left tenth  lower tenth     leftmost         word
    dino            99.0%        83.2%        82.4%        95.9%        12.4%
    siglip          98.7%        84.6%        84.5%        95.8%        13.7%
    both            99.2%        84.4%        84.4%        96.0%        12.6%

The pair was made before `finish` was written, which was then applied to the files.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_tiny_towers import PATCH, SIZE, WIDTH, Tower, accuracies, make
from safetensors.torch import load
from torch import Tensor, nn

from cobra.data.scenes import Scene
from cobra.data.toy.asking import KINDS, random_scene
from cobra.data.toy.relations import DIRECTIONS, extreme
from cobra.data.toy.textvqa import WORDS, signs
from cobra.data.toy.vizwiz import blurred

MAX_ITEMS = 3
SHARES = {"scene": 0.65, "blurred": 0.05, "signs": 0.3}  # of the pictures
COVERED = 0.1  # share of a patch that an object must cover to be what the patch shows
BINS = 10  # tenths of the picture's side: the first decimal of a box's edge
# What linear heads read from each patch token about its object, and from their mean about the picture.
PATCH_HEADS = {"kind": len(KINDS) + 1, "word": len(WORDS) + 1, "box": 4, "extreme": len(DIRECTIONS), "tenths": 4 * BINS}
PICTURE_HEADS = {"count": MAX_ITEMS + 1, "present": len(KINDS)}


Truth = dict[str, Tensor]
# What is asked of single patches: which of them, and the right class.
ASKED: dict[str, tuple[Callable[[Truth], Tensor], Callable[[Truth], Tensor]]] = {
    "object": (lambda truth: truth["kind"] >= 0, lambda truth: truth["kind"]),
    "left tenth": (lambda truth: truth["kind"] > 0, lambda truth: (truth["box"][..., 0] * BINS).long()),
    "lower tenth": (lambda truth: truth["kind"] > 0, lambda truth: (truth["box"][..., 3] * BINS).long()),
    "leftmost": (lambda truth: truth["kind"] > 0, lambda truth: truth["extreme"][..., 0].long()),
    "word": (lambda truth: truth["word"] > 0, lambda truth: truth["word"]),
}
NUM_PROBED = (400, 300)  # pictures that the probes are fitted to, and tested on


def render(rng: np.random.Generator, count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`count` pictures of up to three objects: uint8 pixels [N, 3, S, S], and what there is to be learnt.

    Per patch, int64 [N, P]: kind and word, 0 where there is none; float [N, P, 4]: the box in 0..1, and whether the
    object is the outermost one to the left, to the right, above, below. Per picture: count [N], present [N, kinds].
    """
    pictures: list[np.ndarray] = []
    truths: list[dict[str, np.ndarray]] = []
    for choice in rng.choice(list(SHARES), count, p=list(SHARES.values())):
        if choice == "signs":
            drawn = signs(rng)
            pictures.append(np.asarray(drawn.image))
            truths.append(_truth(drawn.scene, [1 + WORDS.index(text) for text in drawn.texts]))
            continue
        scene = random_scene(rng, (1, MAX_ITEMS))
        seen = Scene((), scene.background, scene.size) if choice == "blurred" else scene  # nothing can be made out
        pictures.append(np.asarray(blurred(scene) if choice == "blurred" else scene.image()))
        truths.append(_truth(seen, [0] * len(seen.items)))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels, {key: torch.from_numpy(np.stack([truth[key] for truth in truths])) for key in truths[0]}


def _truth(scene: Scene, words: list[int]) -> dict[str, np.ndarray]:
    side = SIZE // PATCH
    truth = {
        "kind": np.zeros(side * side, np.int64),
        "word": np.zeros(side * side, np.int64),
        "box": np.zeros((side * side, 4), np.float32),
        "extreme": np.zeros((side * side, len(DIRECTIONS)), np.float32),
        "count": np.array(len(scene.items)),
        "present": np.zeros(len(KINDS), np.float32),
    }
    outermost = [extreme(scene, direction) for direction in DIRECTIONS]
    best = np.full(side * side, COVERED)
    for item, word in zip(scene.items, words, strict=True):
        cover = item.coverage(SIZE).reshape(side, PATCH, side, PATCH).mean((1, 3)).ravel()
        here, best = cover > best, np.maximum(cover, best)
        kind = KINDS.index((item.color, item.shape))
        truth["kind"][here], truth["word"][here] = kind + 1, word
        truth["box"][here] = np.array(item.box) / SIZE
        truth["extreme"][here] = [item is one for one in outermost]
        truth["present"][kind] = 1
    return truth


class ToyPretraining(Tower):
    """Linear heads on every patch of the last block, which is the one to read, and on the mean of the patches."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.patch = nn.Linear(WIDTH, sum(PATCH_HEADS.values()))
        self.picture = nn.Linear(WIDTH, sum(PICTURE_HEADS.values()))

    def read(self, pixels: Tensor) -> Tensor:
        """The patch tokens [N, P, WIDTH] that Cobra reads."""
        last = len(self.tower.blocks) - 1
        (tokens,) = self.tower.forward_intermediates(
            self.normal(pixels), indices=[last], norm=False, output_fmt="NLC", intermediates_only=True
        )
        return tokens

    @torch.no_grad()
    def finish(self, pixels: Tensor) -> None:
        """Give what is read mean 0 in every channel, and standard deviation 1 over all.

        A projector that starts at random learns faster from such features (they come out at 4 otherwise). Nothing else
        changes: blocks read the residual stream through layer norms, which its size is no matter to.
        """
        tower = self.tower.float()
        last = tower.blocks[-1]
        gamma = getattr(last.ls2, "gamma", torch.ones(()))
        last.mlp.fc2.bias -= self.read(pixels).mean((0, 1)) / gamma
        size = self.read(pixels).std()
        stream = [
            tower.patch_embed.proj,
            *(layer for block in tower.blocks for layer in (block.attn.proj, block.mlp.fc2)),
        ]
        starts = [getattr(tower, name, None) for name in ("pos_embed", "cls_token", "reg_token")]
        for parameter in (*(p for layer in stream for p in layer.parameters()), *starts):
            if parameter is not None:
                parameter /= size

    def forward(self, pixels: Tensor, truth: dict[str, Tensor]) -> Tensor:
        """The sum of all heads' losses on a batch from `render`."""
        tokens = self.read(pixels)
        kind, word, box, outermost, tenths = self.patch(tokens).split([*PATCH_HEADS.values()], -1)
        count, present = self.picture(tokens.mean(1)).split([*PICTURE_HEADS.values()], -1)
        shown = truth["kind"] > 0
        wanted = (truth["box"][shown] * BINS).long().clamp(max=BINS - 1)
        return (
            F.cross_entropy(kind.flatten(0, 1), truth["kind"].flatten())
            + F.cross_entropy(word[shown], truth["word"][shown])
            + 10 * F.smooth_l1_loss(box[shown], truth["box"][shown], beta=0.05)
            + F.cross_entropy(tenths[shown].unflatten(-1, (4, BINS)).flatten(0, -2), wanted.flatten())
            + F.binary_cross_entropy_with_logits(outermost[shown], truth["extreme"][shown])
            + F.cross_entropy(count, truth["count"])
            + F.binary_cross_entropy_with_logits(present, truth["present"])
        )


@torch.no_grad()
def features(name: str, weights: bytes, pixels: Tensor) -> Tensor:
    """The patch tokens that Cobra will read: [N, P, WIDTH]."""
    model = ToyPretraining(name).eval()
    model.tower.load_state_dict(load(weights))
    return torch.cat([model.read(part) for part in pixels.split(500)])


def probe(weights: dict[str, bytes], seed: int) -> None:
    """Print what linear heads on single patches, fitted to rendered scenes, get right on unseen ones."""
    rng = np.random.default_rng([seed, 1])  # not the one that trained the towers
    sets = [render(rng, count) for count in NUM_PROBED]
    found = [{name: features(name, w, pixels) for name, w in weights.items()} for pixels, _ in sets]
    for by_tower in found:
        by_tower["both"] = torch.cat(list(by_tower.values()), -1)
    print(f"{'tower':8}" + "".join(f"{asked:>14}" for asked in ASKED))
    for tower in found[0]:
        shares: list[float] = []
        for choose, label in ASKED.values():
            (train, labels), test = (
                (tokens[tower][choose(truth)], label(truth)[choose(truth)])
                for tokens, (_, truth) in zip(found, sets, strict=True)
            )
            shares += accuracies(train, labels, [test])
        print(f"{tower:8}" + "".join(f"{share:14.1%}" for share in shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("cobra/assets/tiny"))
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    weights = make(args.out, args.steps, args.seed, "toy-{}.safetensors", ToyPretraining, render)
    probe(weights, args.seed)


if __name__ == "__main__":
    main()
