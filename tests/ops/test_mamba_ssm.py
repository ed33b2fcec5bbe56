"""The identities around the official kernels, on stand-ins for these; on a GPU the other tests run the real ones."""

import subprocess
import sys

import pytest
import torch

import cobra.ops
from cobra.errors import BackendError
from cobra.ops import dispatch, reference
from cobra.ops.backends import mamba_ssm

from . import official
from .cases import assert_all_close, conv_arguments, run_with_gradients, scan_arguments

CPU = torch.device("cpu")

# Relative to the largest magnitude of each tensor: see the tests of the scan. What an initial state adds to outputs in
# bfloat16 comes after the kernel's rounding and is rounded with them once more.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

ALONG_TIME = ("u", "delta", "B", "C", "z")


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    official.install(monkeypatch)


def _assert_scan_is_right(arguments, dtype=torch.float32, **options) -> None:
    before = {name: t.clone() for name, t in arguments.items()}
    actual = run_with_gradients(mamba_ssm.selective_scan, arguments, CPU, **options)
    expected = run_with_gradients(reference.selective_scan, arguments, CPU, upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])
    assert all(torch.equal(t, before[name]) for name, t in arguments.items())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("initial", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("lengths", [[9, 4, 0], None], ids=str)
@pytest.mark.parametrize("optional", [True, False], ids=["all arguments", "only required"])
def test_scan_matches_definition(dtype, initial, lengths, optional):
    arguments = scan_arguments(3, 9, 5, 4, dtype=dtype, optional=optional, initial=initial)
    if not optional:
        arguments["delta"] = arguments["delta"].abs() * 0.5
    lengths = None if lengths is None else torch.tensor(lengths)
    _assert_scan_is_right(arguments, dtype, delta_softplus=optional, lengths=lengths)


def test_bias_without_softplus_is_not_rounded():
    arguments = scan_arguments(2, 9, 5, 4, dtype=torch.bfloat16)
    arguments["delta"], arguments["delta_bias"] = arguments["delta"].abs() * 0.5, torch.full((5,), 0.1234567)
    _assert_scan_is_right(arguments, torch.bfloat16, lengths=torch.tensor([9, 4]))


def test_parameters_and_inputs_may_have_any_dtype():
    arguments = scan_arguments(2, 7, 5, 4)
    for name, dtype in (("A", torch.float64), ("z", torch.bfloat16), ("D", torch.float16), ("B", torch.float64)):
        arguments[name] = arguments[name].to(dtype)
    _assert_scan_is_right(arguments, torch.bfloat16, delta_softplus=True)


@pytest.mark.parametrize("piece", [1, 3 * 2 * 5 * 4])
def test_long_scan_from_a_state_comes_in_pieces(monkeypatch, piece):
    monkeypatch.setattr(mamba_ssm, "_PIECE", piece)
    _assert_scan_is_right(scan_arguments(2, 10, 5, 4), delta_softplus=True, lengths=torch.tensor([10, 7]))


def test_chunks_of_the_kernel_end_where_it_says(monkeypatch):
    monkeypatch.setattr(official, "CHUNK", 4)
    _assert_scan_is_right(scan_arguments(2, 8, 5, 3), delta_softplus=True)


@pytest.mark.parametrize("gated", [True, False])
def test_gradients_through_the_final_state_alone(gated):
    arguments = scan_arguments(2, 6, 5, 4, optional=gated, initial=False)
    gradients = []
    for function in (mamba_ssm.selective_scan, reference.selective_scan):
        leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}
        function(**leaves, delta_softplus=True)[1].square().sum().backward()
        gradients.append({n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in leaves.items()})
    assert_all_close(*gradients, TOLERANCE[torch.float32])


def test_steps_are_appended_only_for_a_gradient_of_the_final_state(monkeypatch):
    lengths = []
    kernels = sys.modules["selective_scan_cuda"]
    monkeypatch.setattr(
        kernels, "fwd", lambda *given: (lengths.append(given[0].shape[2]), official.scan_fwd(*given))[1]
    )
    leaves = {name: t.requires_grad_() for name, t in scan_arguments(2, 6, 5, 4, initial=False).items()}
    y, final_state = mamba_ssm.selective_scan(**leaves, delta_softplus=True)
    y.sum().backward(retain_graph=True)
    assert lengths == [6]
    final_state.sum().backward()
    assert lengths == [6, 6 + 4]


def test_padding_of_any_content_reaches_nothing():
    clean = scan_arguments(3, 9, 5, 4)
    junk = {name: t.clone() for name, t in clean.items()}
    for name in ALONG_TIME:
        junk[name][1, 4:], junk[name][2] = torch.nan, torch.inf
    options = {"delta_softplus": True, "lengths": torch.tensor([9, 4, 0])}
    clean, junk = (run_with_gradients(mamba_ssm.selective_scan, given, CPU, **options) for given in (clean, junk))
    assert (clean["first output"][1, 4:] == 0).all() and (clean["first output"][2] == 0).all()
    for name, value in clean.items():
        assert torch.equal(value, junk[name]), name


