"""Quantized checkpoints of small random models."""

from __future__ import annotations

from pathlib import Path

from tests.models import random_tensors, small_config
from yunmin.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.quantization.layout import Format, Quantization
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.rounding import round_tensors
from yunmin.tokenizer import Tokenizer

CONFIGS = {
    "untied": small_config(),
    "tied": small_config(tie_word_embeddings=True, use_bias=False),
    "cut": small_config(d_inner=(40, 24), d_state=(5, 7)),
}


def write_quantized(
    folder: Path, config: MambaConfig, weight_format: Format, *, tokenizer: Tokenizer | None = None, seed: int = 0
) -> Path:
    """A checkpoint folder with rounded random weights."""
    quantized = Quantization(weight_format)
    tensors = random_tensors(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        folder, config, pack_tensors(config, tensors, round_tensors(tensors, quantized), quantized), quantized
    )
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


def quantized_checkpoint(folder: Path, config: MambaConfig, weight_format: Format) -> Checkpoint:
    return load_checkpoint(write_quantized(folder, config, weight_format), quantized=True)
