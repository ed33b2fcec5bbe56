"""The kernels that read the weights once: a whole stack of blocks for one token, and a few rows times a matrix."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cobra.ops import dispatch, fused, reference

from .cases import assert_all_close

pytest.importorskip("numba")

from cobra.ops.backends import cpu
from cobra.ops.backends.cpu import team, threads
from cobra.ops.backends.cpu.matvec import linear
from cobra.ops.backends.cpu.step import stack_step
from cobra.ops.fused import BlockWeights
from cobra.ops.quantized import QuantizedWeight, dequantize, quantize

# Relative to the largest magnitude: float32 arithmetic. Weights in bfloat16 are exact numbers to both sides.
TOLERANCE = 1e-5
# With quantised weights the inputs become integers of 16 bits, which loses some 1e-5; three random layers, far from
# trained ones, make fifty times as much of it. A wrong number anywhere gives errors of order one.
ROUNDED_TOLERANCE = 3e-3
EPS = 1e-5

States = list[Tensor]


@pytest.fixture(autouse=True)
def several_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads even for small sizes, and no gradients."""
    monkeypatch.setattr(team, "_LEAST_COST", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


def _layers(
    num_layers: int, width: int, inner: int, state: int, rank: int, taps: int, weights: torch.dtype, small: torch.dtype
) -> list[BlockWeights]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    return [
        BlockWeights(
            norm=draw(width, dtype=small),
            in_proj=draw(2 * inner, width, scale=width**-0.5, dtype=weights),
            conv_weight=draw(inner, 1, taps, dtype=small),
            conv_bias=draw(inner, dtype=small),
            x_proj=draw(rank + 2 * state, inner, scale=inner**-0.5, dtype=weights),
            dt_proj=draw(inner, rank, scale=rank**-0.5, dtype=weights),
            dt_bias=draw(inner),
            A_log=draw(inner, state),
            D=draw(inner),
            out_proj=draw(width, inner, scale=inner**-0.5, dtype=weights),
        )
        for _ in range(num_layers)
    ]


def _inputs(layers: list[BlockWeights], batch: int, *, strided: bool = False) -> tuple[Tensor, States, States]:
    generator = torch.Generator().manual_seed(1)
    (inner, state), taps, width = layers[0].A_log.shape, layers[0].conv_weight.shape[-1], layers[0].norm.shape[0]
    conv = [torch.randn(batch, taps, inner, generator=generator)[:, 1:] for _ in layers]
    ssm = [torch.randn(batch, inner, state, generator=generator) for _ in layers]
    if strided:
        ssm = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in ssm]
        conv = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in conv]
    return torch.randn(batch, width, generator=generator), conv, ssm


def _expected(layers: list[BlockWeights], hidden: Tensor, conv: States, ssm: States) -> dict[str, Tensor]:
    """The same token in float64, from the definitions."""
    hidden, residual, new = hidden.double(), None, {}
    for i, weights in enumerate(layers):
        w = BlockWeights(
            *(dequantize(t, torch.float64) if isinstance(t, QuantizedWeight) else t.double() for t in weights)
        )
        normed, residual = reference.add_rms_norm(hidden, residual, w.norm, EPS)
        x, z = F.linear(normed, w.in_proj).chunk(2, dim=-1)
        x, new[f"conv {i}"] = reference.causal_conv1d_update(conv[i].double(), x, w.conv_weight.squeeze(1), w.conv_bias)
        rank, state = w.dt_proj.shape[1], w.A_log.shape[1]
        low, B, C = F.linear(x, w.x_proj).split([rank, state, state], dim=-1)
        y, new[f"ssm {i}"] = reference.selective_state_update(
            ssm[i].double(), x, F.linear(low, w.dt_proj), -torch.exp(w.A_log), B, C, w.D,
            z=z, delta_bias=w.dt_bias, delta_softplus=True,
        )  # fmt: skip
        hidden = F.linear(y, w.out_proj)
    assert residual is not None
    return {"hidden": hidden, "residual": residual, **new}


def _actual(layers: list[BlockWeights], hidden: Tensor, conv: States, ssm: States) -> dict[str, Tensor]:
    result = stack_step(layers, hidden, conv, ssm, EPS)
    assert result is not None
    hidden, residual, new_conv, new_ssm = result
    new = {f"conv {i}": t for i, t in enumerate(new_conv)} | {f"ssm {i}": t for i, t in enumerate(new_ssm)}
    return {"hidden": hidden, "residual": residual, **new}


def _small(
    weights: torch.dtype = torch.float32, small: torch.dtype = torch.float32, num_layers: int = 3
) -> list[BlockWeights]:
    return _layers(num_layers, 40, 80, 16, 3, 4, weights, small)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 64), (200, 129), (33, 768)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 8])