def test_rows_without_steps_keep_their_state_bit_for_bit():
    arguments = scan_arguments(2, 9, 5, 4)
    _, final_state = mamba_ssm.selective_scan(**arguments, delta_softplus=True, lengths=torch.tensor([9, 0]))
    assert torch.equal(final_state[1], arguments["initial_state"][1])


def test_strided_views_are_taken():
    joined = torch.randn(2, 6, 19, generator=torch.Generator().manual_seed(0))
    u, delta, B, C = joined.split([5, 5, 4, 5], -1)
    C = C[..., 1:]
    views = {"u": u, "delta": delta, "B": B, "C": C, "A": scan_arguments(1, 1, 4, 5)["A"].t().neg().exp().neg()}
    copies = {name: t.contiguous() for name, t in views.items()}
    outputs = [mamba_ssm.selective_scan(**given, delta_softplus=True) for given in (views, copies)]
    assert all(torch.equal(view, copy) for view, copy in zip(*outputs, strict=True))


CONV_SHAPES = [(2, 9, 8, 4), (2, 9, 5, 4), (2, 1, 8, 4), (2, 1, 5, 2), (2, 2, 16, 3), (2, 1, 5, 1), (1, 5, 8, 1)]


@pytest.mark.parametrize("shape", CONV_SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [True, False], ids=["lengths", "whole rows"])
@pytest.mark.parametrize("initial", [True, False], ids=["state", "no state"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_conv_matches_definition(shape, lengths, initial, dtype):
    arguments = conv_arguments(*shape, dtype=dtype, bias=initial, initial=initial)
    options = {"lengths": torch.arange(shape[0]) * shape[1] // 2 if lengths else None}
    actual = run_with_gradients(mamba_ssm.causal_conv1d, arguments, CPU, **options)
    expected = run_with_gradients(reference.causal_conv1d, arguments, CPU, upcast=True, **options)
    assert_all_close(actual, expected, TOLERANCE[dtype])


def test_conv_ignores_whatever_stands_in_the_padding():
    clean = conv_arguments(3, 9, 8, 4)
    junk = clean | {"x": clean["x"].clone()}
    junk["x"][1, 4:], junk["x"][2] = torch.nan, torch.inf
    options = {"lengths": torch.tensor([9, 4, 0])}
    clean, junk = (run_with_gradients(mamba_ssm.causal_conv1d, given, CPU, **options) for given in (clean, junk))
    for name, value in clean.items():
        assert torch.equal(value, junk[name]), name


@pytest.mark.parametrize("columns", [slice(8, 16), slice(3, 11), slice(0, 16, 2)], ids=str)
def test_conv_copies_only_what_the_kernel_cannot_read(monkeypatch, columns):
    given = []
    kernels, forward = sys.modules["causal_conv1d.cpp_functions"], official.causal_conv1d_fwd_function
    monkeypatch.setattr(
        kernels, "causal_conv1d_fwd_function", lambda x, *rest: (given.append(x.data_ptr()), forward(x, *rest))[1]
    )
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))[..., columns]
    weight = conv_arguments(1, 1, 8, 4)["weight"]
    y, _ = mamba_ssm.causal_conv1d(x, weight)
    torch.testing.assert_close(y, reference.causal_conv1d(x, weight)[0])
    assert (given == [x.data_ptr()]) == (columns == slice(8, 16))


@pytest.mark.parametrize("function", ["selective_scan", "causal_conv1d"])
def test_compiled_caller_gets_the_same_numbers(function):
    is_scan = function == "selective_scan"
    arguments = scan_arguments(2, 6, 5, 4) if is_scan else conv_arguments(2, 6, 8, 4)
    options = {"delta_softplus": True} if is_scan else {}

    def call(**tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, state = getattr(mamba_ssm, function)(**tensors, **options, lengths=torch.tensor([6, 2]))
        return 2 * y, state

    expected = run_with_gradients(call, arguments, CPU)
    actual = run_with_gradients(torch.compile(call, backend="aot_eager", fullgraph=True), arguments, CPU)
    assert_all_close(actual, expected, TOLERANCE[torch.float32])


def test_operator_is_registered_as_it_behaves():
    tensors = scan_arguments(2, 6, 5, 4)
    tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in ALONG_TIME}
    required = [tensors[name] for name in ("u", "delta", "A", "B", "C")]
    for optional in ([tensors[name] for name in ("D", "z", "delta_bias")], [None] * 3):
        given = (*required, *optional, True)
        torch.library.opcheck(mamba_ssm._scan, given, test_utils=("test_schema", "test_faketensor"))


def test_available_says_what_is_missing(monkeypatch):
    everything = {"mamba_ssm", "causal_conv1d", "selective_scan_cuda", "causal_conv1d_cuda"}
    installed = set(everything)
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert mamba_ssm.available() is None
    for name in sorted(everything):
        installed = everything - {name}
        assert mamba_ssm.available().startswith(f"{name} not {'built' if name.endswith('_cuda') else 'installed'}; ")
        assert "--no-build-isolation" in mamba_ssm.available()
    installed = everything
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in mamba_ssm.available()


def test_supports_what_the_kernels_take():
    cuda = torch.device("cuda")
    for dtype in TOLERANCE:
        assert mamba_ssm.supports(cuda, dtype) is None
    assert "float32" in mamba_ssm.supports(cuda, torch.float64)
    assert "CUDA" in mamba_ssm.supports(CPU, torch.float32)


def _rest(**changes) -> dict:
    rest = dict.fromkeys(("z", "D", "delta_bias", "lengths", "resets", "initial_state"))
    return rest | {name: torch.empty(2, 10, 5, device="meta") for name in ("delta", "B", "C")} | changes


def test_declines_what_it_cannot_do_or_others_do_better():
    A, state = torch.empty(5, 16, device="meta"), torch.empty(2, 5, 16, device="meta")
    declines, resets = mamba_ssm.declines, torch.zeros(2, 10, dtype=torch.bool)
    long = torch.empty(2, mamba_ssm._PIECE // (2 * 5 * 16) + 1, 5, device="meta")
    assert declines("selective_scan", **_rest(A=A)) is None
    assert declines("selective_scan", **_rest(A=A, delta=long)) is None
    assert declines("selective_scan", **_rest(A=A, initial_state=state)) is None
    assert "from a state" in declines("selective_scan", **_rest(A=A, initial_state=state, delta=long))
    assert "inside a row" in declines("selective_scan", **_rest(A=A, resets=resets))
    assert "at most 256" in declines("selective_scan", **_rest(A=torch.empty(5, 300, device="meta")))
    assert declines("causal_conv1d", weight=torch.empty(8, 4), resets=None) is None
    assert "inside a row" in declines("causal_conv1d", weight=torch.empty(8, 4), resets=resets)
    assert "at most 4" in declines("causal_conv1d", weight=torch.empty(8, 5), resets=None)


def test_what_it_cannot_do_is_refused_by_name():
    resets = torch.zeros(2, 6, dtype=torch.bool)
    with pytest.raises(BackendError, match=r"'mamba_ssm' cannot run this selective_scan: .*use 'triton'"):
        mamba_ssm.selective_scan(**scan_arguments(2, 6, 5, 4), resets=resets)
    with pytest.raises(BackendError, match=r"cannot run this causal_conv1d: .*use 'triton'"):
        mamba_ssm.causal_conv1d(**conv_arguments(2, 6, 8, 4), resets=resets)
    with pytest.raises(BackendError, match="at most 4, not 5"):
        mamba_ssm.causal_conv1d(**conv_arguments(2, 6, 8, 5))


def test_dispatcher_asks_it_first_and_honours_what_it_declines(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "available", lambda: None)
    monkeypatch.setattr(mamba_ssm, "supports", lambda device, dtype: None)
    names = []
    monkeypatch.setattr(mamba_ssm, "_scan", lambda *given: names.append("official") or _scan(*given))
    arguments = scan_arguments(2, 6, 5, 4)
    cobra.ops.selective_scan(**arguments, delta_softplus=True)
    assert names == ["official"]
    monkeypatch.setattr(mamba_ssm, "_PIECE", 1)
    cobra.ops.selective_scan(**arguments, delta_softplus=True)
    assert names == ["official"]
    with cobra.ops.use_backend("mamba_ssm"):
        cobra.ops.selective_scan(**arguments, delta_softplus=True)
    assert names == ["official"] * 2


_scan = mamba_ssm._scan


def test_it_comes_before_triton_and_says_what_to_install(monkeypatch):
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None)
    names = list(dispatch.discover())
    assert names.index("mamba_ssm") < names.index("triton")
    with pytest.raises(BackendError, match=r"'mamba_ssm' cannot run here: .*pip install mamba-ssm causal-conv1d"):
        cobra.ops.set_backend("mamba_ssm")


def test_import_does_not_import_the_packages():
    code = "import sys, cobra.ops.backends.mamba_ssm as m; m.available(); "
    code += "sys.exit(any(name.startswith(('mamba_ssm', 'causal_conv1d', 'selective_scan')) for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_single_steps_and_norms_come_from_the_next_backend():
    """The official single steps write into the state that they are given."""
    for function in ("selective_state_update", "causal_conv1d_update", "add_rms_norm"):
        assert not hasattr(mamba_ssm, function)
