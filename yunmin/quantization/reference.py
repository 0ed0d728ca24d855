"""The network of a quantized checkpoint in torch: what runs on CUDA, and what other runtimes are compared with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from yunmin.axes import expected_shapes
from yunmin.checkpoint import Checkpoint
from yunmin.model import MambaLM
from yunmin.quantization.layout import FLOAT32, GROUP_SIZE
from yunmin.quantization.packing import QuantizedWeight, unpack_tensor

# so many products of 127 * 127 sum up exactly in float32
_EXACT_INPUTS = 1024


class QuantizedLinear(nn.Module):
    """A linear layer on integers: weights as stored, and inputs with one scale per token.

    Sums of int8 weights are exact integers, so a token's result does not depend on its neighbours. Sums of int4 weights
    are exact within a group, and added up group by group in float32.

    Args:
        weight: the stored integers and scales.
        bias: float32 (rows,) or None.
    """

    levels: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.format = weight.format
        self.out_features, self.in_features = weight.levels.shape
        self.register_buffer("levels", weight.levels.float())
        self.register_buffer("scale", weight.scale.float())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., rows), float32."""
        q, activation_scale = quantize_tokens(x.float())
        if self.format == "int8":
            out = _exact_products(q, self.levels) * activation_scale * self.scale[:, 0]
        else:
            out = self._grouped(q) * activation_scale
        return out if self.bias is None else out + self.bias

    def _grouped(self, q: Tensor) -> Tensor:
        total = q.new_zeros(*q.shape[:-1], self.out_features)
        for group, first in enumerate(range(0, self.in_features, GROUP_SIZE)):
            columns = slice(first, first + GROUP_SIZE)
            total.addcmul_(q[..., columns] @ self.levels[:, columns].T, self.scale[:, group])
        return total


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers -127..127 and one scale for each row of activations.

    Args:
        x: float32 (..., n); a row with NaN or infinity becomes NaN.

    Returns:
        Integers as float32 (..., n), halves rounded to even, and scales (..., 1).
    """
    absmax = x.abs().amax(-1, keepdim=True)
    inverse = 127 / absmax
    # a row of zeros, or so close to zero that the inverse overflows
    inverse = torch.where(inverse.isinf(), 0.0, inverse)
    return (x * inverse).round(), absmax / 127


def quantized_network(checkpoint: Checkpoint) -> MambaLM:
    """A quantized checkpoint's network in evaluation mode, its state in float32.

    The embedding looks dequantized rows up.
    """
    config, quantized = checkpoint.config, checkpoint.quantization
    assert quantized.format != "none"
    with torch.device("meta"):  # no time spent on initial values
        model = MambaLM(config)
    kept = {name: t.detach().clone() for name, t in checkpoint.tensors.items() if name in expected_shapes(config)}
    for name in expected_shapes(config):
        if quantized.of(name) is None:
            continue
        weight = unpack_tensor(config, checkpoint.tensors, name, quantized)
        module = name.removesuffix(".weight")
        if module == "backbone.embeddings":
            model.backbone.embeddings = nn.Embedding.from_pretrained(weight.dequantized(), freeze=True)
            module = "lm_head" if config.tie_word_embeddings else ""
        if module:
            model.set_submodule(module, QuantizedLinear(weight, kept.pop(f"{module}.bias", None)))
    model.load_state_dict(kept, assign=True, strict=False)
    return model.eval().requires_grad_(requires_grad=False)


def network_of(checkpoint: Checkpoint) -> MambaLM:
    """The network of a checkpoint, quantized or not."""
    if checkpoint.quantization.format == "none":
        return MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    return quantized_network(checkpoint)


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The plain float32 checkpoint with the values that a quantized one stores."""
    config, quantized = checkpoint.config, checkpoint.quantization
    if quantized.format == "none":
        return checkpoint
    tensors = {
        name: checkpoint.tensors[name]
        if quantized.of(name) is None
        else unpack_tensor(config, checkpoint.tensors, name, quantized).dequantized()
        for name in expected_shapes(config)
    }
    return replace(checkpoint, tensors=tensors, quantization=FLOAT32)


def _exact_products(q: Tensor, levels: Tensor) -> Tensor:
    """Integer sums q @ levels.T, exact until the last conversion to float32."""
    inputs = levels.shape[1]
    if inputs <= _EXACT_INPUTS:
        return q @ levels.T
    parts = zip(q.split(_EXACT_INPUTS, dim=-1), levels.split(_EXACT_INPUTS, dim=1), strict=True)
    total: Tensor = sum((part @ rows.T).double() for part, rows in parts)
    return total.float()