def test_linear_is_the_product(rows, shape, weight_dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, shape[1], generator=generator)
    weight = torch.randn(shape, generator=generator).to(weight_dtype)
    actual = linear(x, weight)
    assert actual is not None and actual.dtype == torch.float32
    assert_all_close({"product": actual}, {"product": F.linear(x.double(), weight.double())}, TOLERANCE)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 64), (7, 128), (300, 192), (33, 768)], ids=str)
@pytest.mark.parametrize("rows", [*range(1, 9), 17, 64])
def test_linear_is_the_product_with_integers(rows, shape, bits):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, shape[1], generator=generator) * torch.logspace(-3, 3, shape[1])  # groups of other sizes
    weight = quantize(torch.randn(shape, generator=generator), bits)
    actual = linear(x, weight)
    assert actual is not None and actual.dtype == torch.float32
    assert ((actual - _exact(x, weight)).abs() <= _rounding(x, weight)).all()


def _exact(x: Tensor, weight: QuantizedWeight) -> Tensor:
    return F.linear(x.double(), dequantize(weight, torch.float64))


def _rounding(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """What a product may be off: half a step of every input, 1 / 32767 of the largest in its group, and float32's."""
    matrix, padding = dequantize(weight, torch.float64).abs(), (0, -x.shape[1] % 64)
    steps = F.pad(x.double().abs(), padding).unflatten(1, (-1, 64)).amax(dim=2) / 32767
    return F.linear(steps, F.pad(matrix, padding).unflatten(1, (-1, 64)).sum(dim=2)) / 2 + 1e-6 * F.linear(
        x.double().abs(), matrix
    )


@pytest.mark.parametrize("width", [1, 63, 65, 200])
def test_4_bits_of_any_width_and_8_bits_of_whole_groups(width):
    generator = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(5, width, generator=generator), torch.randn(9, width, generator=generator)
    weight = quantize(matrix, 4)
    actual = linear(x, weight)
    assert actual is not None and ((actual - _exact(x, weight)).abs() <= _rounding(x, weight)).all()
    assert linear(x, quantize(matrix, 8)) is None


@pytest.mark.parametrize("bits", [8, 4])
def test_product_with_integers_of_what_is_not_ordinary(bits):
    """Zeros give zeros, tiny numbers too; a row with NaN or infinity gives no finite number, and the others do."""
    weight = quantize(torch.randn(6, 128), bits)
    x = torch.randn(4, 128)
    x[1, :64], x[2, 70], x[3, 3] = 0.0, torch.nan, torch.inf
    product = linear(x, weight)
    assert product is not None and product[:2].isfinite().all() and not product[2:].isfinite().any()
    zeros = linear(torch.full((1, 128), 1e-35), weight)
    assert zeros is not None and torch.equal(zeros, torch.zeros(1, 6))


def test_linear_refuses_quantised_weights_that_do_not_fit():
    x = torch.randn(2, 128)
    for bits in (8, 4):
        weight = quantize(torch.randn(5, 128), bits)
        assert linear(x, weight) is not None
        assert linear(x.double(), weight) is None and linear(x[:, :64], weight) is None
        assert linear(torch.randn(65, 128), weight) is None
        assert linear(x, weight._replace(bits=12 - bits)) is None
        assert linear(x, weight._replace(values=weight.values[:4])) is None
        assert linear(x, weight._replace(scales=weight.scales.double())) is None
        assert linear(x, weight._replace(values=weight.values.repeat(1, 2)[:, ::2])) is None


def test_linear_takes_strided_and_bfloat16_inputs():
    x, weight = torch.randn(6, 3).t(), torch.randn(4, 6)
    expected = {"product": F.linear(x.double(), weight.double())}
    assert_all_close({"product": linear(x, weight)}, expected, TOLERANCE)  # type: ignore[dict-item]
    half = x.bfloat16()
    expected = {"product": F.linear(half.double(), weight.double())}
    assert_all_close({"product": linear(half, weight)}, expected, TOLERANCE)  # type: ignore[dict-item]


def test_linear_refuses_what_it_does_not_take():
    x, weight = torch.randn(2, 6), torch.randn(4, 6)
    assert linear(x.double(), weight) is None
    assert linear(x.half(), weight) is None
    assert linear(x, weight.double()) is None
    assert linear(torch.randn(9, 6), weight) is None
    assert linear(torch.randn(0, 6), weight) is None
    assert linear(torch.randn(2, 1, 6), weight) is None
    assert linear(torch.randn(2, 5), weight) is None
    assert linear(x, torch.randn(6, 4).t()) is None


@pytest.mark.parametrize("batch", range(1, 9))
def test_stack_matches_definition(batch):
    layers = _small()
    inputs = _inputs(layers, batch)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), TOLERANCE)


