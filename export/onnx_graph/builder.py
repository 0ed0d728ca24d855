"""Collects the nodes and weights of an ONNX graph, under names that depend on nothing but the order of calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

MICROSOFT = "com.microsoft"
_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
}


class GraphBuilder:
    """A graph that grows node by node; what a call returns is the name of a value.

    Attributes:
        weights: large tensors by name, with the element type and the dims they have in the graph.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, tuple[Tensor, int, tuple[int, ...]]] = {}
        self._constants: dict[str, TensorProto] = {}
        self._counts: dict[str, int] = {}
        self._scope = ""

    @property
    def constants(self) -> list[TensorProto]:
        return list(self._constants.values())

    def scope(self, name: str) -> None:
        """Puts what follows below a name, like `layers.3`."""
        self._scope = f"{name}." if name else ""

    def op(self, kind: str, inputs: Sequence[str], *, domain: str = "", output: str = "", **attributes: Any) -> str:
        """Adds a node with one output, named `output` or after its kind."""
        return self.ops(kind, inputs, 1, domain=domain, outputs=[output] if output else None, **attributes)[0]

    def ops(
        self,
        kind: str,
        inputs: Sequence[str],
        count: int,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        **attributes: Any,
    ) -> list[str]:
        """Adds a node with several outputs; an empty name leaves an output away."""
        name = self._fresh(kind)
        if outputs is None:
            outputs = [name] if count == 1 else [f"{name}.{i}" for i in range(count)]
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), name=name, domain=domain, **attributes))
        return list(outputs)

    def weight(self, name: str, tensor: Tensor, *, dtype: int | None = None, dims: Sequence[int] | None = None) -> str:
        """Adds a tensor of the model, once.

        Args:
            name: of the value.
            tensor: contiguous.
            dtype: type of its elements in the graph, where it is not the tensor's own (packed nibbles).
            dims: likewise.
        """
        if name not in self.weights:
            element_type = _TYPES[tensor.dtype] if dtype is None else dtype
            self.weights[name] = (tensor.contiguous(), element_type, tuple(tensor.shape if dims is None else dims))
        return name

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """A small constant; equal ones are one."""
        array = np.asarray(values, dtype)
        name = f"const.{array.dtype.name}.{'x'.join(map(str, array.shape))}.{'_'.join(map(str, array.ravel()))}"
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        """An int64 vector: axes, shapes, sizes."""
        return self.constant(values, np.int64)

    def _fresh(self, kind: str) -> str:
        key = self._scope + kind
        self._counts[key] = self._counts.get(key, 0) + 1
        return f"{key}.{self._counts[key]}"
