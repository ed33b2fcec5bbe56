"""Explicit SIMD vectors for Numba: a value type of `LANES` channels that LLVM maps to the widest registers there are.

Left to itself the compiler does not vectorise `exp`, and it cannot keep the recurrence's state in registers because
it cannot prove that the work arrays do not overlap. Kernels written with these vectors need neither.

`v + w`, `v - w`, `v * w`, `v / w` work on vectors and on a vector and a scalar. Floating point contraction (fused
multiply-add) is allowed, reordering is not: the same machine always gives the same bits.
"""
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportReturnType=false
# (intrinsics take one argument less than their definitions show, and llvmlite's types are partial)

import operator
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model


def _has_avx512() -> bool:
    try:
        return bool(get_host_cpu_features().get("avx512f"))
    except RuntimeError:  # LLVM cannot tell on this machine
        return False


# Channels per vector, several registers' worth: independent work that hides the latency of the recurrence. Measured.
LANES = 64 if _has_avx512() else 32

LOG2_E = 1.4426950408889634

_FUSE = ("contract",)
_INT32 = ir.IntType(32)
_BYTE = ir.IntType(8)
# 2^x on [-1/2, 1/2]: least maximal relative error (1e-7, of the order of one rounding) with the constant fixed to 1,
# so that a step of size zero leaves the state exactly as it is. Own fit.
_EXP2_FLOAT32 = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
_EXP2_FLOAT64 = tuple(np.cumprod([1.0] + [np.log(2.0) / k for k in range(1, 15)]).tolist())  # Taylor, below 1e-17
# atanh(s) / s in s^2 on [0, 1/9]: own fit (4e-9), and the series for double precision
_ATANH_FLOAT32 = (1.0, 0.3333315849304199, 0.20012454688549042, 0.13980300724506378, 0.1408916711807251)
_ATANH_FLOAT64 = tuple(1.0 / (2 * k + 1) for k in range(18))


