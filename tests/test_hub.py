"""Where weights are looked for: this machine, COBRA_WEIGHTS, then the Hub, which is a folder in these tests."""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import cobra
from cobra import hub
from cobra.config import LLMConfig, as_config, read_yaml
from cobra.convert import convert
from cobra.errors import CheckpointError, ConfigError
from cobra.models.export import write_hugging_face_mamba, write_original_mamba, write_public_run
from cobra.models.public import LLMS, VISION, public_config
from cobra.models.vlm import CobraVLM
from cobra.models.weights import save_model_folder
from cobra.releases import RELEASES
from cobra.text.tokenizer import Tokenizer


class Hub:
    """A stand-in for the Hub: repositories are folders; what was downloaded and uploaded is written down."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.is_online = True
        self.downloads: list[str] = []
        self.uploads: dict[str, list[str]] = {}

    def add(self, repository: str, *files: str) -> Path:
        for file in files:
            path = self.root / repository / file
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"w": torch.ones(2)}, path)
        return self.root / repository

    def model_info(self, repository: str, *, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files(repository)])

    def files(self, repository: str) -> list[str]:
        folder = self.root / repository
        if not self.is_online or not folder.is_dir():
            raise ConnectionError("no route to host\nmore")
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]

    def snapshot_download(
        self, repository: str, *, allow_patterns: Iterable[str] = ("*",), local_files_only: bool = False
    ) -> str:
        target = self.cache / repository
        if local_files_only:
            if not target.is_dir():
                raise FileNotFoundError(repository)
            return str(target)
        for file in self.files(repository):
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                self.downloads.append(file)
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / repository / file, target / file)
        return str(target)

    def create_repo(self, repository: str, *, private: bool, exist_ok: bool) -> None:
        if not self.is_online:
            raise ConnectionError("no route to host")
        self.uploads[repository] = []

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        self.uploads[repo_id] = sorted(path.name for path in Path(folder_path).iterdir())
        shutil.copytree(folder_path, self.root / repo_id)
        return f"https://hub/{repo_id}"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.delenv(hub.WEIGHTS_VARIABLE, raising=False)
    found = Hub(tmp_path / "hub", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: found)
    return found


def resolve(name: str | Path) -> Path:
    return hub.resolve_weights(str(name), "model.llm.weights")


def test_local_names_win(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("cobra:tiny/dino.safetensors").is_file()
    folder = stand_in.add("local", "model.safetensors")
    assert resolve(folder) == folder and resolve(folder / "model.safetensors").is_file()
    shelf = tmp_path / "shelf"
    for name in ("org/one", "two"):
        (shelf / name).mkdir(parents=True)
    monkeypatch.setenv(hub.WEIGHTS_VARIABLE, str(shelf))
    assert resolve("org/one") == shelf / "org" / "one"
    assert resolve("other/two") == shelf / "two"
    monkeypatch.setenv(hub.WEIGHTS_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"COBRA_WEIGHTS=.*absent is not a folder"):
        resolve("org/one")
    assert not stand_in.downloads


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (["model.safetensors", "pytorch_model.bin", "config.json", "x.gguf"], {"model.safetensors", "config.json"}),
        (["pytorch_model.bin", "config.json", "README.md"], {"pytorch_model.bin", "config.json"}),
        (
            [
                "model-1-of-2.safetensors",
                "model-2-of-2.safetensors",
                "model.safetensors.index.json",
                "a/model.safetensors",
            ],
            {"model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"},
        ),
    ],
)
def test_only_needed_files_are_fetched(stand_in: Hub, files: list[str], taken: set[str]) -> None:
    stand_in.add("org/name", *files)
    folder = resolve("org/name")
    assert set(stand_in.downloads) == taken
    stand_in.is_online = False
    assert resolve("org/name") == folder  # from the cache


def test_tokenizers_come_from_folders_and_the_hub(stand_in: Hub, tmp_path: Path) -> None:
    folder = stand_in.add("org/name", "tokenizer.json", "model.safetensors")
    assert hub.resolve_file(str(folder), "model.llm.tokenizer") == folder / "tokenizer.json"
    assert hub.resolve_file("org/name", "model.llm.tokenizer").name == "tokenizer.json"
    assert stand_in.downloads == ["tokenizer.json"]


def test_what_is_nowhere_is_explained(stand_in: Hub, tmp_path: Path) -> None:
    for name, message in (
        ("org/absent", "org/absent.*no route to host.*'org/absent' below .*COBRA_WEIGHTS"),
        ("absent/model.safetensors", "no such file"),
        ("/absent", "no such file"),
        ("../absent", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message) as caught:
            resolve(name)
        assert str(caught.value).startswith(f"model.llm.weights={name}") and "\n" not in str(caught.value)
    stand_in.add("org/empty", "README.md")
    with pytest.raises(CheckpointError, match="without the files needed"):
        resolve("org/empty")
    assert not stand_in.cache.exists()


def test_nearest_folder_is_named(stand_in: Hub, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    for name in ("tinny", "far/away"):
        with pytest.raises(CheckpointError, match="no run or model folder at ") as caught:
            cobra.load(tmp_path / "runs" / name)
        assert ("Did you mean 'tiny'?" in str(caught.value)) == (name == "tinny")


def test_machine_without_network_is_told_so_at_once(tmp_path: Path) -> None:
    """The real library, asking a port where nobody listens: some of its calls try again for half a minute."""
    script = (
        "import time, cobra\n"
        "start = time.monotonic()\n"
        "try: cobra.load('cobra-3b')\n"
        "except cobra.errors.CheckpointError as error: print(error)\n"
        "print(time.monotonic() - start)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", f"import cobra.errors, cobra.api\n{script}"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    message, seconds = done.stdout.splitlines()
    assert "model=han1997/cobra: not on this machine, and the Hugging Face Hub cannot be reached (" in message
    assert "'han1997/cobra' below the folder that the environment variable COBRA_WEIGHTS names" in message
    assert float(seconds) < 10
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_hub_that_refuses_is_told_from_no_network(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(huggingface_hub.errors.HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "401 Client Error.")

    def refuse(*_: Any, **__: Any) -> None:
        raise Refused

    monkeypatch.setattr(stand_in, "model_info", refuse)
    with pytest.raises(CheckpointError, match=r"Hub does not give it \(401 Client Error\)"):
        resolve("org/name")


def test_what_is_in_the_way_of_a_model_is_named(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = tmp_path / "shelf"
    (shelf / "run" / "checkpoints").mkdir(parents=True)
    (shelf / "run" / "config.json").write_text("{}")
    (shelf / "run" / "checkpoints" / "latest-checkpoint.pt").symlink_to("step-7.pt")
    (shelf / "cobra-3b").write_text("")
    (shelf / "mamba").mkdir()
    (shelf / "mamba" / "config.json").write_text('{"d_model": 32}')  # with its weights under a name of their own
    monkeypatch.setenv(hub.WEIGHTS_VARIABLE, str(shelf))
    for name, message in (
        ("cobra-3b", "model=cobra-3b: .*shelf/cobra-3b is a file, and a model is a folder"),
        (shelf / "cobra-3b", "shelf/cobra-3b is a file, and a model is a folder"),
        ("run", r"latest-checkpoint.pt is a link to step-7.pt, which is missing"),
        ("mamba", "holds no Cobra model but a language model alone"),
    ):
        with pytest.raises(CheckpointError, match=message):
            cobra.load(name)
    assert not stand_in.downloads


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_mamba_on_the_hub_is_converted(
    stand_in: Hub, small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path, weights: str
) -> None:
    """cobra.load asks for a model's own files; a Mamba's weights have other names."""
    write = write_original_mamba if weights.endswith(".bin") else write_hugging_face_mamba
    (stand_in.root / "org" / "mamba").mkdir(parents=True)
    write(small_model.llm, tokenizer.file, stand_in.root / "org" / "mamba")
    convert("org/mamba", tmp_path / "out", "hf-mamba")
    assert weights in stand_in.downloads
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["backbone.embeddings.weight"], small_model.llm.backbone.embedding.weight)


def test_interrupted_download_leaves_no_model(stand_in: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.add("org/name", "model.safetensors")

    def broken(*_: Any, **__: Any) -> str:
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", broken)
    with pytest.raises(CheckpointError, match="connection reset"):
        resolve("org/name")


def test_models_of_the_paper(stand_in: Hub) -> None:
    models = cobra.available_models()
    assert "3.5B" in models["cobra-3b"] and "VQA-v2 77.8" in models["cobra-3b"] and "han1997" in models["cobra-3b"]
    assert all("\n" not in line for line in models.values())
    with pytest.raises(CheckpointError, match=r"han1997/cobra.*COBRA_WEIGHTS"):
        cobra.load("cobra-3b")
    with pytest.raises(CheckpointError, match=r"not public.*experiment=cobra-8b"):
        cobra.load("cobra-8b")
    with pytest.raises(CheckpointError, match=r"no run or model folder.*Did you mean 'cobra-3b'"):
        cobra.load("cobra-3")


def test_released_files_are_asked_for_by_name(stand_in: Hub) -> None:
    stand_in.add("han1997/cobra", "cobra+3b/config.json", "cobra+3b/checkpoints/latest-checkpoint.pt", "other/x.pt")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        cobra.load("cobra-3b")
    assert sorted(stand_in.downloads) == ["cobra+3b/checkpoints/latest-checkpoint.pt", "cobra+3b/config.json"]


def test_pushed_models_load_again(
    stand_in: Hub, small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    vlm = cobra.load(tmp_path / "ours", device="cpu")
    assert vlm.push_to_hub("me/mine") == "https://hub/me/mine"
    assert stand_in.uploads == {"me/mine": ["README.md", "config.json", "model.safetensors", "tokenizer.json"]}
    assert 'cobra.load("me/mine")' in (stand_in.root / "me" / "mine" / "README.md").read_text()
    again = cobra.load("me/mine", device="cpu")
    assert "README.md" not in stand_in.downloads
    for name, tensor in vlm.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    monkeypatch.setenv(hub.WEIGHTS_VARIABLE, str(tmp_path))
    shutil.copytree(tmp_path / "ours", tmp_path / "cobra-8b")
    assert cobra.load("cobra-8b", device="cpu").name == vlm.name  # a name's own folder comes first
    stand_in.is_online = False
    with pytest.raises(CheckpointError, match="Cannot upload to 'me/mine'"):
        vlm.push_to_hub("me/mine")


@pytest.fixture
def sharded(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model in Hugging Face's form; written before the Hub is replaced, which transformers looks at."""
    pytest.importorskip("transformers")
    from cobra.integrations.hf.export import write_hugging_face

    folder = tmp_path / "sharded"
    folder.mkdir()
    write_hugging_face(small_model, tokenizer.file, folder, shard_size="200KB")
    return folder