@pytest.mark.parametrize("sizes", [(40, 80, 8, 3, 3), (96, 192, 16, 70, 4), (5, 7, 1, 1, 2), (70, 64, 5, 64, 1)])
def test_stack_matches_definition_for_odd_sizes(sizes):
    layers = _layers(2, *sizes, torch.float32, torch.float32)
    inputs = _inputs(layers, 3)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), TOLERANCE)


@pytest.mark.parametrize("small", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 5])
def test_stack_with_bfloat16_weights_computes_in_float32(batch, small):
    layers = _small(torch.bfloat16, small)
    inputs = _inputs(layers, batch)
    assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), TOLERANCE)


def _quantised(layers: list[BlockWeights], bits: int, bits_of_x_proj: int = 8) -> list[BlockWeights]:
    def convert(weight: Tensor | QuantizedWeight, bits: int) -> QuantizedWeight:
        assert isinstance(weight, Tensor)
        return quantize(weight, bits)

    return [
        layer._replace(
            in_proj=convert(layer.in_proj, bits),
            x_proj=convert(layer.x_proj, bits_of_x_proj),
            out_proj=convert(layer.out_proj, bits),
        )
        for layer in layers
    ]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 2, 5, 8, 19])
def test_stack_with_integers_matches_definition(batch, bits):
    layers = _quantised(_layers(3, 64, 128, 16, 3, 4, torch.float32, torch.float32), bits)
    inputs = _inputs(layers, batch)
    actual = _actual(layers, *inputs)
    assert_all_close(actual, _expected(layers, *inputs), ROUNDED_TOLERANCE)
    assert all(tensor.dtype == torch.float32 for tensor in actual.values())


def test_stack_with_integers_does_not_depend_on_the_other_rows():
    layers = _quantised(_layers(2, 64, 128, 16, 3, 4, torch.float32, torch.float32), 8)
    hidden, conv, ssm = _inputs(layers, 64)
    together = _actual(layers, hidden, conv, ssm)
    row = slice(21, 22)
    alone = _actual(layers, hidden[row], [t[row] for t in conv], [t[row] for t in ssm])
    assert all(torch.equal(together[name][row], alone[name]) for name in alone)
    assert stack_step(layers, *_inputs(layers, 65), EPS) is None


def test_stack_with_integers_does_not_depend_on_threads():
    layers = _quantised(_layers(4, 192, 384, 16, 10, 4, torch.float32, torch.float32), 4)
    inputs = _inputs(layers, 2)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results += [list(_actual(layers, *inputs).values()) for _ in range(5)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_stack_refuses_layers_of_several_kinds():
    plain = _layers(2, 64, 128, 16, 3, 4, torch.float32, torch.float32)
    inputs = _inputs(plain, 1)
    eight, four = _quantised(plain, 8), _quantised(plain, 4)
    assert stack_step(eight, *inputs, EPS) is not None
    for mixed in (
        [plain[0], eight[1]],
        [eight[0], four[1]],
        [layer._replace(x_proj=plain[0].x_proj) for layer in eight],
        [layer._replace(in_proj=plain[0].in_proj) for layer in eight],
    ):
        assert stack_step(mixed, *inputs, EPS) is None


def test_stack_takes_strided_and_bfloat16_states():
    layers = _small()
    hidden, conv, ssm = _inputs(layers, 2, strided=True)
    conv = [t.bfloat16() for t in conv]
    assert_all_close(_actual(layers, hidden, conv, ssm), _expected(layers, hidden, conv, ssm), TOLERANCE)


def test_stack_continues_its_own_states():
    layers = _small()
    hidden, conv, ssm = _inputs(layers, 2)
    for _ in range(3):
        expected = _expected(layers, hidden, conv, ssm)
        actual = _actual(layers, hidden, conv, ssm)
        assert_all_close(actual, expected, TOLERANCE)
        hidden = actual["hidden"]
        conv, ssm = ([actual[f"{kind} {i}"] for i in range(len(layers))] for kind in ("conv", "ssm"))


@pytest.mark.parametrize("strided", [True, False])
def test_stack_leaves_inputs_as_they_are(strided):
    layers = _small()
    hidden, conv, ssm = _inputs(layers, 2, strided=strided)
    before = [t.clone() for t in (hidden, *conv, *ssm)]
    stack_step(layers, hidden, conv, ssm, EPS)
    assert all(torch.equal(a, b) for a, b in zip(before, (hidden, *conv, *ssm), strict=True))


def test_results_do_not_depend_on_the_number_of_threads():
    layers = _layers(4, 150, 300, 16, 10, 4, torch.float32, torch.float32)
    inputs = _inputs(layers, 2)
    weight = torch.randn(50_000, 7)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for _ in range(5):
            results.append([*_actual(layers, *inputs).values(), linear(inputs[0][:, :7], weight)])
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))


