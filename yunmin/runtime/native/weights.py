"""A model's weights as the compiled network reads them: packed, padded, and described by their addresses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from yunmin.axes import axes_of, block_size, layer_prefix
from yunmin.config import MambaConfig
from yunmin.kernels.matmul import BIAS, BLOCKS, FLOAT32, INPUTS, INT4, INT8, KIND, SCALES, WEIGHT_FIELDS, WEIGHTS
from yunmin.kernels.vector import LANES, LOG2_E
from yunmin.quantization.layout import Quantization, layout_of, packed_name, scale_name
from yunmin.runtime.native import records
from yunmin.runtime.native.records import padded
from yunmin.runtime.native.state import StateLayout

Record = NDArray[np.int64]
_KINDS = {"int8": INT8, "int4": INT4}


@dataclass(frozen=True)
class NativeWeights:
    """Weights in memory and what describes them.

    Attributes:
        config: the architecture.
        model: record of the model.
        layers: records of the layers, (n_layers, LAYER_FIELDS).
        states: where each layer's states lie.
        kept: every tensor whose address is in a record.
    """

    config: MambaConfig
    model: Record
    layers: Record
    states: StateLayout
    kept: tuple[Tensor, ...]

    @property
    def logits_width(self) -> int:
        """Numbers in a row of logits, the vocabulary padded."""
        return int(self.model[records.HEAD + BLOCKS]) * LANES


def prepare_weights(config: MambaConfig, quantization: Quantization, tensors: Mapping[str, Tensor]) -> NativeWeights:
    """Describes a checkpoint's tensors for the compiled network.

    Quantized weights stay where they are (in a mapped file, usually); float32 ones are packed into new memory.

    Args:
        config: the architecture.
        quantization: how `tensors` are stored.
        tensors: as stored, checked.
    """
    return _Preparation(config, quantization, tensors).run()


class _Preparation:
    def __init__(self, config: MambaConfig, quantization: Quantization, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.quantization = quantization
        self.tensors = tensors
        self.kept: list[Tensor] = []

    def run(self) -> NativeWeights:
        config = self.config
        layers = np.zeros((config.n_layers, records.LAYER_FIELDS), np.int64)
        states = StateLayout.of(config)
        for layer, (conv_begin, ssm_begin) in enumerate(zip(states.conv_begin, states.ssm_begin, strict=True)):
            self._describe_layer(layers[layer], layer, conv_begin, ssm_begin)
        model = np.zeros(records.MODEL_FIELDS, np.int64)
        embedding = "backbone.embeddings.weight"
        head = embedding if config.tie_word_embeddings else "lm_head.weight"
        self._describe_weight(model[records.HEAD :], head)
        if self.quantization.of(embedding) is None:
            table = self._keep(self.tensors[embedding].float().contiguous())
            model[records.EMBEDDING + KIND], model[records.EMBEDDING + WEIGHTS] = FLOAT32, table
        elif config.tie_word_embeddings:
            model[records.EMBEDDING :][:WEIGHT_FIELDS] = model[records.HEAD :][:WEIGHT_FIELDS]
        else:
            self._describe_weight(model[records.EMBEDDING :], embedding)
        model[records.FINAL_NORM] = self._vector("backbone.norm_f.weight")
        model[records.MODEL_WIDTH] = config.d_model
        model[records.TAPS] = config.d_conv
        model[records.STATE_NUMBERS] = states.numbers
        return NativeWeights(config, model, layers, states, tuple(self.kept))

    def _describe_layer(self, record: Record, layer: int, conv_begin: int, ssm_begin: int) -> None:
        prefix = layer_prefix(layer)
        inner = padded(self.config.d_inner[layer])
        for position, projection in (
            (records.IN_PROJ, "in_proj"),
            (records.X_PROJ, "x_proj"),
            (records.DT_PROJ, "dt_proj"),
            (records.OUT_PROJ, "out_proj"),
        ):
            name = f"{prefix}mixer.{projection}"
            self._describe_weight(record[position:], f"{name}.weight")
            if f"{name}.bias" in self.tensors:
                record[position + BIAS] = self._vector(f"{name}.bias")
        record[records.NORM] = self._vector(f"{prefix}norm.weight")
        taps = self.tensors[f"{prefix}mixer.conv1d.weight"][:, 0].float().T  # (K, D)
        record[records.CONV_TAPS] = self._keep(_pad_last(taps, inner))
        bias = self.tensors.get(f"{prefix}mixer.conv1d.bias", torch.zeros(self.config.d_inner[layer], device="cpu"))
        record[records.CONV_BIAS] = self._keep(_pad_last(bias, inner))
        rates = -torch.exp(self.tensors[f"{prefix}mixer.A_log"].float()) * LOG2_E  # (D, N)
        blocks = _pad_last(rates.T, inner).view(-1, inner // LANES, LANES).transpose(0, 1)  # (D/16, N, 16)
        record[records.DECAY] = self._keep(blocks.contiguous())
        record[records.SKIP] = self._vector(f"{prefix}mixer.D")
        record[records.INNER] = inner
        record[records.STATES] = self.config.d_state[layer]
        record[records.RANK] = padded(self.config.dt_rank)
        record[records.CONV_STATE] = conv_begin
        record[records.SSM_STATE] = ssm_begin

    def _describe_weight(self, record: Record, name: str) -> None:
        weight_format = self.quantization.of(name)
        if weight_format is None:
            packed = _pack_float32(self.config, name, self.tensors[name])
            record[KIND], record[WEIGHTS] = FLOAT32, self._keep(packed)
            record[BLOCKS], record[INPUTS] = packed.shape[0], packed.shape[1]
            return
        layout = layout_of(self.config, self.quantization, name)
        record[KIND] = _KINDS[weight_format]
        record[WEIGHTS] = self._keep(self.tensors[packed_name(name, weight_format)])
        record[SCALES] = self._keep(self.tensors[scale_name(name)])
        record[BLOCKS], record[INPUTS] = layout.padded_rows // LANES, layout.padded_inputs

    def _vector(self, name: str) -> int:
        """Address of a float32 vector, each block of its axis padded."""
        _, (rows,) = axes_of(name)
        return self._keep(_pad_rows(self.config, name, self.tensors[name].float()[:, None], rows)[:, 0].contiguous())

    def _keep(self, tensor: Tensor) -> int:
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        self.kept.append(tensor)
        return tensor.data_ptr()


def _pack_float32(config: MambaConfig, name: str, weight: Tensor) -> Tensor:
    """A weight (rows, inputs) as (rows / 16, inputs, 16), each block of its rows padded."""
    _, (rows, _) = axes_of(name)
    wide = _pad_rows(config, name, weight.float(), rows)
    return wide.view(-1, LANES, wide.shape[1]).transpose(1, 2).contiguous()


def _pad_rows(config: MambaConfig, name: str, matrix: Tensor, blocks: tuple[str, ...]) -> Tensor:
    layer, _ = axes_of(name)
    sizes = [block_size(config, layer, block) for block in blocks]
    if all(size % LANES == 0 for size in sizes):
        return matrix
    parts = [F.pad(part, (0, 0, 0, padded(part.shape[0]) - part.shape[0])) for part in matrix.split(sizes)]
    return torch.cat(parts)


def _pad_last(tensor: Tensor, width: int) -> Tensor:
    return F.pad(tensor.float(), (0, width - tensor.shape[-1])).contiguous()
