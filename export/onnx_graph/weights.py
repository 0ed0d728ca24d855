"""The weights of a graph: what a precision stores, and the float32 model that it stands for."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from yunmin.axes import expected_shapes
from yunmin.checkpoint import Checkpoint
from yunmin.errors import ConfigError
from yunmin.memory import release_pages
from yunmin.quantization.layout import Quantization
from yunmin.quantization.packing import QuantizedWeight, unpack_tensor
from yunmin.quantization.reference import dequantized
from yunmin.quantization.rounding import require_quantizable, round_weight
from yunmin.runtime.onnx_contract import Precision

_ROUNDED_ROWS = 4096


class GraphWeights:
    """Gives the weights of a checkpoint one by one, as a precision stores them.

    Args:
        checkpoint: float32, or quantized as stored.
        precision: of the graph.

    Raises:
        ConfigError: the checkpoint is quantized in another way than the graph shall be.
    """

    def __init__(self, checkpoint: Checkpoint, precision: Precision) -> None:
        stored = checkpoint.quantization.format
        self.is_quantized = precision in ("int8", "int4")
        if self.is_quantized and stored not in ("none", precision):
            raise ConfigError(
                f"the weights are stored in {stored}: expected an ONNX graph in {stored}, fp32 or fp16, got {precision}"
            )
        self._checkpoint = checkpoint
        self.quantization = Quantization("int8" if precision == "int8" else "int4" if precision == "int4" else "none")

    def plain(self, name: str) -> Tensor:
        """A tensor in float32."""
        stored = self._checkpoint.quantization
        if stored.of(name) is not None:
            return unpack_tensor(self._checkpoint.config, self._checkpoint.tensors, name, stored).dequantized()
        return self._checkpoint.tensors[name].detach().float()

    def quantized(self, name: str) -> QuantizedWeight:
        """The integers and scales of a weight that the precision quantizes: those stored, else rounded to nearest.

        Raises:
            CheckpointError: the weight is not finite or too large.
        """
        checkpoint = self._checkpoint
        if checkpoint.quantization.format != "none":
            return unpack_tensor(checkpoint.config, checkpoint.tensors, name, checkpoint.quantization)
        weight_format = self.quantization.of(name)
        assert weight_format is not None, name
        parts = []
        # some rows at a time, each by itself: an embedding is large, and rounding makes copies
        for rows in checkpoint.tensors[name].detach().split(_ROUNDED_ROWS):
            require_quantizable(name, rows)
            parts.append(round_weight(rows.float(), weight_format))
            release_pages([rows])
        levels, scales = torch.cat([part.levels for part in parts]), torch.cat([part.scale for part in parts])
        return QuantizedWeight(weight_format, levels, scales)


def reference_checkpoint(checkpoint: Checkpoint, precision: Precision) -> Checkpoint:
    """The plain float32 checkpoint whose values a graph's weights stand for.

    Args:
        checkpoint: that the graph is written from.
        precision: of the graph.

    Raises:
        ConfigError: as in `GraphWeights`.
    """
    if precision == "fp32":
        return dequantized(checkpoint)
    weights = GraphWeights(checkpoint, precision)
    tensors = {name: reference_tensor(weights, precision, name) for name in expected_shapes(checkpoint.config)}
    return replace(checkpoint, tensors=tensors, quantization=Quantization())


def reference_tensor(weights: GraphWeights, precision: Precision, name: str) -> Tensor:
    """One tensor of the reference checkpoint, float32."""
    if precision == "fp16" and is_matrix(name):
        return half(weights.plain(name), name).float()
    if weights.quantization.of(name) is not None:
        return weights.quantized(name).dequantized()
    return weights.plain(name)


def is_matrix(name: str) -> bool:
    """Whether a weight is one that precisions shorten: projections, embedding and head."""
    return Quantization("int8").of(name) is not None


def half(weight: Tensor, name: str) -> Tensor:
    """Rounded to float16.

    Raises:
        ConfigError: a magnitude is beyond float16; `name` names the weight.
    """
    rounded = weight.half()
    if not bool(rounded.isfinite().all()):
        raise ConfigError(
            f"{name}: expected magnitudes up to 65504, which float16 holds, found {weight.abs().max():.4g}"
        )
    return rounded
