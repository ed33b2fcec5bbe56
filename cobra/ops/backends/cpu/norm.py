"""Residual addition and RMSNorm in one pass over memory, forward and backward.

One work item is a group of `GROUP` rows: the weight's gradient is summed per group, then over groups.
"""
# Numba's intrinsics take one argument less than their definitions show.
# pyright: reportCallIssue=false

from .._operators import norm_function
from .compiled import kernel
from .layout import flat, sum_partial
from .threads import run
from .vector import LANES, load_some, store_some, total, zeros

GROUP = 32


@kernel
def _forward(start, stop, num_rows, dim, eps, x, residual, weight, normed, sums, scales):
    for row in range(start * GROUP, min(stop * GROUP, num_rows)):
        squares = zeros(x)
        for channel in range(0, dim, LANES):
            count = min(LANES, dim - channel)
            value = load_some(x, row * dim + channel, count)
            if residual.size:
                value = value + load_some(residual, row * dim + channel, count)
            store_some(sums, row * dim + channel, count, value)
            squares = squares + value * value
        scales[row] = 1.0 / (total(squares) / dim + eps) ** 0.5
        scale = scales[row]
        for channel in range(0, dim, LANES):
            count = min(LANES, dim - channel)
            value = load_some(sums, row * dim + channel, count) * scale * load_some(weight, channel, count)
            store_some(normed, row * dim + channel, count, value)


@kernel
def _backward(start, stop, num_rows, dim, sums, weight, scales, dnormed, dsums, dx, dweight):
    for group in range(start, stop):
        for channel in range(0, dim, LANES):
            store_some(dweight, group * dim + channel, min(LANES, dim - channel), zeros(sums))
        for row in range(group * GROUP, min((group + 1) * GROUP, num_rows)):
            scale = scales[row]
            products = zeros(sums)
            for channel in range(0, dim, LANES):
                count = min(LANES, dim - channel)
                unit = load_some(sums, row * dim + channel, count) * scale
                gradient = load_some(dnormed, row * dim + channel, count) * unit
                products = products + gradient * load_some(weight, channel, count)
                at = group * dim + channel
                store_some(dweight, at, count, load_some(dweight, at, count) + gradient)
            mean = total(products) / dim
            for channel in range(0, dim, LANES):
                count = min(LANES, dim - channel)
                unit = load_some(sums, row * dim + channel, count) * scale
                gradient = load_some(dnormed, row * dim + channel, count) * load_some(weight, channel, count)
                gradient = (gradient - unit * mean) * scale
                if dsums.size:
                    gradient = gradient + load_some(dsums, row * dim + channel, count)
                store_some(dx, row * dim + channel, count, gradient)


def _normalise(x, residual, weight, eps):
    num_rows, dim = x.shape
    normed, sums, scales = x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(num_rows)
    run(
        _forward, -(-num_rows // GROUP), x.numel() * 4, num_rows, dim, eps,
        *(flat(tensor, x) for tensor in (x, residual, weight, normed, sums, scales)),
    )  # fmt: skip
    return normed, sums, scales


def _normalise_backward(gradients, saved, x, residual, weight, eps):
    dnormed, dsums, _ = gradients
    sums, scales = saved
    num_rows, dim = sums.shape
    if dnormed is None:
        return [dsums.clone(), weight.new_zeros(weight.shape)]
    groups = -(-num_rows // GROUP)
    dx, dweight = sums.new_empty(sums.shape), sums.new_empty(groups, dim)
    dnormed = dnormed.contiguous()
    dsums = None if dsums is None else dsums.contiguous()
    run(
        _backward, groups, sums.numel() * 8, num_rows, dim,
        *(flat(tensor, sums) for tensor in (sums, weight, scales, dnormed, dsums, dx, dweight)),
    )  # fmt: skip
    return [dx, sum_partial(dweight, 0)]


add_rms_norm = norm_function("cpu", _normalise, _normalise_backward, upcast=True)