def test_shards_are_fetched_with_their_index(sharded: Path, stand_in: Hub, small_model: CobraVLM) -> None:
    stand_in.add("me/mine", "other/model-1.safetensors", "other/tokenizer.json")
    for name, inside in (("me/mine", ""), ("me/mine/large", "large/")):
        shutil.copytree(sharded, stand_in.root / name, dirs_exist_ok=True)
        stand_in.downloads.clear()
        vlm = cobra.load(name, device="cpu")
        for key, tensor in small_model.state_dict().items():
            assert torch.equal(tensor, vlm.model.state_dict()[key])
        shards = {path.name for path in sharded.glob("model-0*.safetensors")}
        wanted = {*shards, "config.json", "tokenizer.json", "model.safetensors.index.json"}
        assert len(shards) > 1 and set(stand_in.downloads) == {inside + file for file in wanted}


def test_every_public_id_describes_a_model(tmp_path: Path) -> None:
    for vision_id in VISION:
        for llm_id in LLMS:
            config = write_public_config(tmp_path, vision_backbone_id=vision_id, llm_backbone_id=llm_id)
            assert config.vision.resize == "letterbox" and config.projector.kind == "fused-gelu-mlp"


def test_every_public_language_model_has_a_config_of_its_sizes() -> None:
    folder = Path(__file__).resolve().parents[1] / "configs" / "model" / "llm"
    for name, settings in LLMS.items():
        assert as_config(LLMConfig, read_yaml(folder / f"{name}.yaml", name)) == as_config(LLMConfig, settings)


