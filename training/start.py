"""Where a run starts: a checkpoint's weights and tokenizer, or fresh ones."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from training.config import TrainingConfig
from training.data import TrainingData, is_synthetic, load_synthetic, load_text, read_and_split
from training.recompute import RecomputedMixer
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.corpus import texts_of
from yunmin.errors import ConfigError, TokenizerError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM
from yunmin.pillars import adapter_folders, load_pillars
from yunmin.tokenizer import Tokenizer, copy_tokenizer


@dataclass(frozen=True)
class Start:
    """A model at its first step, and what it learns from.

    Attributes:
        model: built with `GatedMixer`, on the CPU.
        data: packed and split.
        tokenizer_files: what every checkpoint carries, by name; empty for synthetic data without a tokenizer.
    """

    model: MambaLM
    data: TrainingData
    tokenizer_files: dict[str, bytes]


def start_from(config: TrainingConfig) -> Start:
    """Starts where the configuration says: from a checkpoint, or from scratch.

    Raises:
        ConfigError: explicit model keys contradict the checkpoint, or it is a trained one that needs an export first.
        CheckpointError, DataError, TokenizerError: as their readers say.
    """
    return _from_scratch(config) if config.checkpoint is None else _from_checkpoint(config, config.checkpoint)


def continue_from(config: TrainingConfig, checkpoint: Checkpoint) -> Start:
    """Takes weights, tokenizer and vocabulary from a checkpoint of the run itself."""
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, mixer=mixer_of(config))
    return Start(model, _data_for(config, checkpoint), _tokenizer_files(checkpoint.folder))


def _from_checkpoint(config: TrainingConfig, source: str) -> Start:
    checkpoint = load_checkpoint(source)
    _refuse_contradictions(config, checkpoint.config)
    pillars = load_pillars(checkpoint.folder, checkpoint.config)
    has_gates = any(bool((gate != 1).any()) for gate in (*pillars.channel_gates, *pillars.state_gates))
    if has_gates or pillars.weight_masks or adapter_folders(checkpoint.folder):
        raise ConfigError(
            f"checkpoint: {checkpoint.folder} has gates, masks or adapters beside its weights; "
            f"start from its export (yunmin export {checkpoint.folder} OUT)"
        )
    return continue_from(config, checkpoint)


def _from_scratch(config: TrainingConfig) -> Start:
    options: dict[str, Any] = {
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "expand": config.expand,
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "vocab_size": config.vocab_size,
        "initializer_range": 0.02,  # mamba_ssm's
    }
    rng = torch.Generator().manual_seed(config.seed)
    if is_synthetic(config):
        data = load_synthetic(config, config.vocab_size, separator=0)
        return Start(_fresh_model(MambaConfig.create(**options), mixer_of(config), rng), data, {})
    split = read_and_split(config)
    tokenizer = Tokenizer.train(texts_of(split[0]), config.vocab_size)
    assert tokenizer.eos_id is not None
    model_config = MambaConfig.create(**options, n_tokens=tokenizer.vocab_size, eos_token_ids=(tokenizer.eos_id,))
    data = load_text(config, split, tokenizer, tokenizer.eos_id)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = _tokenizer_files(Path(folder))
    return Start(_fresh_model(model_config, mixer_of(config), rng), data, files)


def mixer_of(config: TrainingConfig) -> type[GatedMixer]:
    """The mixer that a run's model is built with."""
    return RecomputedMixer if config.gradient_checkpointing else GatedMixer


def _fresh_model(config: MambaConfig, mixer: type[GatedMixer], rng: torch.Generator) -> MambaLM:
    """Mamba's initialization, with the residual branches scaled down as `mamba_ssm` does.

    The config does not say so afterwards: transformers 5 would scale loaded weights once more.
    """
    fresh = MambaLM.initialized(replace(config, rescale_prenorm_residual=True), rng)
    return MambaLM.from_tensors(config, fresh.tensors(), mixer)


def _data_for(config: TrainingConfig, checkpoint: Checkpoint) -> TrainingData:
    eos_ids, tokenizer = checkpoint.config.eos_token_ids, checkpoint.tokenizer
    if is_synthetic(config):
        return load_synthetic(config, checkpoint.config.n_tokens, separator=eos_ids[0] if eos_ids else 0)
    if tokenizer is None:
        raise TokenizerError(f"{checkpoint.folder}: expected a tokenizer.json to read {', '.join(config.data)} with")
    end_of_text = eos_ids[0] if eos_ids else tokenizer.eos_id
    if end_of_text is None:
        raise TokenizerError(f"{checkpoint.folder}: neither its config nor its tokenizer names an end-of-text token")
    return load_text(config, read_and_split(config), tokenizer, end_of_text)


def _refuse_contradictions(config: TrainingConfig, model: MambaConfig) -> None:
    found = {
        "d_model": (model.d_model,),
        "n_layers": (model.n_layers,),
        "vocab_size": (model.vocab_size,),
        "expand": tuple(inner / model.d_model for inner in model.d_inner),
        "d_state": model.d_state,
        "d_conv": (model.d_conv,),
    }
    for key, values in found.items():
        wanted = getattr(config, key)
        if key in config.model_fields_set and any(value != wanted for value in values):
            there = ", ".join(f"{value:g}" for value in dict.fromkeys(values))
            raise ConfigError(f"{key}: the checkpoint {config.checkpoint} has {there}, got {wanted}; leave the key out")


def _tokenizer_files(folder: Path) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as shelf:
        return {name: (Path(shelf) / name).read_bytes() for name in copy_tokenizer(folder, shelf)}
