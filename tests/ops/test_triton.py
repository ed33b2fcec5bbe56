"""The Triton kernels: through the interpreter where there is no GPU, cut into chunks, and compiled for a GPU.

The interpreter must be switched on before anything imports Triton, so it gets a process of its own, which runs the
tests of this folder for this backend alone.
"""

import importlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import cobra.ops
from cobra.errors import BackendError
from cobra.ops import dispatch, reference
from cobra.ops.backends._shared import first_steps

from .cases import assert_all_close, conv_arguments, run_with_gradients, scan_arguments
from .conftest import Backend, make_backend

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PACKAGE = "cobra.ops.backends.triton"

# Relative to the largest magnitude of each tensor: see the tests of the scan and the convolution.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-11}


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
        ((2, 6, 40, 16), torch.bfloat16),
        ((1, 6, 1, 1), torch.float16),
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


@pytest.mark.parametrize("length", [1, 15, 35])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_conv_of_several_tiles_matches_definition(backend: Backend, length, dtype):
    arguments = conv_arguments(1, length, 70, 4, dtype=dtype)
    actual = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device)
    expected = run_with_gradients(reference.causal_conv1d, arguments, torch.device("cpu"), upcast=True)
    assert_all_close(actual, expected, TOLERANCE[dtype])


# With chunks of 4 steps texts begin at a chunk's first step and at its last, at a row's first, and at two steps in a
# row; the one at step 6 of the second row stands behind its end.
_RESETS = torch.zeros(2, 11, dtype=torch.bool)
_RESETS[0, [4, 5, 7]] = True
_RESETS[1, [0, 3, 6]] = True
_LENGTHS = torch.tensor([11, 6])


@pytest.fixture
def chunks_of_four(monkeypatch):
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.scan"), "chunk_length", lambda *sizes: 4)


