"""One instruction, or its equivalent: each 32-bit lane adds four products of unsigned and signed bytes.

x86 has it as `vpdpbusd` (AVX-512 VNNI), Arm as `usdot` (i8mm). AVX2 multiplies pairs of 16-bit numbers instead;
anything else computes it lane by lane. All are exact, so the results are the same on every machine.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import llvmlite.ir as ir
from numba.core import config as numba_config

BYTE, INT, LONG = ir.IntType(8), ir.IntType(32), ir.IntType(64)
LANES = 16
INTS = ir.VectorType(INT, LANES)
BYTES = ir.VectorType(BYTE, 4 * LANES)


def target_features() -> frozenset[str]:
    """Features of the processor that numba compiles for: the machine's, unless `NUMBA_CPU_FEATURES` says otherwise."""
    if numba_config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in numba_config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, has in llvmlite.binding.get_host_cpu_features().items() if has)


def emit_dot(builder: Any, sums: Any, weights: Any, x: Any, features: frozenset[str]) -> Any:
    """Emits sums[lane] + the sum over t < 4 of weights[4 lane + t] * x[t].

    Args:
        builder: of LLVM's IR.
        sums: (16) int32.
        weights: (64) unsigned bytes.
        x: four signed bytes as one int32.
        features: of the target.
    """
    if "avx512vnni" in features:
        return _x86_vnni(builder, sums, weights, x)
    if "i8mm" in features:
        return _arm_usdot(builder, sums, weights, x)
    if "avx2" in features:
        return _x86_pairs(builder, sums, weights, x)
    return _by_lane(builder, sums, weights, x)


def splat_int(builder: Any, number: Any, lanes: int = LANES) -> Any:
    """An int32 in every lane."""
    empty = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, number, ir.Constant(INT, 0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(INT, lanes), [0] * lanes))


def call_intrinsic(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Calls an intrinsic of LLVM by its full name."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(builder.module.declare_intrinsic(name, (), signature), arguments)


def _x86_vnni(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    repeated = builder.bitcast(splat_int(builder, x), BYTES)
    return call_intrinsic(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, [sums, weights, repeated])


def _arm_usdot(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    repeated = builder.bitcast(splat_int(builder, x, 4), ir.VectorType(BYTE, 16))
    quarters = []
    for quarter in range(4):
        part = _slice(builder, sums, 4 * quarter, 4)
        w = _slice(builder, weights, 16 * quarter, 16)
        quarters.append(call_intrinsic(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", part.type, [part, w, repeated]))
    return _join(builder, _join(builder, quarters[0], quarters[1]), _join(builder, quarters[2], quarters[3]))


def _x86_pairs(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    shorts = ir.VectorType(ir.IntType(16), 2 * LANES)
    eight = ir.Constant(shorts, [8] * (2 * LANES))
    w = builder.bitcast(weights, shorts)
    repeated = builder.bitcast(splat_int(builder, x), shorts)
    low = ir.Constant(shorts, [0xFF] * (2 * LANES))
    evens = (builder.and_(w, low), builder.ashr(builder.shl(repeated, eight), eight))
    odds = (builder.lshr(w, eight), builder.ashr(repeated, eight))
    for left, right in (evens, odds):
        halves = [
            call_intrinsic(
                builder,
                "llvm.x86.avx2.pmadd.wd",
                ir.VectorType(INT, 8),
                [_slice(builder, left, begin, 16), _slice(builder, right, begin, 16)],
            )
            for begin in (0, 16)
        ]
        sums = builder.add(sums, _join(builder, *halves))
    return sums


def _by_lane(builder: Any, sums: Any, weights: Any, x: Any) -> Any:
    w = builder.bitcast(weights, INTS)
    for t in range(4):
        amount = ir.Constant(INTS, [8 * t] * LANES)
        byte = builder.and_(builder.lshr(w, amount), ir.Constant(INTS, [0xFF] * LANES))
        number = builder.ashr(builder.shl(x, ir.Constant(INT, 24 - 8 * t)), ir.Constant(INT, 24))
        sums = builder.add(sums, builder.mul(byte, splat_int(builder, number)))
    return sums


def _slice(builder: Any, vector: Any, begin: int, count: int) -> Any:
    lanes = ir.Constant(ir.VectorType(INT, count), list(range(begin, begin + count)))
    return builder.shuffle_vector(vector, vector, lanes)


def _join(builder: Any, low: Any, high: Any) -> Any:
    count = 2 * low.type.count
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(INT, count), list(range(count))))
