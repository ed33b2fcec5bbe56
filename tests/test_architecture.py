"""The rules of docs: who imports whom, which library belongs where, what an import may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cobra"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room, and the rooms it may import; itself is always allowed, and so are those that its own rooms may import.
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "__main__": {"config"},
    "runtime": {"errors"},
    "ranks": {"runtime"},
    "hub": {"errors", "config", "runtime"},
    "ops": {"errors", "config", "runtime"},
    "text": {"errors", "config", "runtime", "hub"},
    "models": {"ops", "text", "ranks"},
    "generation": {"models"},
    "releases": {"errors"},
    "loading": {"models", "releases"},
    "convert": {"loading", "integrations", "eval"},
    "api": {"generation", "loading"},
    "data": {"text", "ranks"},
    "train": {"models", "data", "describe", "ranks"},
    "integrations": {"api"},
    "serve": {"api"},
    "eval": {"api", "data", "ranks", "integrations"},
    "describe": {"config", "models", "__main__"},
    "demo": {"api", "data", "eval"},
}

HOMES = {  # library: the only rooms that may import it
    "timm": {"models"},
    "tokenizers": {"text"},
    "omegaconf": {"config"},
    "matplotlib": {"train", "eval", "data"},
    "numba": {"ops"},
    "triton": {"ops"},
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "wandb": {"train"},
    "easy_vqa": {"data"},
    "huggingface_hub": {"hub"},
    "requests": {"data"},
    "urllib3": {"data"},
    "fastapi": {"serve"},
    "h11": {"serve"},
    "pydantic": {"serve"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
    "hydra": set(),
    "transformers": {"integrations"},
    "lmms_eval": {"integrations"},
    "gradio": {"demo"},
}

# Never at module level: what a user may not have, and what is slow to import and rarely needed.
OPTIONAL = {"wandb", "mamba_ssm", "causal_conv1d", "triton", "easy_vqa", "transformers", "huggingface_hub", "lmms_eval"}
OPTIONAL |= {"gradio"}

# Loaded only by the library that it plugs into, whose classes it inherits from.
PLUGIN = PACKAGE / "integrations" / "lmms_eval" / "model.py"

# Copied into exported models, where they work without this package.
SHIPPED = set((PACKAGE / "integrations" / "hf").glob("*_cobra.py"))


def reachable(room: str) -> set[str]:
    rooms = {room} | ALLOWED[room]
    for other in ALLOWED[room]:
        rooms |= reachable(other)
    return rooms


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path, *, top_level: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports."""
    tree = ast.parse(file.read_text())
    package = file.relative_to(ROOT).parent.parts
    names = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == "cobra" else {module}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_module_imports_only_lower_rooms(file: Path) -> None:
    room = room_of(file)
    if file in SHIPPED:
        own = {f"cobra.integrations.hf.{shipped.stem}" for shipped in SHIPPED}
        assert {name for name in imports(file) if name.startswith("cobra")} <= own
    if room == "__init__":  # the lazy front door
        assert not {name for name in imports(file, top_level=True) if name.split(".")[0] in ("torch", "cobra")}
        return
    assert room in ALLOWED, f"give {room} a line in the table"
    used = {name.split(".")[1] for name in imports(file) if name.startswith("cobra.")}
    assert used <= reachable(room), f"{room} must not import {sorted(used - reachable(room))}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(file: Path) -> None:
    libraries = {name.split(".")[0] for name in imports(file)}
    if file in SHIPPED:
        assert libraries - sys.stdlib_module_names <= {"transformers", "timm", "torch", "numpy", "PIL", "cobra"}
        return
    for library in libraries & HOMES.keys():
        assert room_of(file) in HOMES[library], f"{library} does not belong here"
    at_module_level = {name.split(".")[0] for name in imports(file, top_level=True)}
    if file == PLUGIN:
        at_module_level -= {"lmms_eval"}
    backend = file.is_relative_to(PACKAGE / "ops" / "backends")
    assert not at_module_level & (OPTIONAL if not backend else {"wandb", "easy_vqa"})


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_library_never_prints(file: Path) -> None:
    if file.name == "__main__.py":  # a command
        return
    calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_import_cobra_loads_no_torch() -> None:
    heavy = ["torch", "timm", "numpy", "PIL", "tokenizers", "hydra", "omegaconf", "matplotlib", "wandb", "transformers"]
    output = run_python(f"import sys, cobra; cobra.__version__; print([m for m in {heavy} if m in sys.modules])")
    assert output.strip() == "[]"


def test_modules_import_without_side_effects() -> None:
    """No logging set-up, no seeding, no environment writes."""
    files = [file for file in FILES if file != PLUGIN]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    modules = [module for module in modules if not module.endswith("__main__")]
    output = run_python(
        "import importlib, logging, os, torch, timm, matplotlib.figure, tokenizers\n"
        "def world(): return dict(os.environ), logging.root.handlers[:], torch.get_rng_state().tolist()\n"
        "before = world()\n"
        f"for module in {modules}: importlib.import_module(module)\n"
        "print(world() == before)"
    )
    assert output.strip() == "True"
