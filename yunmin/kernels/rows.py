"""Tensors (B, L, width) in compiled kernels: any width, any distance between rows, float32, float64 or bfloat16.

A kernel gets such a tensor as a triple: a flat array, and in it the distances between sequences and between positions;
so the slices of a wider tensor need no copy. Numbers of bfloat16 lie in arrays of uint16 and are float32 once read. The
last vector of a row may be partial: lanes beyond its `count` read as zero and are not written.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from yunmin.kernels.jit import inline
from yunmin.kernels.vector import LANES, Vector

_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType(), types.uint16: ir.IntType(16)}
_BIT, _SHORT, _INT = ir.IntType(1), ir.IntType(16), ir.IntType(32)


@inline
def read(rows: Any, b: int, t: int, channel: int, count: int) -> Any:
    """The vector at a position from a channel on, of which `count` lanes are real; zeros in the others."""
    index = b * rows[1] + t * rows[2] + channel
    return _load_all(rows[0], index) if count >= LANES else _load_first(rows[0], index, count)


@inline
def write(rows: Any, b: int, t: int, channel: int, value: Any, count: int) -> None:
    """Writes the first `count` lanes of a vector to a position from a channel on."""
    index = b * rows[1] + t * rows[2] + channel
    if count >= LANES:
        _store_all(rows[0], index, value)
    else:
        _store_first(rows[0], index, value, count)


@inline
def fetch(rows: Any, b: int, t: int, channel: int) -> None:
    """Asks the memory for what will soon be read; may point beyond the tensor."""
    _prefetch(rows[0], b * rows[1] + t * rows[2] + channel)


@inline
def copy_rows(rows: Any, b: int, begin: int, end: int, width: int, target: Any) -> None:
    """Copies whole rows of float32 or float64 next to each other into a flat array."""
    for t in range(begin, end):
        for i in range(width):
            target[(t - begin) * width + i] = rows[0][b * rows[1] + t * rows[2] + i]


def _constant(kind: Any, number: int) -> Any:
    return ir.Constant(ir.VectorType(kind, LANES), [number] * LANES)


def _is_rows(array: Any) -> bool:
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C" and array.dtype in _ELEMENTS


def _first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the lanes below `count`."""
    empty = ir.Constant(ir.VectorType(_INT, LANES), ir.Undefined)
    first = builder.insert_element(empty, builder.trunc(count, _INT), ir.Constant(_INT, 0))
    return builder.icmp_signed(
        "<",
        ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES))),
        builder.shuffle_vector(first, empty, _constant(_INT, 0)),
    )


def _pointer(context: Any, builder: Any, array: Any, value: Any, index: Any) -> Any:
    """Pointer to LANES elements of a flat array."""
    data = context.make_array(array)(context, builder, value).data
    wide = ir.VectorType(_ELEMENTS[array.dtype], LANES)
    return builder.bitcast(builder.gep(data, [index]), wide.as_pointer())


def _vector_of(array: Any) -> Any:
    return Vector(types.float32 if array.dtype == types.uint16 else array.dtype)


def _widened(builder: Any, value: Any) -> Any:
    """What was loaded, as numbers: a bfloat16 is the upper half of a float32."""
    if value.type.element != _SHORT:
        return value
    bits = builder.zext(value, ir.VectorType(_INT, LANES))
    return builder.bitcast(builder.shl(bits, _constant(_INT, 16)), ir.VectorType(ir.FloatType(), LANES))


def _narrowed(builder: Any, array: Any, value: Any) -> Any:
    """A vector as it is stored, rounded to nearest with ties to even."""
    if array.dtype != types.uint16:
        return value
    bits = builder.bitcast(value, ir.VectorType(_INT, LANES))
    odd = builder.and_(builder.lshr(bits, _constant(_INT, 16)), _constant(_INT, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(_INT, 0x7FFF)))
    # a NaN whose upper half is all ones would be rounded to zero
    rounded = builder.select(builder.fcmp_unordered("uno", value, value), _constant(_INT, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(rounded, _constant(_INT, 16)), ir.VectorType(_SHORT, LANES))


def _call_masked(builder: Any, operation: str, kind: Any, result: Any, arguments: list[Any]) -> Any:
    """Calls `llvm.masked.load` or `llvm.masked.store` for vectors of `kind`."""
    element = {ir.FloatType(): "f32", ir.DoubleType(): "f64", _SHORT: "i16"}[kind.element]
    signature = ir.FunctionType(result, [a.type for a in arguments])
    name = f"llvm.masked.{operation}.v{LANES}{element}.p0"
    return builder.call(builder.module.declare_intrinsic(name, (), signature), arguments)


@intrinsic
def _load_all(_context: Any, array: Any, index: Any) -> Any:
    if not _is_rows(array):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments)
        return _widened(builder, builder.load(pointer, align=array.dtype.bitwidth // 8))

    return _vector_of(array)(array, types.intp), codegen


@intrinsic
def _load_first(_context: Any, array: Any, index: Any, count: Any) -> Any:
    if not _is_rows(array):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        kind = pointer.type.pointee
        align = ir.Constant(_INT, array.dtype.bitwidth // 8)
        mask = _first_lanes(builder, arguments[2])
        zeros = ir.Constant(kind, None)
        return _widened(builder, _call_masked(builder, "load", kind, kind, [pointer, align, mask, zeros]))

    return _vector_of(array)(array, types.intp, types.intp), codegen


@intrinsic
def _store_all(_context: Any, array: Any, index: Any, value: Any) -> Any:
    if not _is_rows(array) or value != _vector_of(array):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        builder.store(_narrowed(builder, array, arguments[2]), pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def _store_first(_context: Any, array: Any, index: Any, value: Any, count: Any) -> Any:
    if not _is_rows(array) or value != _vector_of(array):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments[:2])
        stored = _narrowed(builder, array, arguments[2])
        align = ir.Constant(_INT, array.dtype.bitwidth // 8)
        mask = _first_lanes(builder, arguments[3])
        _call_masked(builder, "store", stored.type, ir.VoidType(), [stored, pointer, align, mask])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp), codegen


@intrinsic
def _prefetch(_context: Any, array: Any, index: Any) -> Any:
    if not _is_rows(array):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = _pointer(context, builder, array, *arguments)
        signature = ir.FunctionType(ir.VoidType(), [pointer.type, _INT, _INT, _INT])
        function = builder.module.declare_intrinsic("llvm.prefetch.p0", (), signature)
        read, all_levels, data = (ir.Constant(_INT, number) for number in (0, 3, 1))
        builder.call(function, [pointer, read, all_levels, data])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def spread(_context: Any, array: Any, index: Any) -> Any:
    """A vector with `array[index]`, index >= 0, in every lane."""
    if not _is_rows(array) or array.dtype == types.uint16:
        return None

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        number = builder.load(
            builder.gep(context.make_array(array)(context, builder, arguments[0]).data, [arguments[1]])
        )
        kind = ir.VectorType(number.type, LANES)
        empty = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(empty, number, ir.Constant(_INT, 0))
        return builder.shuffle_vector(first, empty, _constant(_INT, 0))

    return _vector_of(array)(array, types.intp), codegen


@intrinsic
def first_lanes(_context: Any, value: Any, count: Any) -> Any:
    """A vector whose lanes from `count` on are zero, whatever they were."""
    if not isinstance(value, Vector):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        return builder.select(_first_lanes(builder, arguments[1]), arguments[0], ir.Constant(kind, None))

    return value(value, types.intp), codegen
