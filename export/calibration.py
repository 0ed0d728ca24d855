"""Quantizing with calibration text: layer by layer, each on what the layers below give once they are quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from export.gptq import gptq
from export.layerwise import Layer
from yunmin.axes import layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError
from yunmin.model import MambaLM
from yunmin.quantization.layout import Quantization
from yunmin.quantization.packing import QuantizedWeight
from yunmin.quantization.rounding import require_quantizable, round_weight

_IN_ORDER = ("in_proj", "x_proj", "dt_proj", "out_proj")  # as a mixer calls them


@torch.no_grad()
def calibrated_tensors(
    config: MambaConfig,
    tensors: Mapping[str, Tensor],
    quantized: Quantization,
    sequences: Tensor,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantizedWeight]:
    """Quantizes every weight that is to be; those in int4 by GPTQ, the others to nearest.

    Args:
        config: describes `tensors`.
        tensors: float32, by name; not modified.
        quantized: which weights become what.
        sequences: calibration text as token ids, int64 (S, L). Kept are S * L * d numbers.
        progress: called with layers done and in all.

    Raises:
        CheckpointError: a weight cannot be quantized; names it.
    """
    weights: dict[str, QuantizedWeight] = {}

    def rounded(name: str, hessian: Tensor | None = None) -> QuantizedWeight:
        weight, weight_format = tensors[name].float(), quantized.of(name)
        assert weight_format is not None
        require_quantizable(name, weight)
        try:
            weights[name] = round_weight(weight, weight_format) if hessian is None else gptq(weight, hessian)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        return weights[name]

    model = MambaLM.from_tensors(config, tensors)
    embedding = rounded("backbone.embeddings.weight").dequantized()
    if not config.tie_word_embeddings:
        rounded("lm_head.weight")
    residual = embedding[sequences]  # (S, L, d)
    for number, block in enumerate(model.backbone.blocks):
        layer = Layer(model, number, residual)
        for projection in _IN_ORDER:
            name = f"{layer_prefix(number)}mixer.{projection}.weight"
            linear = getattr(block.mixer, projection)
            needs_hessian = quantized.of(name) == "int4"
            weight = rounded(name, _second_moments(layer, linear) if needs_hessian else None)
            linear.weight.copy_(weight.dequantized())
        layer.add_outputs()
        if progress is not None:
            progress(number + 1, config.n_layers)
    return weights


def _second_moments(layer: Layer, linear: nn.Linear) -> Tensor:
    """Mean of x x^T over a projection's inputs x, float64."""
    total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    tokens = 0
    for x in layer.inputs(linear):
        total.add_(x.T @ x)
        tokens += x.shape[0]
    return total / tokens
