"""Vectors as values of compiled kernels: `load`, `store`, arithmetic, and the functions a Mamba needs.

A vector holds LANES numbers of one type and lives in registers. LLVM splits it where the machine's are narrower, so the
same kernel runs on AVX-512, AVX2 and NEON. float64 is there for tests that settle arguments; it is not fast.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from yunmin.kernels.jit import inline

LANES = 16

_LLVM = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int32: ir.IntType(32),
    types.int64: ir.IntType(64),
}
_BITS = {types.float32: types.int32, types.float64: types.int64}
_FLAGS = ("contract", "nsz")


class Vector(types.Type):
    """The type of a vector of LANES numbers."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector({dtype}x{LANES})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir.VectorType(_LLVM[vector.dtype], LANES))


def _element(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    """Pointer to an element of a flat array."""
    struct = context.make_array(array_type)(context, builder, array)
    return builder.gep(struct.data, [index])


def _is_flat(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C" and array.dtype in _LLVM


@intrinsic
def load(_context: Any, array: Any, index: Any) -> Any:
    """The LANES numbers from `array[index]` on; the array is flat and contiguous."""
    if not _is_flat(array):
        return None
    vector = Vector(array.dtype)

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, array, *arguments)
        wide = builder.bitcast(pointer, context.get_value_type(vector).as_pointer())
        return builder.load(wide, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Writes a vector to `array[index]` and what follows."""
    if not _is_flat(array) or not isinstance(value, Vector):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _element(context, builder, array, *arguments[:2])
        wide = builder.bitcast(pointer, arguments[2].type.as_pointer())
        builder.store(arguments[2], wide, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def splat(_context: Any, like: Any, number: Any) -> Any:
    """A vector of `like`'s type (a vector or a flat array) with the same number in every lane."""
    if not isinstance(number, types.Number):
        return None
    vector = Vector(like.dtype)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        cast = context.cast(builder, arguments[1], signature.args[1], like.dtype)
        return emit_splat(builder, context.get_value_type(vector), cast)

    return vector(like, number), codegen


def emit_splat(builder: Any, vector: Any, number: Any) -> Any:
    """LLVM code for a number in every lane of a vector type."""
    empty = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


@intrinsic
def total(_context: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, by halves: always in the same order."""
    if not isinstance(vector, Vector):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        count = LANES
        while count > 1:
            count //= 2
            low, high = (
                builder.shuffle_vector(value, value, ir.Constant(ir.VectorType(ir.IntType(32), count), lanes))
                for lanes in (list(range(count)), list(range(count, 2 * count)))
            )
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return vector.dtype(vector), codegen


def _binary(operation: str) -> Any:
    @intrinsic
    def apply(_context: Any, left: Any, right: Any) -> Any:
        def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return getattr(builder, operation)(*arguments, flags=_FLAGS)

        return left(left, right), codegen

    return apply


def _define_operator(symbol: Any, operation: str) -> None:
    apply = _binary(operation)

    def of_vectors(left: Any, right: Any) -> Any:
        if isinstance(left, Vector) and left == right:
            return lambda left, right: apply(left, right)
        if isinstance(left, Vector) and isinstance(right, types.Number):
            return lambda left, right: apply(left, splat(left, right))
        if isinstance(right, Vector) and isinstance(left, types.Number):
            return lambda left, right: apply(splat(right, left), right)
        return None

    overload(symbol, strict=False)(of_vectors)


for _symbol, _operation in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, _operation)


def _limit(comparison: str) -> Any:
    @intrinsic
    def apply(_context: Any, vector: Any, bound: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            number = context.cast(builder, arguments[1], signature.args[1], vector.dtype)
            limit = emit_splat(builder, context.get_value_type(vector), number)
            # an ordered comparison is false for NaN, which therefore stays NaN
            return builder.select(builder.fcmp_ordered(comparison, arguments[0], limit), limit, arguments[0])

        return vector(vector, bound), codegen

    return apply


at_least = _limit("<")  # at_least(vector, number): NaN stays NaN
at_most = _limit(">")


@intrinsic
def magnitude(_context: Any, vector: Any) -> Any:
    """Absolute values."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        name = f"llvm.fabs.v{LANES}f{vector.dtype.bitwidth}"
        function = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [kind]))
        return builder.call(function, arguments)

    return vector(vector), codegen


@intrinsic
def larger(_context: Any, left: Any, right: Any) -> Any:
    """The larger number of each lane; where one is NaN, the right one."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return left(left, right), codegen


@intrinsic
def largest(_context: Any, vector: Any) -> Any:
    """The largest of a vector's lanes; undefined where one is NaN."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        best = builder.extract_element(arguments[0], ir.Constant(ir.IntType(32), 0))
        for lane in range(1, LANES):
            other = builder.extract_element(arguments[0], ir.Constant(ir.IntType(32), lane))
            best = builder.select(builder.fcmp_ordered(">", other, best), other, best)
        return best

    return vector.dtype(vector), codegen


@intrinsic
def to_float(_context: Any, vector: Any) -> Any:
    """A vector of int32 as float32."""
    if vector != Vector(types.int32):
        return None
    floats = Vector(types.float32)

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.sitofp(arguments[0], context.get_value_type(floats))

    return floats(vector), codegen


# added to a float32 below 2^22 in magnitude, it rounds to an integer (half to even) and leaves that integer's low byte
# in the low byte of the representation
ROUNDER = 1.5 * 2**23


@intrinsic
def store_low_bytes(_context: Any, array: Any, index: Any, shifted: Any) -> Any:
    """Writes the low byte of each lane's representation to `array[index]` and what follows; the array is of int8."""
    if shifted != Vector(types.float32):
        return None
    bytes_type = ir.VectorType(ir.IntType(8), LANES)

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.bitcast(_element(context, builder, array, *arguments[:2]), bytes_type.as_pointer())
        bits = builder.bitcast(arguments[2], context.get_value_type(Vector(types.int32)))
        builder.store(builder.trunc(bits, bytes_type), pointer, align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, shifted), codegen


@intrinsic
def _power_of_two(_context: Any, shifted: Any) -> Any:
    """The float whose exponent field is the lowest bits of `shifted`'s representation."""
    mantissa_bits = 23 if shifted.dtype == types.float32 else 52

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        bits_type = context.get_value_type(Vector(_BITS[shifted.dtype]))
        bits = builder.bitcast(arguments[0], bits_type)
        return builder.bitcast(builder.shl(bits, ir.Constant(bits_type, [mantissa_bits] * LANES)), arguments[0].type)

    return shifted(shifted), codegen


LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453

# 2^r on [-1/2, 1/2] with 2^0 = 1: minimax in relative error, 1.1e-7 with the rounding of its coefficients
_EXP2_SINGLE = (
    1.0,
    0.6931470036506653,
    0.24022242426872253,
    0.05550733581185341,
    0.009671512991189957,
    0.001326472731307149,
)
_EXP2_DOUBLE = tuple(_LN_2**k / math.factorial(k) for k in range(14))  # Taylor, 4e-18
# adding it rounds to an integer, and leaves that integer plus the exponent's bias in the lowest bits
_SHIFT_SINGLE = 1.5 * 2**23 + 127
_SHIFT_DOUBLE = 1.5 * 2**52 + 1023


def exp2(x: Any) -> Any:
    """2^x of each lane: 0 far below and for subnormal results, infinite far above, NaN where x is."""
    raise TypeError("exp2 is for compiled kernels")


@overload(exp2, strict=False)
def _exp2(x: Any) -> Any:
    if x == Vector(types.float32):

        def single(x: Any) -> Any:
            x = at_most(at_least(x, -127.0), 128.0)
            shifted = x + _SHIFT_SINGLE
            r = x - (shifted - _SHIFT_SINGLE)  # in [-1/2, 1/2]
            p = splat(r, _EXP2_SINGLE[5])
            for k in range(4, -1, -1):
                p = _EXP2_SINGLE[k] + r * p
            return p * _power_of_two(shifted)

        return single
    if x == Vector(types.float64):

        def double(x: Any) -> Any:
            x = at_most(at_least(x, -1023.0), 1024.0)
            shifted = x + _SHIFT_DOUBLE
            r = x - (shifted - _SHIFT_DOUBLE)
            p = splat(r, _EXP2_DOUBLE[13])
            for k in range(12, -1, -1):
                p = _EXP2_DOUBLE[k] + r * p
            return p * _power_of_two(shifted)

        return double
    return None


@inline
def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp2(x * -LOG2_E))


@inline
def silu(x: Any) -> Any:
    """Returns x * sigmoid(x)."""
    return x / (1.0 + exp2(x * -LOG2_E))


def _log1p_of_unit(y: Any) -> Any:
    """log(1 + y) for y in [0, 1]: the series of 2 artanh(y / (2 + y))."""
    raise TypeError("_log1p_of_unit is for compiled kernels")


@overload(_log1p_of_unit, strict=False)
def _log1p_series(y: Any) -> Any:
    terms = 7 if y.dtype == types.float32 else 17  # error 5e-9, 1e-17 relative

    def series(y: Any) -> Any:
        s = y / (2.0 + y)  # at most 1/3
        q = s * s
        p = splat(s, 2.0 / (2 * terms - 1))
        for k in range(terms - 1, 0, -1):
            p = 2.0 / (2 * k - 1) + q * p
        return s * p

    return series


@inline
def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    return at_least(x, 0.0) + _log1p_of_unit(exp2(magnitude(x) * -LOG2_E))