@pytest.mark.parametrize("lengths", [_LENGTHS, None], ids=["padded", "whole rows"])
def test_packed_scan_in_chunks_matches_definition(backend: Backend, chunks_of_four, lengths):
    arguments = scan_arguments(2, 11, 5, 4)
    options = {"delta_softplus": True, "lengths": lengths, "resets": _RESETS}
    actual = run_with_gradients(backend.function("selective_scan"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


def test_packed_conv_of_several_tiles_matches_definition(backend: Backend):
    arguments = conv_arguments(2, 35, 5, 4)
    resets = torch.zeros(2, 35, dtype=torch.bool)
    resets[0, [1, 15, 16, 32]] = True
    resets[1, [0, 14, 31]] = True
    options: dict[str, Any] = {"lengths": torch.tensor([35, 30]), "resets": resets}
    actual = run_with_gradients(backend.function("causal_conv1d"), arguments, backend.device, **options)
    expected = run_with_gradients(reference.causal_conv1d, arguments, torch.device("cpu"), upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d"])
def test_damaged_text_leaves_the_next_one_alone(backend: Backend, chunks_of_four, name):
    """Texts of steps 0 to 4, with NaN, and 5 to 10; an A of zero turns an infinite sum of steps into NaN."""
    clean = scan_arguments(1, 11, 5, 4) if name == "selective_scan" else conv_arguments(1, 11, 5, 4)
    along_time = [n for n in ("u", "delta", "B", "C", "z", "x") if n in clean]
    options: dict[str, object] = {"resets": (torch.arange(11) == 5)[None]}
    if "A" in clean:
        clean["A"][0] = 0.0
        options["delta_softplus"] = True
    junk = {n: t.clone() for n, t in clean.items()}
    junk["initial_state"][:] = torch.nan
    for n in along_time:
        junk[n][:, :5] = torch.inf if n == "delta" else torch.nan
    results = []
    for arguments in (clean, junk):
        leaves = {n: t.clone().requires_grad_() for n, t in arguments.items()}
        y, final = backend.function(name)(**leaves, **options)
        gradients = torch.autograd.grad(y[:, 5:].square().sum() + final.square().sum(), [leaves[n] for n in along_time])
        results.append({"y": y.detach()[:, 5:], "final": final.detach()})
        results[-1] |= {n: gradient[:, 5:] for n, gradient in zip(along_time, gradients, strict=True)}
    for n, value in results[0].items():
        assert torch.equal(value, results[1][n]), n


def _call(backend: Backend, name: str):
    """An operation with its options and small arguments for it, that cross chunks of 4 steps."""
    function = backend.function(name)
    if name == "add_rms_norm":
        x = conv_arguments(2, 3, 5, 1)
        return partial(function, eps=1e-5), {"x": x["x"], "residual": 2 * x["x"], "weight": x["bias"]}
    options = {"lengths": torch.tensor([5, 6]), "resets": _RESETS[:, :6]}
    if name == "causal_conv1d":
        return partial(function, **options), conv_arguments(2, 6, 5, 4)
    return partial(function, delta_softplus=True, **options), scan_arguments(2, 6, 5, 3)


@pytest.mark.parametrize("name", ["selective_scan", "causal_conv1d", "add_rms_norm"])
def test_compiled_operation_gives_the_same_numbers(backend: Backend, chunks_of_four, name):
    call, arguments = _call(backend, name)
    expected = run_with_gradients(call, arguments, backend.device)
    compiled = torch.compile(lambda **tensors: call(**tensors), backend="aot_eager", fullgraph=True)
    assert_all_close(run_with_gradients(compiled, arguments, backend.device), expected, 0.0)


@pytest.mark.parametrize("chunk", [4, 8])
def test_scan_operator_keeps_the_rules_of_custom_operators(backend: Backend, monkeypatch, chunk):
    monkeypatch.setattr(importlib.import_module(f"{PACKAGE}.scan"), "chunk_length", lambda *sizes: chunk)
    given = {n: t.to(backend.device).requires_grad_() for n, t in scan_arguments(2, 6, 5, 3).items()}
    A, initial = (given[n].detach().mT.contiguous().requires_grad_() for n in ("A", "initial_state"))
    lengths, resets = torch.tensor([5, 6], device=backend.device), _RESETS[:, :6].contiguous().to(backend.device)
    inputs = [given["u"], given["delta"], A, given["B"], given["C"], given["D"], given["z"], given["delta_bias"]]
    torch.library.opcheck(torch.ops.cobra.triton_selective_scan, (*inputs, True, lengths, resets, initial, True))


def test_other_operators_keep_the_rules_of_custom_operators(backend: Backend):
    for name in ("causal_conv1d", "add_rms_norm"):
        assert backend.function(name)
    given = {n: t.to(backend.device).requires_grad_() for n, t in conv_arguments(2, 6, 5, 4).items()}
    weight = given["weight"].detach().t().contiguous().requires_grad_()
    firsts = first_steps(_RESETS[:, :6]).to(backend.device)
    lengths = torch.tensor([5, 6], device=backend.device)
    inputs = (given["x"], weight, given["bias"], lengths, firsts, given["initial_state"])
    torch.library.opcheck(torch.ops.cobra.triton_causal_conv1d, inputs)
    x = given["x"][0].detach().to(torch.bfloat16).requires_grad_()
    torch.library.opcheck(torch.ops.cobra.triton_add_rms_norm, (x, given["x"][1], given["bias"], 1e-5))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
def test_large_batches_fit_a_grid(monkeypatch):
    """CUDA takes 2^31 - 1 programs along the first axis and 65,535 along the others."""
    pytest.importorskip("triton")
    scan, conv, norm = (importlib.import_module(f"{PACKAGE}.{file}") for file in ("scan", "conv", "norm"))
    counts = []
    for module in (scan, conv, norm):
        monkeypatch.setattr(module, "launch", lambda kernel, programs, *rest, **constants: counts.append(programs))
    monkeypatch.setattr(scan, "chunk_length", lambda *sizes: 4)
    batch, length, dim, state = 70_000, 8, 65, 16
    with torch.device("meta"):
        u, B, A, D = (
            torch.empty(*shape) for shape in ((batch, length, dim), (batch, length, state), (state, dim), (dim,))
        )
        arguments = (u, u, A, B, B, D, u, D, True, None, None, None, True)
        y, final, starts = scan._scan(*arguments)
        scan._scan_backward([y, final, None], [starts], *arguments)
        conv._convolve(u, A, D, None, None, None)
        conv._convolve_backward([u], [], u, A, D, None, None, None)
        norm._normalise(u.view(-1, dim), None, D, 1e-5)
    one_pass = [batch * 2 * 3, batch * 3, batch * 2 * 3]  # two chunks and three blocks of channels
    assert counts == [*one_pass, *one_pass, batch * 2, batch * 2 * 2, batch * length]


def test_sizes_beyond_the_kernels_are_refused(backend: Backend):
    with pytest.raises(BackendError, match=r"at most 256 states per channel, A has 257"):
        backend.function("selective_scan")(**scan_arguments(1, 1, 1, 257))
    with pytest.raises(BackendError, match=r"at most 65536 channels, x has 65537"):
        backend.function("add_rms_norm")(torch.ones(1, 65537), None, torch.ones(65537), 1e-5)


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
    assert dispatch.choose("cpu", torch.float32, None)[0][0] is reference
    assert dispatch.choose("cuda", torch.float32, None)[0][0] is not reference
    assert dispatch.choose("cpu", torch.float32, "triton")[0][0] is module


def test_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = dispatch.discover()["triton"]
    assert module.supports(torch.device("cpu"), torch.float32) is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=r"'triton' cannot run here: .*(no CUDA device|pip install triton)"):
        cobra.ops.set_backend("triton")


def test_import_does_not_need_triton():
    code = f"import sys; sys.modules['triton'] = None; import {PACKAGE}"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


_INTEGERS = ("_row", "_step", "length", "dim", "chunk", "chunks", "num_rows", "group")
_STRIDES = ("_channel", "_state", "rows", "count", "width", "span", "batch")
_POINTERS = {"lengths": "*i64", "firsts": "*i64", "resets": "*i1", "cuts": "*i1"}  # the others are float32
_SCAN = {"STATE": 16, "N": 16, "BLOCK_D": 32}
_TILE = {"WIDTH": 4, "BLOCK_T": 16, "BLOCK_D": 64}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
@pytest.mark.parametrize(
    ("file", "kernel", "constants"),
    [
        ("scan_kernels", "chunk_states", _SCAN | {"SOFTPLUS": True, "lengths": None}),
        ("scan_kernels", "chunk_adjoints", _SCAN | {"SOFTPLUS": True}),
        ("scan_kernels", "combine", _SCAN | {"REVERSE": True}),
        ("scan_kernels", "combine", _SCAN | {"REVERSE": False, "cuts": None, "initial": None}),
        ("scan_kernels", "forward", _SCAN | {"SOFTPLUS": True, "D": None}),
        # Triton makes constants of integers that are 1
        ("scan_kernels", "forward", _SCAN | {"SOFTPLUS": True, "resets": None, "length": 1, "dim": 1}),
        ("scan_kernels", "backward", _SCAN | {"SOFTPLUS": True, "SUB": 4}),
        (
            "scan_kernels",
            "backward",
            _SCAN | {"SOFTPLUS": True, "SUB": 4, "resets": None, "starts": None, "ends": None},
        ),
        ("conv", "_forward", _TILE | {"initial": None}),
        ("conv", "_forward", _TILE | {"firsts": None, "length": 1}),
        ("conv", "_backward", _TILE),
        ("conv", "_backward", _TILE | {"firsts": None, "WIDTH": 1, "dim": 1}),
        ("norm", "_forward", {"EPS": 1e-5, "BLOCK": 4096}),
        ("norm", "_backward", {"BLOCK": 4096, "dsums": None}),
    ],
)
def test_kernel_compiles_for_a_gpu_that_is_not_here(file, kernel, constants):
    """The interpreter accepts more than the compiler does."""
    triton = pytest.importorskip("triton")
    function = getattr(importlib.import_module(f"{PACKAGE}.{file}"), kernel)
    if "ACC" in function.arg_names:
        constants = constants | {"ACC": triton.language.float32}
    kinds = {name: "i32" if name.endswith(_INTEGERS) else "*fp32" for name in function.arg_names}
    assert "ptx" in _compile(function, kinds | _POINTERS, constants, 1)


def _compile(
    function: Any, kinds: dict[str, str], constants: dict[str, Any], num_warps: int, **options: int
) -> dict[str, Any]:
    """What the compiler for sm_90 makes of a kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else kinds[name] for name in function.arg_names}
    indices = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=indices)
    options |= {"num_warps": num_warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm


_CONVOLUTION = ("taps", "bias", "old", "new")
_NORM = ("residual", "norm", "total")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
@pytest.mark.parametrize(
    ("dtype", "bits", "rows", "absent"),
    [
        (torch.bfloat16, 16, 2, ()),
        (torch.float32, 16, 4, ("residual",)),
        (torch.int8, 8, 1, _CONVOLUTION),
        (torch.uint8, 4, 3, ()),
        (torch.float16, 16, 5, _NORM),
        (torch.bfloat16, 16, 32, _NORM),
        (torch.int8, 8, 64, _NORM),
        (torch.uint8, 4, 16, _NORM),
    ],
    ids=str,
)
def test_product_compiles_with_the_blocks_that_are_launched(dtype, bits, rows, absent):
    pytest.importorskip("triton")
    matvec = importlib.import_module(f"{PACKAGE}.matvec")
    blocks = matvec._blocks(matvec.Matrix(torch.empty(0, dtype=dtype), None, bits, (0, 0)), rows)
    options = {name: blocks.pop(name) for name in ("num_stages",) if name in blocks}
    constants = {"SPLITS": 1 if absent == _NORM else 2, "PARTS": 1 if absent == _CONVOLUTION else 2, "TAPS": 4}
    constants |= {"EPS": 1e-5, "BITS": bits} | dict.fromkeys(absent) | ({"scales": None} if bits == 16 else {})
    kinds = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int8: "*i8"}
    ptx = _compile_step("project", constants | blocks, kinds.get(dtype, "*u8"), **options)
    assert ("mma" in ptx) == (blocks["ROWS"] == 0)  # tensor cores


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is on")
@pytest.mark.parametrize(
    ("kernel", "constants"),
    [
        ("normalise", {"residual": None, "SPLITS": 3, "EPS": 1e-5, "BLOCK": 4096}),
        ("recur", {"SPLITS": 3, "STATE": 16, "N": 16, "RANK": 160, "R": 256, "BLOCK_D": 32}),
    ],
)
def test_kernel_of_a_step_compiles_for_a_gpu_that_is_not_here(kernel, constants):
    pytest.importorskip("triton")
    assert "mma" not in _compile_step(kernel, constants)


def _compile_step(kernel: str, constants: dict[str, Any], matrix: str = "", **options: int) -> str:
    function = getattr(importlib.import_module(f"{PACKAGE}.step_kernels"), kernel)
    kinds = {name: "i32" if name.endswith(_INTEGERS + _STRIDES) else "*fp32" for name in function.arg_names}
    return _compile(function, kinds | {"matrix": matrix}, constants, 4, **options)["ptx"]
