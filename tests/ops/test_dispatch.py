"""How a backend is found, chosen, forced and refused."""

import logging
import subprocess
import sys
from pathlib import Path

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


def test_import_does_not_import_numba():
    code = "import sys, cobra.ops; sys.exit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_table_command_runs():
    result = subprocess.run([sys.executable, "-m", "cobra.ops"], capture_output=True, text=True, check=True)
    assert "reference" in result.stdout and "float32 on cpu: " in result.stdout
