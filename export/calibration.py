"""Quantizing with calibration text: layer by layer, each on what the layers below give once they are quantized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from export.gptq import gptq
from yunmin.axes import layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError
from yunmin.model import MambaLM
from yunmin.quantization.layout import Quantization
from yunmin.quantization.packing import QuantizedWeight
from yunmin.quantization.rounding import require_quantizable, round_weight

_TOKENS_AT_ONCE = 4096  # bounds the memory of a layer's activations
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
    batch_size = max(1, _TOKENS_AT_ONCE // sequences.shape[1])
    for layer, block in enumerate(model.backbone.blocks):
        batches = _Batches(model, layer, residual, batch_size)
        for projection in _IN_ORDER:
            name = f"{layer_prefix(layer)}mixer.{projection}.weight"
            linear = getattr(block.mixer, projection)
            needs_hessian = quantized.of(name) == "int4"
            weight = rounded(name, batches.second_moments(linear) if needs_hessian else None)
            linear.weight.copy_(weight.dequantized())
        for rows, output in batches.outputs():
            residual[rows] += output
        if progress is not None:
            progress(layer + 1, config.n_layers)
    return weights


class _Taken(Exception):  # noqa: N818 (no error: it ends a computation whose rest is not needed)
    pass


class _Batches:
    """What one layer computes on the calibration text, some sequences at a time."""

    def __init__(self, model: MambaLM, layer: int, residual: Tensor, batch_size: int) -> None:
        self.model, self.layer, self.residual = model, layer, residual
        self.rows = [slice(first, first + batch_size) for first in range(0, residual.shape[0], batch_size)]

    def outputs(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the residual, and what the layer adds to them (rows, L, d)."""
        for rows in self.rows:
            yield rows, self._output(rows)

    def second_moments(self, linear: nn.Linear) -> Tensor:
        """Mean of x x^T over a projection's inputs x, float64; nothing after these is computed."""
        total = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        tokens = 0

        def take(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal tokens
            x = arguments[0].flatten(0, -2).float()  # (tokens, inputs)
            total.add_(x.T @ x)
            tokens += x.shape[0]
            raise _Taken

        with linear.register_forward_pre_hook(take):
            for rows in self.rows:
                with contextlib.suppress(_Taken):
                    self._output(rows)
        return total / tokens

    def _output(self, rows: slice) -> Tensor:
        block = self.model.backbone.blocks[self.layer]
        part = self.residual[rows]
        state = self.model.new_state(part.shape[0])
        output: Tensor = block.mixer(block.norm(part), state.conv[self.layer], state.ssm[self.layer])[0]
        return output