class Vector(types.Type):
    """`LANES` numbers of one floating point type, or as many as are said."""

    def __init__(self, dtype: types.Float, lanes: int = LANES) -> None:
        self.dtype, self.lanes = dtype, lanes
        super().__init__(name=f"Vector({dtype}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_scalar(fe_type), fe_type.lanes))


def _scalar(vector: Vector) -> ir.Type:
    return ir.FloatType() if vector.dtype == types.float32 else ir.DoubleType()


def _splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector_type = ir.VectorType(value.type, LANES)
    single = builder.insert_element(ir.Constant(vector_type, ir.Undefined), value, _INT32(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(_INT32, LANES), [0] * LANES))


def _constant(like: ir.Value, value: float) -> ir.Constant:
    return ir.Constant(like.type, [value] * LANES)


def _horner(builder: ir.IRBuilder, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
    result = _constant(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = builder.fadd(builder.fmul(result, x, flags=_FUSE), _constant(x, coefficient), flags=_FUSE)
    return result


def _define_operator(python_operator: Any, instruction: str) -> None:
    @intrinsic
    def lanewise(typing_context, left, right):
        vector = left if isinstance(left, Vector) else right

        def generate(context, builder, signature, arguments):
            operands = [
                value if isinstance(kind, Vector) else _splat(builder, context.cast(builder, value, kind, vector.dtype))
                for value, kind in zip(arguments, signature.args, strict=True)
            ]
            return getattr(builder, instruction)(*operands, flags=_FUSE)

        return vector(left, right), generate

    @overload(python_operator)
    def implement(left, right):
        if isinstance(left, Vector) or isinstance(right, Vector):
            return lambda left, right: lanewise(left, right)
        return None


for _operator, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_operator, _instruction)


def _pointer(context, builder, array_type, array, offset, lanes: int) -> ir.Value:
    is_pointer = isinstance(array_type, types.CPointer)
    data = array if is_pointer else context.make_array(array_type)(context, builder, array).data
    address = builder.gep(data, [offset])
    element = context.get_data_type(array_type.dtype)
    return builder.bitcast(address, ir.VectorType(element, lanes).as_pointer())


@intrinsic
def pointer(typing_context, address, like):
    """What `load`, `store` and indexing take as well as an array: an address, and the type of numbers in `like`.

    Unlike arrays, which are counted in an atomic counter whenever a function takes one, pointers cost nothing.
    """

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), generate


@intrinsic
def load(typing_context, array, offset):
    """`array[offset : offset + LANES]` of a contiguous one-dimensional array; not checked against its length."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments, LANES)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), generate


@intrinsic
def prefetch(typing_context, array, offset):
    """Have `array[offset : offset + LANES]` brought into the cache, if there is such memory."""

    def generate(context, builder, signature, arguments):
        first = builder.bitcast(_pointer(context, builder, signature.args[0], *arguments, 1), _BYTE.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [_BYTE.as_pointer(), _INT32, _INT32, _INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for line in range(0, LANES * array.dtype.bitwidth // 8, 64):  # to read, to keep, data
            builder.call(function, [builder.gep(first, [_INT32(line)]), _INT32(0), _INT32(3), _INT32(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def load_wide(typing_context, array, offset):
    """`load` as float32, of an array of float32 or of bfloat16 numbers held as uint16."""

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments, LANES)
        return _widen(builder, builder.load(pointer, align=array.dtype.bitwidth // 8))

    return Vector(types.float32)(array, types.intp), generate


@intrinsic
def widen(typing_context, number):
    """One float32, or one bfloat16 held as uint16, as float32."""

    def generate(context, builder, signature, arguments):
        return _widen(builder, arguments[0])

    return types.float32(number), generate


def _widen(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A bfloat16 is the upper half of a float32."""
    single, wide, shift = ir.FloatType(), _INT32, 16
    is_vector = isinstance(value.type, ir.VectorType)
    if (value.type.element if is_vector else value.type) == single:
        return value
    if is_vector:
        single, wide, shift = ir.VectorType(single, LANES), ir.VectorType(wide, LANES), [shift] * LANES
    return builder.bitcast(builder.shl(builder.zext(value, wide), ir.Constant(wide, shift)), single)


@intrinsic
def store(typing_context, array, offset, vector):
    """Write a vector to `array[offset : offset + LANES]`; not checked against the array's length."""

    def generate(context, builder, signature, arguments):
        array_value, offset_value, value = arguments
        pointer = _pointer(context, builder, signature.args[0], array_value, offset_value, LANES)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


@intrinsic
def total(typing_context, vector):
    """The sum over all lanes, always in the same order."""

    def generate(context, builder, signature, arguments):
        (value,) = arguments
        lanes = vector.lanes
        while lanes > 1:
            lanes //= 2
            low = ir.Constant(ir.VectorType(_INT32, lanes), list(range(lanes)))
            high = ir.Constant(ir.VectorType(_INT32, lanes), list(range(lanes, 2 * lanes)))
            value = builder.fadd(builder.shuffle_vector(value, value, low), builder.shuffle_vector(value, value, high))
        return builder.extract_element(value, _INT32(0))

    return vector.dtype(vector), generate


@intrinsic
def exp2(typing_context, vector):
    """2^x in every lane, to about one unit in the last place; NaN stays NaN, too large gives inf, too small zero."""
    single = vector.dtype == types.float32
    mantissa, bias = (23, 127) if single else (52, 1023)
    integer = ir.VectorType(ir.IntType(vector.dtype.bitwidth), LANES)
    coefficients = _EXP2_FLOAT32 if single else _EXP2_FLOAT64

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        for comparison, bound in (("<", -bias), (">", bias + 1)):  # written so that NaN passes
            limit = _constant(x, bound)
            x = builder.select(builder.fcmp_ordered(comparison, x, limit), limit, x)
        # Adding 1.5 * 2^mantissa rounds to an integer k and leaves k + bias in the low bits: shifted into the
        # exponent field these bits are the number 2^k.
        magic = _constant(x, 1.5 * 2.0**mantissa + bias)
        shifted = builder.fadd(x, magic)
        fraction = builder.fsub(x, builder.fsub(shifted, magic))
        bits = builder.shl(builder.bitcast(shifted, integer), ir.Constant(integer, [mantissa] * LANES))
        return builder.fmul(_horner(builder, fraction, coefficients), builder.bitcast(bits, x.type), flags=_FUSE)

    return vector(vector), generate


@intrinsic
def _log1p_of_unit(typing_context, vector):
    """log(1 + x) for x in [0, 1], accurate also near zero: 2 atanh(x / (2 + x))."""
    coefficients = _ATANH_FLOAT32 if vector.dtype == types.float32 else _ATANH_FLOAT64

    def generate(context, builder, signature, arguments):
        (x,) = arguments
        s = builder.fdiv(x, builder.fadd(x, _constant(x, 2.0)))
        series = _horner(builder, builder.fmul(s, s), coefficients)
        return builder.fmul(builder.fadd(s, s), series)

    return vector(vector), generate


@intrinsic
def _maximum_zero(typing_context, vector):
    def generate(context, builder, signature, arguments):
        (x,) = arguments
        zero = _constant(x, 0.0)
        return builder.select(builder.fcmp_ordered("<", x, zero), zero, x)

    return vector(vector), generate


@njit(forceinline=True)
def softplus(x):
    """log(1 + e^x)."""
    positive = _maximum_zero(x)
    return positive + _log1p_of_unit(exp2((x - positive - positive) * LOG2_E))


@njit(forceinline=True)
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (exp2(x * -LOG2_E) + 1.0)


@intrinsic
def zeros(typing_context, array):
    """A vector of zeros of the array's type."""
    vector = Vector(array.dtype)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(vector), [0.0] * LANES)

    return vector(array), generate


