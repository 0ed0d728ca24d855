"""Which tensors are quantized, how, and how they lie in a file.

A quantized weight W (rows, inputs) is stored as two tensors. With row r = 16b + s and q the integer of one weight:

    NAME.int8   uint8 (rows/16, inputs/4, 16, 4)       [b, g, s, t] = q[r, 4g + t] + 128, q in -127..127
    NAME.scale  float32 (rows,)                        w = q * scale[r]

    NAME.int4   uint8 (rows/16, inputs/32, 4, 16, 4)   [b, g, i, s, t] has q[r, 32g + 8i + t] + 8 in its low nibble and
                                                       q[r, 32g + 8i + 4 + t] + 8 in its high one, q in -8..7
    NAME.scale  float16 (rows/16, inputs/32, 16)       w = q * scale[b, g, s]; a scale may be negative

so that one vector of a kernel is 16 rows times 4 inputs. Each named block of the row axis (`yunmin.axes`) is padded by
itself to a multiple of 16 rows, the inputs to a multiple of 4 (int8) or 32 (int4); padding holds q = 0, and padded rows
have scale 0. Packed tensors start at multiples of 64 bytes in the file, so that kernels read it as it is mapped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from yunmin.axes import PROJECTIONS, axes_of, block_size, expected_shapes
from yunmin.config import MambaConfig
from yunmin.errors import CheckpointError, ConfigError

Format = Literal["none", "int8", "int4"]
WeightFormat = Literal["int8", "int4"]

BLOCK_ROWS = 16
GROUP_SIZE = 32
CONFIG_KEY = "quantization_config"
_METHOD = "yunmin"
_INPUT_MULTIPLE = {"int8": 4, "int4": GROUP_SIZE}
# an int4 model keeps these in int8: they are few weights or looked up by row
_ALWAYS_INT8 = ("mixer.dt_proj.weight", "backbone.embeddings.weight", "lm_head.weight")


@dataclass(frozen=True)
class Quantization:
    """How the weights of a checkpoint are stored.

    Attributes:
        format: "none" stands for float32.
    """

    format: Format = "none"

    def of(self, name: str) -> WeightFormat | None:
        """The format of one weight; None for a tensor that stays float32."""
        if self.format == "none" or not _is_quantizable(name):
            return None
        return "int8" if name.endswith(_ALWAYS_INT8) else self.format

    def to_config(self) -> dict[str, Any]:
        """The `quantization_config` of a `config.json`."""
        return {"quant_method": _METHOD, "format": self.format, "group_size": GROUP_SIZE, "row_block": BLOCK_ROWS}

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], *, where: str = "config.json") -> Quantization:
        """Reads `quantization_config` from the content of a `config.json`; without one, nothing is quantized.

        Raises:
            ConfigError: the weights are quantized in a way that is not known here.
        """
        options = raw.get(CONFIG_KEY)
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ConfigError(f"{where}: {CONFIG_KEY} must be an object, got {options!r}")
        formats = [name for name in get_args(Format) if name != "none"]
        if options.get("quant_method") != _METHOD:
            found = options.get("quant_method")
            raise ConfigError(f"{where}: {CONFIG_KEY}.quant_method must be {_METHOD!r}, got {found!r}")
        if options.get("format") not in formats:
            found = options.get("format")
            raise ConfigError(f"{where}: {CONFIG_KEY}.format must be one of {', '.join(formats)}, got {found!r}")
        read = cls(options["format"])
        for key, value in read.to_config().items():
            if options.get(key) != value:
                raise ConfigError(f"{where}: {CONFIG_KEY}.{key} must be {value!r}, got {options.get(key)!r}")
        return read


FLOAT32 = Quantization()


@dataclass(frozen=True)
class WeightLayout:
    """The sizes of one quantized weight.

    Attributes:
        format: of its integers.
        row_blocks: lengths of the named blocks along the rows, each padded by itself.
        inputs: columns of the weight.
    """

    format: WeightFormat
    row_blocks: tuple[int, ...]
    inputs: int

    @property
    def rows(self) -> int:
        return sum(self.row_blocks)

    @property
    def padded_rows(self) -> int:
        return sum(_padded(block, BLOCK_ROWS) for block in self.row_blocks)

    @property
    def padded_inputs(self) -> int:
        return _padded(self.inputs, _INPUT_MULTIPLE[self.format])

    @property
    def groups(self) -> int:
        """Groups of inputs that share a scale."""
        return 1 if self.format == "int8" else self.padded_inputs // GROUP_SIZE

    @property
    def packed_shape(self) -> tuple[int, ...]:
        blocks = self.padded_rows // BLOCK_ROWS
        if self.format == "int8":
            return blocks, self.padded_inputs // 4, BLOCK_ROWS, 4
        return blocks, self.groups, 4, BLOCK_ROWS, 4

    @property
    def scale_shape(self) -> tuple[int, ...]:
        if self.format == "int8":
            return (self.padded_rows,)
        return self.padded_rows // BLOCK_ROWS, self.groups, BLOCK_ROWS

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.format == "int8" else torch.float16

    def row_positions(self) -> Tensor:
        """The position of each row among the padded ones, int64 (rows,)."""
        parts, offset = [], 0
        for block in self.row_blocks:
            parts.append(offset + torch.arange(block))
            offset += _padded(block, BLOCK_ROWS)
        return torch.cat(parts)


def layout_of(config: MambaConfig, quantization: Quantization, name: str) -> WeightLayout:
    """The layout of a weight that `quantization` quantizes."""
    weight_format = quantization.of(name)
    assert weight_format is not None, name
    layer, (rows, columns) = axes_of(name)
    blocks = tuple(block_size(config, layer, block) for block in rows)
    return WeightLayout(weight_format, blocks, sum(block_size(config, layer, block) for block in columns))


def packed_name(name: str, weight_format: WeightFormat) -> str:
    return f"{name}.{weight_format}"


def scale_name(name: str) -> str:
    return f"{name}.scale"


def stored_tensors(config: MambaConfig, quantization: Quantization) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor in the file."""
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in expected_shapes(config).items():
        weight_format = quantization.of(name)
        if weight_format is None:
            stored[name] = shape, torch.float32
            continue
        layout = layout_of(config, quantization, name)
        stored[packed_name(name, weight_format)] = layout.packed_shape, torch.uint8
        stored[scale_name(name)] = layout.scale_shape, layout.scale_dtype
    return stored


