"""Weights of 8 and 4 bits: how they lie in memory, how near they are, and the product that defines what they mean."""

import pytest
import torch
import torch.nn.functional as F

from cobra.errors import ConfigError, NumericsError, ShapeError
from cobra.ops.quantized import QuantizedWeight, dequantize, is_readable, quantize, quantized_linear


def random_weight(out: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def test_layout_of_4_bits_by_hand():
    """Byte j of a group holds column j below and column j + 32 above; a number is (nibble - 8) * scale."""
    values = torch.full((1, 64), 0x88, dtype=torch.uint8)  # two groups of zeros
    values[0, 0] = 0x0F  # columns 0 and 32: nibbles 15 and 0
    values[0, 31] = 0x91  # columns 31 and 63: nibbles 1 and 9
    values[0, 32 + 5] = 0xA7  # columns 69 and 101: nibbles 7 and 10
    weight = QuantizedWeight(values, torch.tensor([[0.5, -2.0]]), 4, (1, 128))
    expected = torch.zeros(1, 128)
    expected[0, [0, 32, 31, 63]] = torch.tensor([3.5, -4.0, -3.5, 0.5])
    expected[0, [69, 101]] = torch.tensor([2.0, -4.0])
    assert torch.equal(dequantize(weight, torch.float32), expected)


def test_layout_of_8_bits_by_hand():
    values = torch.tensor([[-127, 3], [0, 127]], dtype=torch.int8)
    weight = QuantizedWeight(values, torch.tensor([[0.5], [2.0]]), 8, (2, 2))
    assert dequantize(weight, torch.float32).tolist() == [[-63.5, 1.5], [0.0, 254.0]]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 64), (7, 65), (2, 200), (300, 1000)], ids=str)
def test_shapes_and_dtypes(shape, bits):
    weight = quantize(random_weight(*shape), bits)
    groups = -(-shape[1] // 64)
    assert weight.values.dtype == (torch.int8 if bits == 8 else torch.uint8) and weight.scales.dtype == torch.float32
    assert weight.values.shape == (shape if bits == 8 else (shape[0], 32 * groups))
    assert weight.scales.shape == (shape[0], 1 if bits == 8 else groups)
    assert (weight.bits, weight.shape) == (bits, shape) and weight.values.is_contiguous()
    assert dequantize(weight, torch.bfloat16).shape == shape


def test_8_bits_are_within_half_a_step():
    matrix = random_weight(50, 300)
    step = matrix.abs().amax(dim=1, keepdim=True) / 127
    assert ((dequantize(quantize(matrix, 8), torch.float32) - matrix).abs() <= 0.5001 * step).all()


def test_4_bits_have_less_error_than_a_plain_scale():
    """A step is at most a seventh of a group's largest number, and chosen better than that on average."""
    matrix = random_weight(50, 320)
    error = (dequantize(quantize(matrix, 4), torch.float32) - matrix).unflatten(1, (-1, 64))
    groups = matrix.unflatten(1, (-1, 64))
    step = groups.abs().amax(dim=2, keepdim=True) / 7
    plain = ((groups / step).round() * step - groups).square().sum(dim=2)
    assert (error.abs() <= 1.5 * step).all()
    assert (error.square().sum(dim=2) <= plain * 1.0001).all()
    assert error.square().sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_fit_are_kept_exactly(bits):
    """Zeros, rows of zeros and whole multiples of the scale."""
    matrix = torch.zeros(4, 130)
    matrix[0, ::2] = torch.arange(65) % 8.0
    matrix[0, 64:] *= -1
    matrix[1, 5] = -1e-3
    matrix[3] = 2.5
    restored = dequantize(quantize(matrix, bits), torch.float64)
    torch.testing.assert_close(restored, matrix.double(), rtol=1e-6 if bits == 4 else 0.02, atol=0.03 * (bits == 8))
    assert torch.equal(restored[2], torch.zeros(130, dtype=torch.float64))


@pytest.mark.parametrize("bits", [8, 4])
def test_large_matrices_are_quantised_as_their_rows(bits):
    matrix = random_weight(90, 4096)  # more than is quantised at once
    whole = quantize(matrix, bits)
    alone = quantize(matrix[77:78], bits)
    assert torch.equal(whole.values[77:78], alone.values) and torch.equal(whole.scales[77:78], alone.scales)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_product_is_that_of_the_dequantised_matrix(bits, dtype):
    weight = quantize(random_weight(20, 100), bits)
    x = random_weight(6, 100, seed=1).unflatten(0, (2, 3)).to(dtype)
    product = quantized_linear(x, weight)
    expected = F.linear(x.double(), dequantize(weight, torch.float64))
    assert product.dtype == dtype and product.shape == (2, 3, 20)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(product.double(), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_bytes():
    assert quantize(random_weight(10, 128), 8).nbytes == 10 * 128 + 10 * 4
    assert quantize(random_weight(10, 128), 4).nbytes == 10 * 64 + 10 * 2 * 4


@pytest.mark.parametrize("bits", [8, 4])
def test_kernels_may_read_only_what_fits_together(bits):
    """Anything else would have them read behind a tensor's end."""
    weight, cpu = quantize(random_weight(5, 100), bits), torch.device("cpu")
    assert is_readable(weight, cpu) and not is_readable(weight, torch.device("cuda"))
    for damaged in (
        {"values": weight.values[:4]},
        {"values": weight.values.to(torch.int16)},
        {"values": weight.values.t().contiguous().t()},
        {"scales": weight.scales[:, :0]},
        {"scales": weight.scales[:1].expand(5, -1)},
        {"scales": weight.scales.half()},
        {"bits": 12 - bits},
        {"bits": 2},
        {"shape": (5, 200)},
        {"shape": (6, 100)},
    ):
        assert not is_readable(weight._replace(**damaged), cpu), damaged


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 3e19, -3e19])
def test_weights_that_are_not_finite_are_refused(number):
    matrix = random_weight(3, 70)
    matrix[1, 65] = number
    for bits in (8, 4):
        with pytest.raises(NumericsError, match="The weight cannot be quantised: its largest number is"):
            quantize(matrix, bits)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ConfigError, match="bits=3 must be 8 or 4"):
        quantize(torch.ones(2, 2), 3)
    for weight in (torch.ones(2), torch.ones(2, 2, dtype=torch.int8), torch.ones(2, 0)):
        with pytest.raises(ShapeError, match=r"expected floating point \[out, in\]"):
            quantize(weight, 8)
