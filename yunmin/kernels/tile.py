"""Tiles of a matrix product, kept in registers: a few rows of x times a few blocks of 16 rows of a weight.

Weights are packed so that one vector holds the same inputs of 16 outputs (`yunmin.quantization` has the formats). An
output is summed over its inputs in one fixed order, whichever tile it falls into, so that a row's result does not
depend on its neighbours: not one bit of it. Addresses are integers; nothing here checks them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from yunmin.kernels.dot import BYTE, BYTES, INT, INTS, LANES, LONG, call_intrinsic, emit_dot, splat_int, target_features

GROUP = 32  # inputs that share a scale in int4
_PREFETCHING_ROWS = 4  # fewer wait for memory anyway
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_HALVES = ir.VectorType(ir.HalfType(), LANES)


@intrinsic(prefer_literal=True)
def multiply_int8(
    _context: Any,
    rows: Any,
    blocks: Any,
    x: Any,
    x_stride: Any,
    start: Any,
    weights: Any,
    block_stride: Any,
    steps: Any,
    sums: Any,
) -> Any:
    """Exact sums of unsigned weights and signed activations.

    Args:
        rows, blocks: of the tile, literal.
        x: address of int8 (rows, 4 steps).
        x_stride: bytes between rows of x.
        start: address of int32 (rows,), what each row's sums begin with.
        weights: address of uint8 (blocks, steps, 16, 4).
        block_stride: bytes between blocks.
        steps: groups of four inputs, at least 1.
        sums: address of int32 (rows, blocks, 16), written.
    """
    if not _are_literal(rows, blocks):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, _, x, x_stride, start, weights, block_stride, steps, sums = arguments
        features = target_features()
        x_rows = _addresses(builder, x, x_stride, rows.literal_value)
        w_blocks = _addresses(builder, weights, block_stride, blocks.literal_value)
        initial = [
            splat_int(builder, _load(builder, address, INT))
            for address in _addresses(builder, start, _long(4), rows.literal_value)
            for _ in w_blocks
        ]

        def body(step: Any, carried: list[Any]) -> list[Any]:
            offset = builder.mul(step, _long(4 * LANES))
            loaded = [_load(builder, builder.add(block, offset), BYTES) for block in w_blocks]
            if rows.literal_value >= _PREFETCHING_ROWS:
                following = builder.add(offset, builder.mul(block_stride, _long(blocks.literal_value)))
                _prefetch(builder, [builder.add(block, following) for block in w_blocks])
            quads = [_load(builder, builder.add(row, builder.mul(step, _long(4))), INT) for row in x_rows]
            pairs = [(quad, w) for quad in quads for w in loaded]
            return [emit_dot(builder, s, w, quad, features) for s, (quad, w) in zip(carried, pairs, strict=True)]

        _store_all(builder, sums, _loop(builder, steps, initial, body))

    return _signature(rows, blocks, 7), _returning_nothing(codegen)


@intrinsic(prefer_literal=True)
def multiply_int4(
    _context: Any,
    rows: Any,
    blocks: Any,
    x: Any,
    x_stride: Any,
    start: Any,
    start_stride: Any,
    weights: Any,
    block_stride: Any,
    scales: Any,
    scale_stride: Any,
    groups: Any,
    sums: Any,
) -> Any:
    """Sums over groups of 32 inputs, each exact and then multiplied by its scale.

    Args:
        rows, blocks: of the tile, literal.
        x: address of int8 (rows, 32 groups).
        x_stride: bytes between rows of x.
        start: address of int32 (rows, groups), what each group's sum begins with.
        start_stride: bytes between rows of start.
        weights: address of uint8 (blocks, groups, 4, 16, 4), two weights a byte.
        block_stride: bytes between blocks.
        scales: address of float16 (blocks, groups, 16).
        scale_stride: bytes between blocks of scales.
        groups: at least 1.
        sums: address of float32 (rows, blocks, 16), written.
    """
    if not _are_literal(rows, blocks):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, _, x, x_stride, start, start_stride, weights, block_stride, scales, scale_stride, groups, sums = arguments
        features = target_features()
        x_rows = _addresses(builder, x, x_stride, rows.literal_value)
        starts = _addresses(builder, start, start_stride, rows.literal_value)
        w_blocks = _addresses(builder, weights, block_stride, blocks.literal_value)
        scale_blocks = _addresses(builder, scales, scale_stride, blocks.literal_value)

        def body(group: Any, carried: list[Any]) -> list[Any]:
            x_offset = builder.mul(group, _long(GROUP))
            w_offset = builder.mul(group, _long(GROUP // 2 * LANES))
            begins = [
                splat_int(builder, _load(builder, builder.add(row, builder.mul(group, _long(4))), INT))
                for row in starts
            ]
            exact = [begin for begin in begins for _ in w_blocks]
            for part in range(4):  # 8 inputs: four in the low halves of the bytes, four in the high ones
                at = builder.add(w_offset, _long(4 * LANES * part))
                halves = [_nibbles(builder, _load(builder, builder.add(block, at), BYTES)) for block in w_blocks]
                for which in (0, 1):
                    at = builder.add(x_offset, _long(8 * part + 4 * which))
                    quads = [_load(builder, builder.add(row, at), INT) for row in x_rows]
                    pairs = [(quad, w[which]) for quad in quads for w in halves]
                    exact = [emit_dot(builder, s, w, quad, features) for s, (quad, w) in zip(exact, pairs, strict=True)]
            s_offset = builder.mul(group, _long(2 * LANES))
            factors = [_from_halves(builder, builder.add(block, s_offset), features) for block in scale_blocks]
            per_sum = [factor for _ in x_rows for factor in factors]
            return [
                _fma(builder, builder.sitofp(s, _FLOATS), factor, total)
                for s, factor, total in zip(exact, per_sum, carried, strict=True)
            ]

        initial = [ir.Constant(_FLOATS, None)] * (rows.literal_value * blocks.literal_value)
        _store_all(builder, sums, _loop(builder, groups, initial, body))

    return _signature(rows, blocks, 10), _returning_nothing(codegen)


@intrinsic(prefer_literal=True)
def multiply_float32(
    _context: Any,
    rows: Any,
    blocks: Any,
    x: Any,
    x_stride: Any,
    weights: Any,
    block_stride: Any,
    inputs: Any,
    sums: Any,
) -> Any:
    """Sums of float32 products, in the order of the inputs.

    Args:
        rows, blocks: of the tile, literal.
        x: address of float32 (rows, inputs).
        x_stride: bytes between rows of x.
        weights: address of float32 (blocks, inputs, 16).
        block_stride: bytes between blocks.
        inputs: at least 1.
        sums: address of float32 (rows, blocks, 16), written.
    """
    if not _are_literal(rows, blocks):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        _, _, x, x_stride, weights, block_stride, inputs, sums = arguments
        x_rows = _addresses(builder, x, x_stride, rows.literal_value)
        w_blocks = _addresses(builder, weights, block_stride, blocks.literal_value)

        def body(k: Any, carried: list[Any]) -> list[Any]:
            offset = builder.mul(k, _long(4 * LANES))
            loaded = [_load(builder, builder.add(block, offset), _FLOATS) for block in w_blocks]
            numbers = [
                splat_int(builder, _load(builder, builder.add(row, builder.mul(k, _long(4))), ir.FloatType()))
                for row in x_rows
            ]
            pairs = [(number, w) for number in numbers for w in loaded]
            return [_fma(builder, number, w, s) for s, (number, w) in zip(carried, pairs, strict=True)]

        initial = [ir.Constant(_FLOATS, None)] * (rows.literal_value * blocks.literal_value)
        _store_all(builder, sums, _loop(builder, inputs, initial, body))

    return _signature(rows, blocks, 6), _returning_nothing(codegen)


def _are_literal(*counts: Any) -> bool:
    return all(isinstance(count, types.IntegerLiteral) for count in counts)


def _signature(rows: Any, blocks: Any, addresses: int) -> Any:
    return types.void(rows, blocks, *[types.int64] * addresses)


def _returning_nothing(codegen: Callable[..., None]) -> Callable[..., Any]:
    def wrapped(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codegen(context, builder, signature, arguments)
        return context.get_dummy_value()

    return wrapped


def _long(number: int) -> Any:
    return ir.Constant(LONG, number)


def _addresses(builder: Any, first: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(first, builder.mul(stride, _long(index))) for index in range(count)]


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _prefetch(builder: Any, addresses: list[Any]) -> None:
    """Asks for the blocks that come next while this tile computes; harmless where there are none."""
    kind, number = BYTE.as_pointer(), INT
    prefetch = builder.module.declare_intrinsic(
        "llvm.prefetch", (kind,), ir.FunctionType(ir.VoidType(), [kind, number, number, number])
    )
    read, second_level_cache, data = number(0), number(2), number(1)
    for address in addresses:
        builder.call(prefetch, [builder.inttoptr(address, kind), read, second_level_cache, data])


def _store_all(builder: Any, first: Any, values: list[Any]) -> None:
    for index, value in enumerate(values):
        address = builder.add(first, _long(4 * LANES * index))
        builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _nibbles(builder: Any, packed: Any) -> tuple[Any, Any]:
    """The low and the high halves of 64 bytes; shifted as 16-bit numbers, since no machine shifts bytes."""
    shorts = ir.VectorType(ir.IntType(16), 2 * LANES)
    low = ir.Constant(BYTES, [0x0F] * (4 * LANES))
    shifted = builder.lshr(builder.bitcast(packed, shorts), ir.Constant(shorts, [4] * (2 * LANES)))
    return builder.and_(packed, low), builder.and_(builder.bitcast(shifted, BYTES), low)


def _from_halves(builder: Any, address: Any, features: frozenset[str]) -> Any:
    """Sixteen finite float16 numbers as float32."""
    if "sse2" not in features or "f16c" in features:
        return builder.fpext(_load(builder, address, _HALVES), _FLOATS)
    # a processor older than the instruction: the bits moved to their places are too small by 2^112, subnormals included
    bits = builder.zext(_load(builder, address, ir.VectorType(ir.IntType(16), LANES)), INTS)
    moved = builder.shl(builder.and_(bits, _every(0x7FFF)), _every(13))
    number = builder.fmul(builder.bitcast(moved, _FLOATS), ir.Constant(_FLOATS, [2.0**112] * LANES))
    sign = builder.shl(builder.and_(bits, _every(0x8000)), _every(16))
    return builder.bitcast(builder.or_(builder.bitcast(number, INTS), sign), _FLOATS)


def _every(number: int) -> Any:
    return ir.Constant(INTS, [number] * LANES)


def _fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Fused in every tile, so that all round alike."""
    return call_intrinsic(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [x, y, z])


def _loop(builder: Any, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """`for step in range(count): carried = body(step, carried)`, at least once, its values in registers."""
    before = builder.block
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(loop)
    builder.position_at_end(loop)
    step = builder.phi(LONG)
    carried = [builder.phi(value.type) for value in initial]
    step.add_incoming(_long(0), before)
    for phi, value in zip(carried, initial, strict=True):
        phi.add_incoming(value, before)
    values = body(step, carried)
    following = builder.add(step, _long(1))
    step.add_incoming(following, builder.block)
    for phi, value in zip(carried, values, strict=True):
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return values
