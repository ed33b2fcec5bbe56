"""Every layout and back: equal bits, equal logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import cobra
from cobra.config import LLMConfig
from cobra.convert import LAYOUTS, convert
from cobra.errors import CheckpointError, ConfigError
from cobra.models.mamba import MambaLM
from cobra.models.pretrained import load_llm, mamba_sizes
from cobra.models.public import public_ids
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.text.tokenizer import Tokenizer

IDS = torch.tensor([[5, 1, 99, 7, 7, 30]])


@pytest.fixture
def folder(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    return tmp_path / "ours"


@pytest.fixture
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=104, hidden_size=32, num_hidden_layers=3, state_size=8, expand=2, conv_kernel=4, time_step_rank=3
    )
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(config).eval()


def logits(folder: Path) -> Tensor:
    """Logits of a Mamba folder, read by this package with the sizes that its config.json gives."""
    sizes = mamba_sizes(json.loads((folder / "config.json").read_text()), "config.json")
    lm = MambaLM(LLMConfig(**sizes, tokenizer="", prompt="mamba"))
    load_llm(lm, str(folder), "llm.weights")
    with torch.no_grad():
        return lm.head(lm(lm.embed(IDS))[0])


def their_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_public_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    public, back = tmp_path / "public", tmp_path / "back"
    convert(str(folder), public, "public")
    checkpoint = torch.load(public / "checkpoints" / "latest-checkpoint.pt", weights_only=True)
    assert checkpoint["model"].keys() == {"projector", "llm_backbone"}
    llm = checkpoint["model"]["llm_backbone"]
    assert torch.equal(llm["llm.lm_head.weight"], llm["llm.backbone.embedding.weight"])
    assert "projector.0.weight" in checkpoint["model"]["projector"]
    with pytest.raises(CheckpointError, match="vision="):
        cobra.load(public, device="cpu")  # no id stands for such small parts
    parts = [yaml.safe_load((public / f"{name}.yaml").read_text()) for name in ("vision", "llm")]
    assert parts[0]["towers"][1]["weights"] == "vision/tower-1.safetensors"
    moved = public.rename(tmp_path / "moved")
    loaded = cobra.load(moved, device="cpu", vision=moved / "vision.yaml", llm=moved / "llm.yaml")
    loaded.save_pretrained(back)
    expected, found = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    ours, again = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert ours.keys() == again.keys() and ours["vision"] == again["vision"] and ours["llm"] == again["llm"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "moved", "ours"]
    checkpoint["model"]["vision_backbone"] = {"featurizer.pos_embed": torch.zeros(1)}
    torch.save(checkpoint, moved / "checkpoints" / "latest-checkpoint.pt")
    with pytest.raises(
        ConfigError, match=r"vision\.towers\[0\]\.weights, .*no effect, as .*latest-checkpoint\.pt holds"
    ):
        cobra.load(moved, device="cpu", vision=moved / "vision.yaml", llm=moved / "llm.yaml")


@pytest.mark.parametrize("shard_size", ["10GB", "20KB"])
def test_transformers_round_trip(theirs: Any, tmp_path: Path, shard_size: str) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "theirs"
    theirs.save_pretrained(source, max_shard_size=shard_size)
    assert (source / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    expected = their_logits(theirs)
    torch.testing.assert_close(logits(source), expected, rtol=0, atol=1e-4)  # their scan sums in another order
    convert(str(source), tmp_path / "original", "mamba")
    convert(str(tmp_path / "original"), tmp_path / "again", "hf-mamba")
    torch.testing.assert_close(logits(tmp_path / "original"), logits(source), rtol=0, atol=0)
    again = transformers.MambaForCausalLM.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(their_logits(again), expected, rtol=0, atol=0)


def test_language_model_of_a_whole_model(folder: Path, small_model: CobraVLM, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    convert(str(folder), tmp_path / "hf", "hf-mamba")
    lm = small_model.llm
    with torch.no_grad():
        expected = lm.head(lm(lm.embed(IDS))[0])
    theirs = transformers.MambaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    torch.testing.assert_close(their_logits(theirs), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, rtol=0, atol=0)
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


def test_stored_dtypes_are_kept(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    halved = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    save_file(halved, folder / "model.safetensors")
    convert(str(folder), tmp_path / "copy", "cobra")
    found = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(found[name], halved[name]) and found[name].dtype == halved[name].dtype for name in halved)


def test_existing_targets_stay(folder: Path, theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="mine exists"):
        convert(str(folder), tmp_path / "mine", "public")
    with pytest.raises(CheckpointError, match="more than a model"):
        cobra.load(folder, device="cpu").save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="language model alone"):
        convert(str(tmp_path / "llm"), folder, "public", overwrite=True)
    assert (folder / "model.safetensors").is_file()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llm", "mine", "ours"]
    with pytest.raises(CheckpointError, match="language model alone"):
        cobra.load(tmp_path / "llm")
    with pytest.raises(ConfigError, match="Did you mean 'public'"):
        convert(str(folder), tmp_path / "new", "publik")
    convert(str(folder), tmp_path / "llm", "public", overwrite=True)
    assert (tmp_path / "llm" / "checkpoints").is_dir() and not (tmp_path / "llm" / "generation_config.json").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_disk_is_told_and_changes_nothing(folder: Path, tmp_path: Path, layout: str) -> None:
    resource = pytest.importorskip("resource")
    convert(str(folder), tmp_path / "target", "mamba")
    before = (tmp_path / "target" / "pytorch_model.bin").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"target cannot be written \(.*\); nothing was changed there"):
            convert(str(folder), tmp_path / "target", layout, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "target" / "pytorch_model.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "target"]


def test_script(folder: Path, script: Callable[..., Any], tmp_path: Path) -> None:
    done = script("convert", str(folder), "public", "--to", "public")
    assert done.returncode == 0 and "Wrote public" in done.stderr, done.stderr
    options = ("--vision", "public/vision.yaml", "--llm", "public/llm.yaml")
    done = script("convert", "public", "back", "--to", "cobra", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    failed = script("convert", "absent", "other", "--to", "cobra")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert "layouts" in script("convert", "--help").stdout


def test_overwriting_takes_nothing_but_a_model(folder: Path, tmp_path: Path) -> None:
    """Neither a folder around the source, nor notes beside a model, nor a folder that could be a temporary one."""
    around = tmp_path / "around"
    shutil.copytree(folder, around / "model")
    (around / "precious").mkdir()
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(str(around / "model"), around, "cobra", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds more than a model \(model, precious\)"):
        convert(str(folder), around, "cobra", overwrite=True)
    target = tmp_path / "target"
    (tmp_path / "target.tmp").mkdir()
    (tmp_path / "target.tmp" / "mine").write_text("mine")
    convert(str(folder), target, "cobra")
    convert(str(folder), target, "cobra", overwrite=True)
    assert (tmp_path / "target.tmp" / "mine").read_text() == "mine"
    (target / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"more than a model \(notes.txt\)"):
        cobra.load(folder, device="cpu").save_pretrained(target)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert(str(folder), link, "cobra", overwrite=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("vocab_size", [101, 104])
def test_any_vocabulary_of_transformers_is_read(vocab_size: int, tmp_path: Path) -> None:
    """There the vocabulary is what the embedding has rows, whatever the padding multiple says."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=vocab_size, hidden_size=32, num_hidden_layers=1, state_size=8)
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(tmp_path), their_logits(theirs), rtol=0, atol=1e-4)


