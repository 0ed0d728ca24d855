"""Reading a GGUF file of a Mamba back: the proof of what `export.gguf` wrote.

The names are spelled out here, so that a mistake in the writer's mapping is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yunmin.axes import expected_shapes, layer_prefix
from yunmin.config import MambaConfig
from yunmin.errors import VerificationError

_LAYER_NAMES = {
    "attn_norm.weight": "norm.weight",
    "ssm_in.weight": "mixer.in_proj.weight",
    "ssm_conv1d.weight": "mixer.conv1d.weight",
    "ssm_conv1d.bias": "mixer.conv1d.bias",
    "ssm_x.weight": "mixer.x_proj.weight",
    "ssm_dt.weight": "mixer.dt_proj.weight",
    "ssm_dt.bias": "mixer.dt_proj.bias",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_out.weight": "mixer.out_proj.weight",
}
_MODEL_NAMES = {
    "token_embd.weight": "backbone.embeddings.weight",
    "output_norm.weight": "backbone.norm_f.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_BLOCK = 32  # weights that share a scale
_F16, _F16_TINY = 2.0**-11, 2.0**-25  # half a unit in the last place: relative, and below the smallest normal number
# error of a weight: (share of the block's largest, absolute). Q8_0 has half a step of 127; Q4_0 a whole one of 8, since
# it has fewer positive steps than negative ones; both have a scale in F16, by which up to 127 or 8 is multiplied
_ROUNDING = {
    "F32": (0.0, 0.0),
    "F16": (_F16, _F16_TINY),
    "Q8_0": (0.5 / 127 + _F16, 127 * _F16_TINY),
    "Q4_0": (1 / 8 + _F16, 8 * _F16_TINY),
}
_SLACK = 1 + 2.0**-20  # the quantizer's own float32 arithmetic


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file.

    Attributes:
        name: Hugging Face's.
        type: GGML's name of how it is stored.
        values: float32, of the checkpoint's shape; for `A_log`, what the file holds: A itself.
    """

    name: str
    type: str
    values: Tensor


def read_tensors(path: Path) -> Iterator[StoredTensor]:
    """The tensors of a Mamba, dequantized one by one.

    Raises:
        VerificationError: a name that llama.cpp's mamba does not have.
    """
    import gguf

    return _tensors(gguf.GGUFReader(path))


def checkpoint_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors under Hugging Face's names, `A_log` as in a checkpoint: the model that a file stands for."""
    return {t.name: torch.log(-t.values) if t.name.endswith("A_log") else t.values for t in read_tensors(path)}


def require_faithful(path: Path, config: MambaConfig, tensors: Mapping[str, Tensor], called: str) -> None:
    """Checks a file against the model it was made from: widths, names, shapes, and every weight.

    Args:
        path: the file.
        config: the architecture.
        tensors: float weights by Hugging Face name.
        called: what the file is going to be called, for the error.

    Raises:
        VerificationError: names the entry or tensor; a weight may be off by its type's rounding and no more.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    for key, expected in _metadata(config).items():
        field = reader.get_field(key)
        found = None if field is None else field.contents()
        if found != expected:
            raise VerificationError(f"{called}: read back, {key} is {found}, expected {expected}; nothing was written")
    shapes = expected_shapes(config)
    if not config.use_conv_bias:
        shapes |= {f"{layer_prefix(i)}mixer.conv1d.bias": (width,) for i, width in enumerate(config.d_inner)}
    for stored in _tensors(reader):
        shape = shapes.pop(stored.name, None)
        found_shape = tuple(stored.values.shape)
        if found_shape != shape:
            raise VerificationError(
                f"{called}: read back, tensor {stored.name!r} has shape {found_shape}, expected {shape}; "
                "nothing was written"
            )
        expected_values = tensors[stored.name].float() if stored.name in tensors else torch.zeros(shape)
        if stored.name.endswith("A_log"):
            expected_values = -torch.exp(expected_values)
        _require_close(stored, expected_values, called)
    if shapes:
        raise VerificationError(f"{called}: read back, tensor {min(shapes)!r} is missing; nothing was written")


def _tensors(reader: Any) -> Iterator[StoredTensor]:
    from gguf import dequantize

    for stored in reader.tensors:
        match = _LAYER.fullmatch(stored.name)
        if match and match[2] in _LAYER_NAMES:
            name = layer_prefix(int(match[1])) + _LAYER_NAMES[match[2]]
        elif stored.name in _MODEL_NAMES:
            name = _MODEL_NAMES[stored.name]
        else:
            raise VerificationError(f"GGUF: llama.cpp's mamba has no tensor {stored.name!r}")
        values = torch.tensor(dequantize(stored.data, stored.tensor_type))
        yield StoredTensor(name, stored.tensor_type.name, values.unsqueeze(1) if "conv1d.weight" in name else values)


def _require_close(stored: StoredTensor, expected: Tensor, called: str) -> None:
    share, absolute = _ROUNDING[stored.type]
    width = _BLOCK if stored.type.startswith("Q") else 1
    values, expected = stored.values.reshape(-1, width), expected.reshape(-1, width)
    limit = (expected.abs().amax(1, keepdim=True) * share + absolute) * _SLACK
    error = (values - expected).abs()
    if not bool((error <= limit).all()):  # also where it is not finite
        raise VerificationError(
            f"{called}: read back, tensor {stored.name!r} as {stored.type} is off by {float(error.max()):.3g}, "
            f"which is more than that type's rounding; the largest weight is {float(expected.abs().max()):.4g}; "
            "nothing was written"
        )


def _metadata(config: MambaConfig) -> dict[str, Any]:
    return {
        "general.architecture": "mamba",
        "mamba.block_count": config.n_layers,
        "mamba.embedding_length": config.d_model,
        "mamba.ssm.conv_kernel": config.d_conv,
        "mamba.ssm.inner_size": config.d_inner[0],
        "mamba.ssm.state_size": config.d_state[0],
        "mamba.ssm.time_step_rank": config.dt_rank,
        "mamba.attention.layer_norm_rms_epsilon": float(torch.tensor(config.norm_eps)),
        "mamba.vocab_size": config.vocab_size,
    }
