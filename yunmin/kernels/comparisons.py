"""Vectors compared with numbers: what is taken of a vector where another one lies above a bound."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from yunmin.kernels.vector import LANES, Vector, emit_splat


def _taken(comparison: str) -> Any:
    @intrinsic
    def apply(_context: Any, values: Any, bound: Any, compared: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            bounds = _bounds(context, builder, signature, arguments, 1, 2)
            lanes = builder.fcmp_ordered(comparison, arguments[2], bounds)
            return builder.select(lanes, arguments[0], ir.Constant(arguments[0].type, None))

        return values(values, bound, compared), codegen

    return apply


take_above = _taken(">")  # take_above(values, bound, compared): 0 in the lanes where `compared` is not above the bound
take_from = _taken(">=")


@intrinsic
def any_between(_context: Any, vector: Any, low: Any, high: Any) -> Any:
    """Whether any lane lies above `low` and not above `high`."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lows, highs = (_bounds(context, builder, signature, arguments, n, 0) for n in (1, 2))
        lanes = builder.and_(
            builder.fcmp_ordered(">", arguments[0], lows), builder.fcmp_ordered("<=", arguments[0], highs)
        )
        bits = builder.bitcast(lanes, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(vector, low, high), codegen


@intrinsic
def to_double(_context: Any, vector: Any) -> Any:
    """A vector of float32 as float64."""
    if vector != Vector(types.float32):
        return None
    doubles = Vector(types.float64)

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.fpext(arguments[0], context.get_value_type(doubles))

    return doubles(vector), codegen


def _bounds(context: Any, builder: Any, signature: Any, arguments: Any, bound: int, like: int) -> Any:
    """The number that is argument `bound`, in every lane of a vector like argument `like`."""
    number = context.cast(builder, arguments[bound], signature.args[bound], signature.args[like].dtype)
    return emit_splat(builder, arguments[like].type, number)