def test_stack_may_run_in_several_threads_at_once():
    layers = _layers(4, 150, 300, 16, 10, 4, torch.float32, torch.float32)
    cases = [_inputs(layers, batch) for batch in (1, 2, 3)]
    expected = [_actual(layers, *case) for case in cases]

    def check(number: int) -> bool:
        with torch.no_grad():  # every thread has its own
            actual = _actual(layers, *cases[number % 3])
        return all(torch.equal(actual[name], tensor) for name, tensor in expected[number % 3].items())

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(check, range(60)))


def test_stack_does_not_wait_for_helpers_that_are_busy():
    layers = _small()
    inputs = _inputs(layers, 2)
    release, started = threading.Event(), threading.Event()
    blocker = threads._workers(1).submit(lambda: (started.set(), release.wait(60)))
    assert started.wait(60)
    try:
        assert_all_close(_actual(layers, *inputs), _expected(layers, *inputs), TOLERANCE)
        assert not blocker.done()
    finally:
        release.set()


def test_stack_does_without_threads_that_cannot_start(monkeypatch):
    class Closed:
        def submit(self, *arguments: object) -> None:
            raise RuntimeError("can't start new thread")

    layers = _small()
    inputs = _inputs(layers, 2)
    expected = _expected(layers, *inputs)
    monkeypatch.setattr(team, "_workers", lambda count: Closed())
    assert_all_close(_actual(layers, *inputs), expected, TOLERANCE)


def test_helpers_that_come_late_touch_no_tensor(monkeypatch):
    calls = []

    class Late:
        def submit(self, function, *arguments):
            calls.append((function, arguments))
            return threads.ThreadPoolExecutor(1).submit(int)

    layers = _small()
    hidden, conv, ssm = _inputs(layers, 2)
    monkeypatch.setattr(team, "_workers", lambda count: Late())
    actual = _actual(layers, hidden, conv, ssm)
    before = {name: tensor.clone() for name, tensor in actual.items()}
    ((kernel, arguments),) = calls
    table = arguments[2]
    table[:] = 8  # no address that can be read
    kernel(*arguments)
    assert all(torch.equal(actual[name], tensor) for name, tensor in before.items())


def test_stack_refuses_what_it_does_not_take():
    layers = _small()
    hidden, conv, ssm = _inputs(layers, 2)

    def refuses(layers=layers, hidden=hidden, conv=conv, ssm=ssm) -> bool:
        return stack_step(layers, hidden, conv, ssm, EPS) is None

    assert not refuses()
    assert refuses(hidden=hidden.double())
    assert refuses(hidden=hidden[:, :-1])
    assert refuses(hidden=hidden[:1])
    assert refuses(conv=conv[:-1]) and refuses(conv=[t.half() for t in conv]) and refuses(conv=[t[:, 1:] for t in conv])
    assert refuses(ssm=ssm[:-1]) and refuses(ssm=[t.double() for t in ssm]) and refuses(ssm=[t[:, 1:] for t in ssm])
    assert refuses(layers=layers[:-1]) and refuses(layers=[])
    wide = _inputs(layers, 9)
    assert refuses(hidden=wide[0], conv=wide[1], ssm=wide[2])
    for name in BlockWeights._fields:
        weight = getattr(layers[1], name)
        for other in (weight.double(), weight.half(), weight.repeat(2, *[1] * (weight.dim() - 1))[::2]):
            assert refuses(layers=[layers[0], layers[1]._replace(**{name: other}), layers[2]]), name
    assert refuses(layers=[layers[0], layers[1]._replace(in_proj=layers[1].in_proj.bfloat16()), layers[2]])


def test_only_plain_inference_is_fused(monkeypatch: pytest.MonkeyPatch):
    """Not where gradients are recorded, autocast would round, or another backend was asked for."""
    monkeypatch.setattr(cpu, "linear", lambda *_: "fused")
    x, weight = torch.zeros(1, 4), torch.zeros(3, 4)
    assert fused.linear(x, weight) == "fused"
    with torch.enable_grad():
        assert fused.linear(x, weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.linear(x, weight) is None
    with dispatch.use_backend("reference"):
        assert fused.linear(x, weight) is None