def stored_bytes(config: MambaConfig, quantization: Quantization) -> int:
    """Bytes of all tensors in the file, padding included."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored_tensors(config, quantization).values())


def check_stored(config: MambaConfig, quantization: Quantization, tensors: Mapping[str, Tensor]) -> None:
    """Checks names, shapes and dtypes of the tensors of a quantized checkpoint.

    Raises:
        CheckpointError: names the first tensor that is missing, unexpected, or of a wrong shape or dtype.
    """
    expected = stored_tensors(config, quantization)
    for name, (shape, dtype) in expected.items():
        if name not in tensors:
            raise CheckpointError(f"tensor {name!r} is missing, expected shape {shape}")
        found = tensors[name]
        if tuple(found.shape) != shape:
            raise CheckpointError(f"tensor {name!r}: expected shape {shape}, found {tuple(found.shape)}")
        if found.dtype != dtype:
            raise CheckpointError(f"tensor {name!r}: expected {dtype}, found {found.dtype}")
    unexpected = sorted(set(tensors) - set(expected))
    if unexpected:
        raise CheckpointError(f"unexpected tensor {unexpected[0]!r}")


def _is_quantizable(name: str) -> bool:
    projections = tuple(f"mixer.{projection}.weight" for projection in PROJECTIONS)
    return name.endswith((*projections, "backbone.embeddings.weight", "lm_head.weight"))


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