@intrinsic
def zeros_wide(typing_context):
    """A float32 vector of zeros."""
    vector = Vector(types.float32)

    def generate(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(vector), [0.0] * LANES)

    return vector(), generate


@njit(forceinline=True)
def load_some(array, offset, count):
    """`load` of the first `count` lanes, zeros in the others."""
    if count == LANES:
        return load(array, offset)
    vector = zeros(array)
    for lane in range(count):
        vector = _insert(vector, lane, array[offset + lane])
    return vector


@intrinsic
def _keep_last(typing_context, vector, count):
    def generate(context, builder, signature, arguments):
        value, kept = arguments
        integer = ir.VectorType(_INT32, LANES)
        first = _splat(builder, builder.sub(_INT32(LANES), builder.trunc(kept, _INT32)))
        within = builder.icmp_signed(">=", ir.Constant(integer, list(range(LANES))), first)
        return builder.select(within, value, _constant(value, 0.0))

    return vector(vector, types.intp), generate


@njit(forceinline=True)
def load_wide_last(array, end, count):
    """The `count` numbers before `end` in the last lanes, zeros in the others; reads what stands before them."""
    if end >= LANES:
        return _keep_last(load_wide(array, end - LANES), count)
    vector = zeros_wide()
    for k in range(count):
        vector = _insert(vector, LANES - count + k, widen(array[end - count + k]))
    return vector


@njit(forceinline=True)
def store_some(array, offset, count, vector):
    """`store` of the first `count` lanes only."""
    if count == LANES:
        store(array, offset, vector)
    else:
        for lane in range(count):
            array[offset + lane] = _extract(vector, lane)


@njit(forceinline=True)
def work_array(count, like):
    """Uninitialised numbers of the type of `like`, aligned to cache lines (numpy promises less)."""
    array = np.empty(count + 16, like.dtype)
    return array[(-array.ctypes.data % 64) // array.itemsize :]


@intrinsic
def _insert(typing_context, vector, lane, scalar):
    def generate(context, builder, signature, arguments):
        value, position, element = arguments
        return builder.insert_element(value, element, builder.trunc(position, _INT32))

    return vector(vector, types.intp, vector.dtype), generate


@intrinsic
def _extract(typing_context, vector, lane):
    def generate(context, builder, signature, arguments):
        value, position = arguments
        return builder.extract_element(value, builder.trunc(position, _INT32))

    return vector.dtype(vector, types.intp), generate
