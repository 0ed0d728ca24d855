"""Hugging Face's format, for `transformers.MambaForCausalLM.from_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path

from yunmin.checkpoint import Checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError
from yunmin.files import write_json


def check(config: MambaConfig) -> None:
    """Refuses what `transformers`' MambaConfig cannot say.

    Raises:
        ConfigError: layers differ in width; names the first that does.
    """
    require_uniform("hf", "transformers' Mamba", config)


def require_uniform(kind: str, whose: str, config: MambaConfig) -> None:
    """Refuses widths per layer where a format has one number for all.

    Raises:
        ConfigError: names the first layer that differs.
    """
    for name in ("d_inner", "d_state"):
        widths = getattr(config, name)
        for layer, width in enumerate(widths):
            if width != widths[0]:
                raise ConfigError(
                    f"--format {kind}: layer {layer}: {whose} has one {name} for all layers, found {width} "
                    f"beside {widths[0]}; train with uniform widths, or export an artifact"
                )


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes config, generation config and weights.

    Args:
        folder: exists already.
        checkpoint: float32 weights with equal layers.
    """
    config = checkpoint.config
    write_checkpoint(folder, config, checkpoint.tensors)
    padding = list(range(config.n_tokens, config.vocab_size))
    if padding:  # `generate` would sample rows that stand for no token
        path = folder / "generation_config.json"
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), "suppress_tokens": padding})
