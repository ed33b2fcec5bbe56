"""The paper's models by name: what they are, what they scored, where their weights are."""

from __future__ import annotations

from dataclasses import dataclass

from cobra.errors import CheckpointError

COLUMNS = ("VQA-v2", "GQA", "VizWiz", "TextVQA", "VSR", "POPE", "RefCOCO", "RefCOCO+", "RefCOCOg")


@dataclass(frozen=True, kw_only=True)
class Release:
    """One model of the paper (arXiv 2403.14520v4, tables 2 to 5)."""

    about: str
    size: str
    scores: tuple[float, ...]  # percent, in the order of `COLUMNS`
    hub: str | None = None  # repository and folder on the Hugging Face Hub; None: not published

    @property
    def line(self) -> str:
        """One line for people."""
        scores = ", ".join(f"{name} {score}" for name, score in zip(COLUMNS, self.scores, strict=True))
        home = f"weights: {self.hub}" if self.hub else "no public weights, train it with the experiment of this name"
        return f"{self.size}: {self.about}; {scores}; {home}"


RELEASES = {
    "cobra-3b": Release(
        about="DINOv2 + SigLIP at 384 px, Mamba-2.8B-Zephyr",
        size="3.5B",
        scores=(77.8, 62.3, 49.7, 58.2, 58.4, 88.4, 52.7, 45.6, 46.9),
        hub="han1997/cobra/cobra+3b",
    ),
    "cobra-8b": Release(
        about="DINOv2 + SigLIP at 384 px, Mamba-7B",
        size="7.8B",
        scores=(79.2, 63.9, 56.2, 59.5, 62.9, 87.6, 58.2, 52.5, 54.4),
    ),
    "cobra-3b-siglip": Release(
        about="as cobra-3b with SigLIP alone",
        size="3.2B",
        scores=(77.5, 61.8, 48.3, 58.8, 53.2, 88.2, 46.7, 40.1, 43.8),
    ),
    "cobra-3b-ldpv2": Release(
        about="as cobra-3b with the LDPv2 projector, 196 image tokens",
        size="3.5B",
        scores=(76.2, 61.9, 50.2, 54.7, 56.1, 87.7, 50.3, 42.9, 46.9),
    ),
    "cobra-3b-base": Release(
        about="as cobra-3b with the base model Mamba-2.8B-SlimPajama",
        size="3.5B",
        scores=(77.8, 62.7, 47.2, 57.9, 54.4, 89.0, 52.2, 45.6, 48.6),
    ),
    "cobra-3b-one-epoch": Release(
        about="as cobra-3b after one epoch",
        size="3.5B",
        scores=(76.5, 60.9, 48.5, 57.5, 53.8, 88.1, 42.5, 34.3, 39.0),
    ),
    "cobra-3b-aligned": Release(
        about="as cobra-3b in two stages, the projector first",
        size="3.5B",
        scores=(75.7, 60.4, 44.2, 58.0, 51.6, 86.9, 37.3, 29.7, 34.3),
    ),
}


def available_models() -> dict[str, str]:
    """Return the models of the paper: name -> one line with parts, parameters, scores in percent, and weights.

    Those with public weights load by name; all do when COBRA_WEIGHTS names a folder that holds a folder of that name.
    """
    return {name: release.line for name, release in RELEASES.items()}


def hub_name(name: str) -> str:
    """Return where one of `RELEASES` is on the Hub.

    Raises:
        CheckpointError: its weights are not public.
    """
    hub = RELEASES[name].hub
    if hub is None:
        raise CheckpointError(
            f"model={name}: its weights are not public. Train it with +experiment={name}, or put a model folder "
            f"{name!r} into the folder that the environment variable COBRA_WEIGHTS names."
        )
    return hub
