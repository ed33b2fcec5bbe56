"""The Triton kernels: through the interpreter where there is no GPU, cut into chunks, and compiled for a GPU.

The interpreter must be switched on before anything imports Triton, so it gets a process of its own, which runs the
tests of this folder for this backend alone.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cobra.ops
from cobra.errors import BackendError
from cobra.ops import dispatch, reference

from .cases import assert_all_close, conv_arguments, run_with_gradients, scan_arguments
from .conftest import Backend, make_backend

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PACKAGE = "cobra.ops.backends.triton"

# Relative to the largest magnitude of each tensor: see the tests of the scan and the convolution.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-11}


@pytest.fixture
def backend() -> Backend:
    return make_backend("triton")


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the kernels are tested in this process")
def test_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-k", "triton", "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [  # batch, length, dim, state: several chunks of 4 or 8 steps, none a multiple of them
        ((2, 19, 5, 16), torch.float32),
        ((1, 10, 33, 8), torch.float32),
        ((1, 9, 5, 64), torch.float32),
        ((1, 10, 3, 3), torch.float64),
        ((2, 9, 40, 16), torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("optional", [True, False], ids=["all arguments", "only required"])
def test_scan_in_chunks_matches_definition(backend: Backend, monkeypatch, shape, dtype, optional):
    batch, length, dim, state = shape
    chunk = 8 if optional else 4
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.scan"), "chunk_length", lambda *sizes: chunk)
    arguments = scan_arguments(batch, length, dim, state, dtype=dtype, optional=optional, initial=optional)
    if not optional:  # a bare step size must be positive
        arguments["delta"] = arguments["delta"].abs() * 0.5
    # the first row ends inside a chunk, and chunks without a single step follow it
    lengths = torch.tensor([5, length])[:batch] if optional else None
    options = {"delta_softplus": optional, "lengths": lengths}
    actual = run_with_gradients(backend.function("selective_scan"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


def test_padding_of_any_content_changes_no_chunk(backend: Backend, monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.scan"), "chunk_length", lambda *sizes: 4)
    clean = scan_arguments(2, 12, 5, 4)
    junk = {name: t.clone() for name, t in clean.items()}
    for name in ("u", "delta", "B", "C", "z"):
        junk[name][1, 6:] = torch.nan
    options = {"delta_softplus": True, "lengths": torch.tensor([12, 6])}
    function = backend.function("selective_scan")
    results = [run_with_gradients(function, given, backend.device, **options) for given in (clean, junk)]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize("length", [1, 31, 70])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_conv_of_several_tiles_matches_definition(backend: Backend, length, dtype):
    arguments = conv_arguments(1, length, 70, 4, dtype=dtype)
    actual = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device)
    expected = run_with_gradients(reference.causal_conv1d, arguments, torch.device("cpu"), upcast=True)
    assert_all_close(actual, expected, TOLERANCE[dtype])


def test_compiled_caller_gets_the_same_numbers(backend: Backend):
    function, arguments = backend.function("selective_scan"), scan_arguments(1, 4, 5, 16)

    def call(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, final_state = function(**tensors, delta_softplus=True)
        return 2 * y, final_state

    expected = run_with_gradients(call, arguments, backend.device)
    actual = run_with_gradients(torch.compile(call, backend="aot_eager"), arguments, backend.device)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


def test_chunks_fill_the_gpu_and_no_more():
    pytest.importorskip("triton")
    scan = importlib.import_module(f"{PACKAGE}.scan")
    assert scan.chunk_length(64, 1024, 5120) == 1024
    assert scan.chunk_length(64, 1023, 5120) == 1024
    assert scan.chunk_length(1, 1, 5120) >= 1
    alone = scan.chunk_length(1, 1024, 5120)
    assert alone % scan.SUB == 0 and scan.MIN_CHUNK <= alone <= 1024 // 8


def test_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = dispatch.discover()["triton"]
    for other in dispatch.discover().values():
        if other not in (module, reference):
            monkeypatch.setattr(other, "available", lambda: "missing")
    assert dispatch.choose("cpu", torch.float32, None)[0] is reference
    assert dispatch.choose("cuda", torch.float32, None)[0] is not reference
    assert dispatch.choose("cpu", torch.float32, "triton")[0] is module


def test_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = dispatch.discover()["triton"]
    assert module.supports(torch.device("cpu"), torch.float32) is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"'triton' cannot run here: .*(no CUDA device|pip install triton)"):
        cobra.ops.set_backend("triton")


def test_import_does_not_import_triton():
    code = f"import sys, torch; before = 'triton' in sys.modules; import {PACKAGE}; "
    code += "sys.exit('triton' in sys.modules and not before)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


_INTEGERS = ("_row", "_step", "_channel", "_state", "length", "dim", "chunk", "chunks", "num_rows", "group")
_SCAN = {"STATE": 16, "N": 16, "BLOCK_D": 32}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
@pytest.mark.parametrize(
    ("file", "kernel", "constants"),
    [
        ("scan_kernels", "chunk_states", _SCAN | {"SOFTPLUS": True, "lengths": None}),
        ("scan_kernels", "chunk_adjoints", _SCAN | {"SOFTPLUS": True}),
        ("scan_kernels", "combine", _SCAN | {"REVERSE": True}),
        ("scan_kernels", "forward", _SCAN | {"SOFTPLUS": True, "D": None}),
        ("scan_kernels", "backward", _SCAN | {"SOFTPLUS": True, "SUB": 4}),
        ("conv", "_forward", {"WIDTH": 4, "BLOCK_T": 32, "BLOCK_D": 64, "initial": None}),
        ("conv", "_backward", {"WIDTH": 4, "BLOCK_T": 32, "BLOCK_D": 64}),
        ("norm", "_forward", {"EPS": 1e-5, "BLOCK": 4096}),
        ("norm", "_backward", {"BLOCK": 4096, "dsums": None}),
    ],
)
def test_kernel_compiles_for_a_gpu_that_is_not_here(file, kernel, constants):
    """The interpreter accepts more than the compiler does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"{PACKAGE}.{file}"), kernel)
    if "ACC" in function.arg_names:
        constants = constants | {"ACC": triton.language.float32}
    signature = {name: "i32" if name.endswith(_INTEGERS) else "*fp32" for name in function.arg_names}
    signature |= {"lengths": "*i64"} if "lengths" in signature else {}
    signature |= dict.fromkeys(constants, "constexpr")
    indices = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=indices)
    assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm
