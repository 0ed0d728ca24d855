"""Artifacts of tiny models."""

from __future__ import annotations

from pathlib import Path

from tests.models import random_tensors, trained_tokenizer
from yunmin.artifact import write_manifest
from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of


def cut_config() -> MambaConfig:
    """300 ids, d 24, layers of different widths, biases on."""
    return MambaConfig(vocab_size=300, d_model=24, d_inner=(40, 24), d_state=(5, 3), dt_rank=3, use_bias=True)


def write_tiny_artifact(folder: Path, config: MambaConfig | None = None, seed: int = 0) -> Path:
    """An artifact of random weights with a tokenizer (what exports prove is another test's subject)."""
    config = cut_config() if config is None else config
    folder.mkdir(parents=True)
    write_checkpoint(folder, config, random_tensors(config, seed))
    trained_tokenizer().save(folder)
    cost = cost_of(config)
    write_manifest(folder, provenance={"source": "a test"}, before=cost, after=cost, cuts=[], parity={})
    return folder