def test_every_released_model_has_an_experiment() -> None:
    """Those without public weights are to be trained with it."""
    folder = Path(__file__).resolve().parents[1] / "configs" / "experiment"
    assert {*RELEASES} == {file.stem for file in folder.glob("cobra-*.yaml")} - {"cobra-3b-align", "cobra-3b-lora"}


def write_public_config(folder: Path, **changes: object):
    import json

    model = {
        "model_id": "x",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "llm_backbone_id": "mamba-2.8b-zephyr",
        "image_resize_strategy": "letterbox",
    }
    model = {key: value for key, value in (model | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"model": model}))
    return public_config(folder, None, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_backbone_id": "dinosiglip-384"}, r"Did you mean 'dinosiglip-vit-so-384px'.*vision=\{'towers'"),
        ({"llm_backbone_id": "gpt"}, r"Known: mamba-130m.*llm=\{'d_model'"),
        ({"arch_specifier": "no-align+resampler"}, "known endings: linear"),
        ({"llm_backbone_id": None}, "lacks llm_backbone_id"),
        ({"image_resize_strategy": "stretch"}, "stretch"),
    ],
)
def test_wrong_public_configs_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        write_public_config(tmp_path, **changes)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_settings_files_are_checked(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    save_model_folder(small_model, tokenizer.file, tmp_path / "ours")
    for text, message in (
        ("[1, 2]", "must hold settings"),
        ("a: [", "not a YAML file"),
        ("resise: letterbox", "resize"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            cobra.load(tmp_path / "ours", vision=tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        cobra.load(tmp_path / "ours", llm=tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"llm='a\\x00b' is not the path of a YAML file"):
        cobra.load(tmp_path / "ours", llm="a\0b")
    changed = cobra.load(tmp_path / "ours", device="cpu", vision={"resize": "letterbox"}, llm={"prompt": "mamba"})
    assert changed.model.vision.transform.strategy == "letterbox" and "In:" in changed.prompt.question("?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"llm": [1]}, r"llm=\[1\] is of type list.*such as llm=\{'tokenizer'"),
        ({"vision": [{"weights": "random"}]}, r"vision=.* is of type list.*such as vision=\{'towers'"),
        ({"vision": 7}, "vision=7 is of type int"),
        ({"llm": {1: 2}}, "llm must hold settings by name"),
        ({"llm": {"d_modle": 4}}, r"Unknown setting 'llm\.d_modle'\. Did you mean 'd_model'"),
        ({"llm": {"prompt": "chatml"}}, r"^llm\.prompt='chatml' is not known; choose one of zephyr, mamba"),
        ({"llm": {"d_model": "4"}}, r"llm\.d_model='4' is not of type int"),
        ({"vision": {"resize": "stretch"}}, r"^vision\.resize='stretch'"),
        ({"vision": {"towers": [{"weights": "random"}]}}, r"vision\.towers\[0\]\.timm is not set"),
        ({"vision": {"towers": "vit"}}, r"vision\.towers='vit' is not of type list"),
    ],
)
@pytest.mark.parametrize("layout", ["cobra", "public"])
def test_wrong_overrides_are_named(
    small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path, given: dict[str, Any], message: str, layout: str
) -> None:
    if layout == "cobra":
        save_model_folder(small_model, tokenizer.file, tmp_path)
    else:
        write_public_run(small_model, tokenizer.file, tmp_path)
    with pytest.raises(ConfigError, match=message):
        cobra.load(tmp_path, **given)


def test_overrides_without_effect_are_refused(small_model: CobraVLM, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ours, public = tmp_path / "ours", tmp_path / "public"
    save_model_folder(small_model, tokenizer.file, ours)
    public.mkdir()
    write_public_run(small_model, tokenizer.file, public)
    parts = {part: yaml.safe_load((public / f"{part}.yaml").read_text()) for part in ("vision", "llm")}
    for key in ("vision", "llm"):
        given = {key: parts[key] | ({"weights": "absent.bin"} if key == "llm" else {})}
        with pytest.raises(ConfigError, match=rf"{key}\..*weights: no effect, as .*ours/model\.safetensors holds"):
            cobra.load(ours, **given)
    parts["vision"]["towers"] = [
        tower | {"weights": str(public / tower["weights"])} for tower in parts["vision"]["towers"]
    ]
    parts["llm"]["tokenizer"] = str(tokenizer.file)
    assert cobra.load(public, device="cpu", **parts).name == small_model.config.name
    with pytest.raises(ConfigError, match=r"llm\.weights: no effect, as .*latest-checkpoint\.pt holds"):
        cobra.load(public, vision=parts["vision"], llm=parts["llm"] | {"weights": "absent.bin"})
    blind = {"towers": [tower | {"weights": "random"} for tower in parts["vision"]["towers"]]}
    with pytest.raises(ConfigError, match=r"vision\.towers\[0\]\.weights='random' would make a blind model"):
        cobra.load(public, vision=blind, llm=parts["llm"])