def test_overrides_of_a_mamba_are_refused(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "llm")
    overrides: list[dict[str, Any]] = [{"vision": {"resize": "letterbox"}}, {"llm": {"tokenizer": "x.json"}}]
    for given in overrides:
        with pytest.raises(ConfigError, match=r"own config\.json describes; vision and llm have no effect"):
            convert(str(tmp_path / "llm"), tmp_path / "out", "mamba", **given)
    assert not (tmp_path / "out").exists()


def test_missing_sources_are_explained(tmp_path: Path) -> None:
    for source, message in (
        ("cobra-8b", r"cobra-8b: its weights are not public\. Train it with \+experiment=cobra-8b"),
        ("cobra-3", "Did you mean 'cobra-3b'"),
        ("absent", "no run or model folder at .*absent"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out", "cobra")


@pytest.mark.parametrize("target", ["/", ".", "..", "file/x"])
def test_targets_that_no_model_can_replace(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("file").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match=r"exists; choose|current folder or around it|file is a file"):
            convert(str(folder), Path(target), "cobra", overwrite=overwrite)
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_another_activation_is_refused(theirs: Any, tmp_path: Path) -> None:
    theirs.config.hidden_act = "gelu"
    theirs.save_pretrained(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="hidden_act='gelu'"):
        convert(str(tmp_path / "llm"), tmp_path / "out", "mamba")
    assert not (tmp_path / "out").exists()


def test_what_the_public_layout_cannot_name_is_refused(small_model: CobraVLM) -> None:
    for change in ({"kind": "ldpv2"}, {"kind": "fused-ldpv2", "grid": 2}):
        projector = replace(small_model.config.projector, **change)
        with pytest.raises(CheckpointError, match=r"model\.projector\.kind=.* to=cobra"):
            public_ids(replace(small_model.config, projector=projector))
