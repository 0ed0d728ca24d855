"""Products with the model's matrices, and rows of its embedding, in every precision."""

from __future__ import annotations

from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional as F

from export.onnx_graph.builder import MICROSOFT, GraphBuilder
from export.onnx_graph.weights import GraphWeights, half
from yunmin.quantization.layout import GROUP_SIZE, WeightFormat
from yunmin.quantization.packing import QuantizedWeight
from yunmin.runtime.onnx_contract import Flavour, Precision

_LARGEST_BLOCK = 256  # of inputs with one scale in an int8 weight of `ort`: the largest allowed is the fastest
_SMALLEST_BLOCK = 16
INT8_ACTIVATIONS = 4  # MatMulNBits' accuracy_level: blocks of activations are rounded to int8, too


class Matrices:
    """Adds products to a graph.

    Args:
        graph: to add to.
        weights: of the model.
        flavour, precision: of the graph.
    """

    def __init__(self, graph: GraphBuilder, weights: GraphWeights, flavour: Flavour, precision: Precision) -> None:
        self._graph = graph
        self._weights = weights
        self._is_ort = flavour == "ort"
        self._precision = precision
        self._packed: dict[str, dict[str, Any]] = {}  # attributes of products with weights that are in the graph

    def linear(self, x: str, name: str, *, keeps_nan: bool = False) -> str:
        """Multiplies x (..., inputs) by the transpose of a weight (rows, inputs) -> (..., rows).

        Args:
            x: to multiply.
            name: of the weight.
            keeps_nan: whether NaN must stay NaN where x is rounded to integers, too, which would make numbers of it.
        """
        if self._weights.is_quantized:
            product = self._bits(x, name) if self._is_ort else self._dequantized(x, name, self._weights.quantized(name))
            return self._nan_where_in(x, product) if keeps_nan else product
        matrix = self._weights.plain(name).T
        if self._precision == "fp16":
            stored = self._graph.weight(f"{name}.T", half(matrix, name))
            return self._graph.op("MatMul", [x, self._float(stored)])
        return self._graph.op("MatMul", [x, self._graph.weight(f"{name}.T", matrix)])

    def head(self, x: str, name: str) -> str:
        """As `linear`, for a weight that may be the embedding, too: it is stored once."""
        if self._weights.is_quantized:
            return self.linear(x, name, keeps_nan=True)
        rows, inputs = self._weights.plain(name).shape
        graph = self._graph
        flat = graph.op("Reshape", [x, graph.ints(-1, inputs)])
        product = graph.op("Gemm", [flat, self._table(name)], transB=1)  # (B * kept, V)
        batch_and_kept = graph.op("Shape", [x], start=0, end=2)
        return graph.op("Reshape", [product, graph.op("Concat", [batch_and_kept, graph.ints(rows)], axis=0)])

    def rows(self, ids: str, name: str) -> str:
        """Rows of the embedding: int64 ids (B, T) -> float32 (B, T, d)."""
        graph = self._graph
        if not self._weights.is_quantized:
            stored = self._stored_table(name)
            found = graph.op("Gather", [stored, ids])
            return self._float(found) if self._precision == "fp16" else found
        weight = self._weights.quantized(name)  # embeddings are int8 in either precision
        width = weight.levels.shape[1]
        if self._is_ort:
            self._pack(name, weight)
            levels = graph.op("Gather", [f"{name}.packed", ids])  # (B, T, blocks, inputs of a block)
            centred = graph.op("Sub", [self._float(levels), graph.constant(128.0, "float32")])
            flat = graph.op("Reshape", [centred, graph.ints(0, 0, -1)])
            if width % block_size("int8", width):
                flat = graph.op("Slice", [flat, graph.ints(0), graph.ints(width), graph.ints(2)])
        else:
            flat = self._float(graph.op("Gather", [graph.weight(f"{name}.levels", weight.levels), ids]))
        scale = graph.weight(f"{name}.row_scale", weight.scale.float())  # (V, 1)
        return graph.op("Mul", [flat, graph.op("Gather", [scale, ids])])

    def _stored_table(self, name: str) -> str:
        table = self._weights.plain(name)
        return self._graph.weight(name, half(table, name) if self._precision == "fp16" else table)

    def _table(self, name: str) -> str:
        stored = self._stored_table(name)
        return self._float(stored) if self._precision == "fp16" else stored

    def _float(self, value: str) -> str:
        return self._graph.op("Cast", [value], to=TensorProto.FLOAT)

    def _pack(self, name: str, weight: QuantizedWeight) -> None:
        """Adds the integers and scales of `MatMulNBits`: (rows, blocks, bytes) and (rows, blocks)."""
        rows, inputs = weight.levels.shape
        block = block_size(weight.format, inputs)
        padding, scale = (0, -inputs % block), weight.scale.float()
        if weight.format == "int8":
            unsigned = weight.levels.view(torch.uint8) ^ 128  # q + 128
            packed = F.pad(unsigned, padding, value=128).unflatten(1, (-1, block))
            scale = scale.expand(-1, packed.shape[1])
        else:
            packed = _pairs(F.pad(weight.levels + 8, padding, value=8)).unflatten(1, (-1, block // 2))
        self._graph.weight(f"{name}.packed", packed)
        self._graph.weight(f"{name}.scale", scale)
        self._packed[name] = {"K": inputs, "N": rows, "bits": int(weight.format[3:]), "block_size": block}

    def _bits(self, x: str, name: str) -> str:
        if name not in self._packed:
            self._pack(name, self._weights.quantized(name))
        inputs = [x, f"{name}.packed", f"{name}.scale"]
        return self._graph.op(
            "MatMulNBits", inputs, domain=MICROSOFT, accuracy_level=INT8_ACTIVATIONS, **self._packed[name]
        )

    def _nan_where_in(self, x: str, product: str) -> str:
        total = self._graph.op("ReduceSum", [x, self._graph.ints(-1)], keepdims=1)
        return self._graph.op("Add", [product, self._graph.op("Mul", [total, self._graph.constant(0.0, "float32")])])

    def _dequantized(self, x: str, name: str, weight: QuantizedWeight) -> str:
        graph = self._graph
        inputs, rows = weight.levels.T.shape
        if weight.format == "int8":
            # as it lies in the embedding, which is this weight where the two are tied
            levels = graph.weight(f"{name}.levels", weight.levels)
            scale = graph.weight(f"{name}.scale", weight.scale[:, 0].float())
            matrix = graph.op("DequantizeLinear", [levels, scale], axis=0)  # (rows, inputs)
            matrix = graph.op("Transpose", [matrix], perm=[1, 0])
        else:
            packed = _pairs(F.pad(weight.levels.T.contiguous().view(1, -1), (0, inputs * rows % 2)) & 15)
            levels = graph.weight(f"{name}.levels.T", packed.view(-1), dtype=TensorProto.INT4, dims=(inputs, rows))
            scale = graph.weight(f"{name}.scale.T", weight.scale.float().T)
            matrix = graph.op("DequantizeLinear", [levels, scale], axis=0, block_size=GROUP_SIZE)
        return graph.op("MatMul", [x, matrix])


def block_size(weight_format: WeightFormat, inputs: int) -> int:
    """Inputs of a product that `MatMulNBits` rounds with one scale, in `ort` graphs.

    For int8, whose rows have one scale, the power of two that holds all inputs, within what the operator takes.
    """
    if weight_format == "int4":
        return GROUP_SIZE
    return min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, 1 << (inputs - 1).bit_length()))


def _pairs(nibbles: Tensor) -> Tensor:
    """Two nibbles a byte, the first in its low half: (rows, n) -> (rows, n / 2)."""
    unsigned = nibbles.to(torch.uint8)
    return unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
