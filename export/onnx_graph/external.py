"""Writes an ONNX model whose weights lie in memory, one after the other: large models never exist twice."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto
from torch import Tensor

from yunmin.memory import release_pages

EXTERNAL_BYTES = 16 << 20  # of weights; more of them go into a file of their own, which readers map
_ALIGNMENT = 4096  # of a tensor in that file: a page, as mapping wants it
_SMALL_BYTES = 1024


def write_model(path: Path, model: onnx.ModelProto, weights: Mapping[str, tuple[Tensor, int, tuple[int, ...]]]) -> None:
    """Writes `path`, and `path` + ".data" where the weights are large.

    Args:
        path: of the model.
        model: without the weights, which are added to it.
        weights: tensor, element type and dims in the graph, by name.
    """
    is_external = sum(tensor.nbytes for tensor, _, _ in weights.values()) > EXTERNAL_BYTES
    data_path = path.with_name(path.name + ".data")
    offset = 0
    protos = []
    with data_path.open("wb") if is_external else io.BytesIO() as data:
        for name, (tensor, element_type, dims) in weights.items():
            proto = TensorProto(name=name, data_type=element_type, dims=dims)
            raw = tensor.numpy().reshape(-1).view(np.uint8)  # numpy minds no stride of an axis that has one element
            if not is_external or tensor.nbytes < _SMALL_BYTES:
                proto.raw_data = raw.tobytes()
            else:
                data.write(bytes(-offset % _ALIGNMENT))
                offset += -offset % _ALIGNMENT
                proto.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data_path.name), ("offset", offset), ("length", tensor.nbytes)):
                    proto.external_data.add(key=key, value=str(value))
                data.write(raw.data)
                release_pages([tensor])
                offset += tensor.nbytes
            protos.append(proto)
    model.graph.initializer.extend(protos)
    path.write_bytes(model.SerializeToString(deterministic=True))
