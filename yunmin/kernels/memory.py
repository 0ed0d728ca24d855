"""Arrays at addresses, for kernels that work through a whole model and would need hundreds of arguments otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from yunmin.kernels.jit import inline


@intrinsic
def _pointer(_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@inline
def floats_at(address: int, count: int) -> Any:
    """A float32 array of `count` numbers; whoever calls vouches for the memory."""
    return carray(_pointer(address), (count,), np.float32)


@inline
def ints_at(address: int, count: int) -> Any:
    """As `floats_at`, of int32."""
    return carray(_pointer(address), (count,), np.int32)


@inline
def bytes_at(address: int, count: int) -> Any:
    """As `floats_at`, of int8."""
    return carray(_pointer(address), (count,), np.int8)
