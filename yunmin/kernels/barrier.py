"""Where the threads of a team wait for one another inside a kernel: a microsecond, where a wake-up takes fifty."""

from __future__ import annotations

import os
from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from yunmin.kernels.dot import call_intrinsic, target_features
from yunmin.kernels.jit import inline, jit

BARRIER_NUMBERS = 32  # int64: the count of those who wait, and far from it the number of times all have met
_GENERATION = 128  # bytes between the two
_SPINS = 2000  # before the processor is offered to others, who may be what is being waited for

_give_way = types.ExternalFunction("SwitchToThread" if os.name == "nt" else "sched_yield", types.int32())


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _add(_context: Any, address: Any, number: Any) -> Any:
    """Adds atomically; returns what was there before."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _pointer(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _read(_context: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_pointer(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _pause(_context: Any) -> Any:
    """Tells the processor that this is a waiting loop."""

    def codegen(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        if "sse2" in target_features():
            call_intrinsic(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), codegen


@jit
def _meet(address: int, size: int) -> None:
    generation = _read(address + _GENERATION)
    if _add(address, 1) == size - 1:
        _add(address, -size)
        _add(address + _GENERATION, 1)
        return
    spins = 0
    while _read(address + _GENERATION) == generation:
        spins += 1
        if spins > _SPINS:
            _give_way()
        else:
            _pause()


@inline
def meet(address: int, size: int) -> None:
    """Waits until all `size` threads of the team are here.

    Args:
        address: of BARRIER_NUMBERS int64 that were zero when the team began.
        size: threads in the team.
    """
    if size > 1:
        _meet(address, size)
