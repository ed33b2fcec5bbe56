"""How a backend is found, chosen, forced and refused."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cobra.ops
from cobra.errors import BackendError
from cobra.ops import dispatch, reference
from cobra.ops.backends import cpu


def _chosen() -> str:
    return dispatch.choose("cpu", torch.float32, dispatch.forced_backend())[0][0].NAME


def test_every_file_of_the_folder_is_found():
    folder = Path(cobra.ops.__file__).parent / "backends"
    entries = {path.stem for path in folder.iterdir() if not path.name.startswith(("_", "."))}
    found = dispatch.discover()
    assert {module.__name__.rsplit(".", 1)[-1] for module in found.values()} == entries | {"reference"}
    assert list(found)[-1] == "reference"


def test_environment_variable_forces_a_backend(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "reference")
    assert _chosen() == "reference"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "nonsense")
    with pytest.raises(BackendError, match=r"'nonsense'; known backends: .*cpu.*reference"):
        cobra.ops.add_rms_norm(torch.ones(1, 2), None, torch.ones(2), 1e-5)


def test_use_backend_forces_and_restores(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "cpu")
    with cobra.ops.use_backend("reference"):
        assert dispatch.forced_backend() == "reference"
        assert dispatch.implementation("selective_scan", torch.ones(1)) is reference.selective_scan
    assert dispatch.forced_backend() == "cpu"
    cobra.ops.set_backend("reference")
    assert dispatch.forced_backend() == "reference"


def test_use_backend_restores_after_an_error():
    with pytest.raises(RuntimeError), cobra.ops.use_backend("reference"):
        raise RuntimeError
    assert dispatch.forced_backend() is None


def test_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(BackendError, match=r"known backends: .*cpu.*reference"), cobra.ops.use_backend("nonsense"):
        pass


def test_missing_backend_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: "numba is not installed; pip install numba")
    with pytest.raises(BackendError, match="pip install numba"):
        cobra.ops.set_backend("cpu")


def test_backend_that_does_not_take_the_tensor_is_refused():
    with pytest.raises(BackendError, match="CPU tensors only"):
        dispatch.choose("cuda", torch.float32, "cpu")


def test_missing_numba_falls_back_with_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "available", lambda: "numba is not installed; pip install numba")
    with caplog.at_level(logging.WARNING, "cobra.ops"):
        for _ in range(3):
            assert _chosen() == "reference"
    assert len(caplog.records) == 1
    assert "pip install numba" in caplog.text


def test_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "cobra.ops"):
        for _ in range(3):
            _chosen()
    assert len(caplog.records) == 1


def test_functions_that_a_backend_lacks_come_from_the_reference(monkeypatch):
    monkeypatch.setattr(cpu, "_MODULES", {})
    monkeypatch.delitem(vars(cpu), "add_rms_norm", raising=False)
    assert dispatch.implementation("add_rms_norm", torch.ones(1)) is reference.add_rms_norm


def test_fused_functions_come_from_the_first_choice_that_has_them(monkeypatch):
    """A preferred backend without them must not switch off those of the next; one asked for by name does."""
    bare, fused = (
        SimpleNamespace(NAME=name, available=lambda: None, supports=lambda device, dtype: None)
        for name in ("bare", "fused")
    )
    fused.linear = lambda x, weight: x
    monkeypatch.setattr(dispatch, "discover", lambda: {"bare": bare, "fused": fused, "reference": reference})
    assert dispatch.fused_implementation("linear", torch.ones(1)) is fused.linear
    assert dispatch.fused_implementation("stack_step", torch.ones(1)) is None
    for name, expected in (("fused", fused.linear), ("bare", None), ("reference", None)):
        with cobra.ops.use_backend(name):
            assert dispatch.fused_implementation("linear", torch.ones(1)) is expected


def test_import_does_not_import_numba():
    code = "import sys, cobra.ops; sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_command_runs():
    result = subprocess.run([sys.executable, "-m", "cobra.ops"], capture_output=True, text=True, check=True)
    assert "reference" in result.stdout and "float32 on cpu: " in result.stdout


BROKEN = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
{damage}
import torch, cobra.ops
from cobra.ops.reference import add_rms_norm
x = torch.randn(2, 5)
for _ in range(2):
    normed, _ = cobra.ops.add_rms_norm(x, None, torch.ones(5), 1e-5)
assert torch.allclose(normed, add_rms_norm(x, None, torch.ones(5), 1e-5)[0])
"""
NO_CACHE = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
"""


@pytest.mark.parametrize(
    ("damage", "warning"),
    [
        (
            "sys.modules['numba'] = None",
            "Using the slow reference ops on cpu, faster backends are missing (cpu: numba ",
        ),
        (NO_CACHE, "The compiled CPU kernels cannot be kept: no cache folder can be written."),
    ],
    ids=["numba does not import", "no cache folder"],
)
def test_damaged_surroundings_cost_speed_and_one_warning(damage, warning):
    code = BROKEN.format(damage=damage)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(warning) == 1, result.stderr


def test_kernels_of_other_sources_are_not_taken_from_the_cache(tmp_path):
    """Numba looks at a kernel's own file only, and not at the functions that it is made of."""
    pytest.importorskip("numba")
    package = Path(cobra.ops.__file__).parents[1]
    copy = tmp_path / "cobra"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    code = "import torch, cobra.ops\n"
    code += "print(float(cobra.ops.add_rms_norm(torch.full((1, 64), 3.0), None, torch.ones(64), 1e-5)[0][0, 0]))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}

    def run() -> float:
        result = subprocess.run(
            [sys.executable, "-P", "-c", code] if sys.version_info >= (3, 11) else [sys.executable, "-c", code],
            capture_output=True, text=True, check=True, env=environment, cwd=tmp_path,
        )  # fmt: skip
        return float(result.stdout)

    assert run() == pytest.approx(1)
    vector = copy / "ops" / "backends" / "cpu" / "vector.py"
    source = vector.read_text()
    before = vector.stat()
    vector.write_text(source + "# another version\n")
    os.utime(vector, (before.st_atime, before.st_mtime))  # as packages keep the times of their files
    indices = {path: path.stat().st_mtime_ns for path in (tmp_path / "kernels").rglob("*.nbi")}
    assert indices
    assert run() == pytest.approx(1)
    assert all(path.stat().st_mtime_ns > indices[path] for path in indices if path.exists())
