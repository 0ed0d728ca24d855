"""Checkpoints that are never easy: random biases, gates that are not binary, adapters that are not the identity."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.models import random_tensors
from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, save_pillars
from yunmin.tokenizer import Tokenizer

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * 7} lazy dogs, again and again.\n" for i in range(200))


def small_config(*, uniform: bool = True, tied: bool = True, bias: bool = True, vocab_size: int = 300) -> MambaConfig:
    config = MambaConfig.create(
        vocab_size=vocab_size,
        d_model=16,
        n_layers=2,
        d_state=6,
        dt_rank=3,
        use_bias=bias,
        tie_word_embeddings=tied,
    )
    return config if uniform else config.with_widths(d_inner=(32, 20), d_state=(6, 9))


def random_gate(width: int, zeros: int, generator: torch.Generator) -> Tensor:
    """Values around one, some negative, and so many zeros at random places."""
    gate = 0.4 + torch.rand(width, generator=generator)
    gate[::5] *= -1
    gate[torch.randperm(width, generator=generator)[:zeros]] = 0.0
    return gate


def random_pillars(config: MambaConfig, *, channel_zeros: int = 8, state_zeros: int = 2, seed: int = 1) -> Pillars:
    """Gates and a random order; the same number is cut in every layer."""
    generator = torch.Generator().manual_seed(seed)
    return Pillars(
        tuple(random_gate(inner, channel_zeros, generator) for inner in config.d_inner),
        tuple(random_gate(n, state_zeros, generator) for n in config.d_state),
        tuple(torch.randperm(inner, generator=generator) for inner in config.d_inner),
    )


def with_masks(pillars: Pillars, tensors: dict[str, Tensor], *names: str, seed: int = 2) -> Pillars:
    """The pillars with a random element mask on each named weight."""
    generator = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(tensors[name].shape, generator=generator) < 0.6 for name in names}
    return replace(pillars, weight_masks=masks)


def write_adapter(folder: Path, config: MambaConfig, peft_config: Any, seed: int = 3) -> Path:
    """A folder as `peft` saves it, every tensor random."""
    from peft import get_peft_model_state_dict, inject_adapter_in_model

    generator = torch.Generator().manual_seed(seed)
    shell = nn.Module()  # without a config, lest peft refuses LoRA on out_proj
    shell.backbone = MambaLM.initialized(config, generator).backbone
    inject_adapter_in_model(peft_config, shell, "default")
    state = get_peft_model_state_dict(shell, adapter_name="default")
    weights = {f"base_model.model.{n}": 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    weights = {n: 1.0 + t if n.endswith("ia3_l") else t for n, t in weights.items()}
    folder.mkdir(parents=True, exist_ok=True)
    peft_config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def lora(*modules: str, **options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": list(modules), **options})


def ia3(*modules: str, inputs: tuple[str, ...] = (), **options: Any) -> Any:
    from peft import IA3Config

    return IA3Config(target_modules=list(modules), feedforward_modules=list(inputs), **options)


def write_source(
    folder: Path,
    config: MambaConfig,
    *,
    pillars: Pillars | None = None,
    adapters: dict[str, Any] | None = None,
    tokenizer: bool = True,
    seed: int = 0,
) -> Path:
    """A checkpoint folder with everything that training leaves in one."""
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, config, random_tensors(config, seed))
    if tokenizer:
        Tokenizer.train([TEXT], config.vocab_size).save(folder)
    if pillars is not None:
        save_pillars(folder, pillars)
    for number, (name, peft_config) in enumerate((adapters or {}).items()):
        write_adapter(folder / "adapters" / name, config, peft_config, seed=10 + number)
    return folder


def write_trained_run(folder: Path, config: MambaConfig) -> Path:
    """A run folder with one checkpoint: gates, an order, LoRA and IA3 on disjoint modules."""
    adapters = {"lora": lora("in_proj", "dt_proj"), "ia3": ia3("x_proj", "out_proj", inputs=("out_proj",))}
    write_source(folder / "checkpoint-20", config, pillars=random_pillars(config), adapters=adapters)
    return folder
