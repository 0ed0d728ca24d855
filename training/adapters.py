"""Pillar 3: which projection gets LoRA, which IA3, which nothing; and the adapters themselves, through `peft`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model

from training.config import TrainingConfig
from yunmin.files import write_safetensors
from yunmin.model import MambaLM
from yunmin.trained import adapter_host


@dataclass(frozen=True)
class Allocation:
    """The projections, by module name, of each kind of adapter."""

    lora: tuple[str, ...]
    ia3: tuple[str, ...]
    frozen: tuple[str, ...]


def allocate(scores: Mapping[str, float], config: TrainingConfig, masked: Collection[str]) -> Allocation:
    """Ranks projections and shares out the adapters.

    The most important projections that may have LoRA get it, up to `lora_share` of all; of the rest the most important
    get IA3, up to `ia3_share` of all. A masked projection never gets LoRA, whose merge would revive cut weights.

    Args:
        scores: importance by module name.
        config: the shares and targets.
        masked: modules with a weight mask.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    may_have_lora = [n for n in ranked if n.rpartition(".")[2] in config.lora_targets and n not in masked]
    lora = set(may_have_lora[: round(config.lora_share * len(ranked))])
    rest = [name for name in ranked if name not in lora]
    ia3 = set(rest[: round(config.ia3_share * len(ranked))]) if config.enable_ia3 else set()
    return Allocation(
        tuple(n for n in ranked if n in lora),
        tuple(n for n in ranked if n in ia3),
        tuple(n for n in ranked if n not in lora and n not in ia3),
    )


def inject_adapters(
    model: MambaLM, allocation: Allocation, config: TrainingConfig, generator: torch.Generator
) -> dict[str, PeftConfig]:
    """Adds fresh adapters to a model, in place, under the names `lora` and `ia3`.

    Two names on disjoint modules keep both trainable; one name for both would mix them up.

    Args:
        model: gets the adapters.
        allocation: where.
        config: rank, alpha and dropout.
        generator: of LoRA's initial values.

    Returns:
        The configurations by adapter name.
    """
    configs: dict[str, PeftConfig] = {}
    if allocation.lora:
        configs["lora"] = LoraConfig(
            r=config.peft_r,
            lora_alpha=config.peft_alpha,
            lora_dropout=config.peft_dropout,
            target_modules=list(allocation.lora),
            task_type="CAUSAL_LM",
        )
    if allocation.ia3:
        configs["ia3"] = IA3Config(target_modules=list(allocation.ia3), feedforward_modules=[], task_type="CAUSAL_LM")
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # peft draws from the global source
        for name, peft_config in configs.items():
            inject_adapter_in_model(peft_config, adapter_host(model), adapter_name=name)
    return configs


def save_adapters(model: MambaLM, configs: Mapping[str, PeftConfig], folder: Path) -> None:
    """Writes each adapter as a standard PEFT folder, `folder/lora` and `folder/ia3`."""
    for name, peft_config in configs.items():
        target = folder / name
        target.mkdir(parents=True)
        # the names that `PeftModel.save_pretrained` would give
        suffixes = {f".lora_A.{name}.weight": ".lora_A.weight", f".lora_B.{name}.weight": ".lora_B.weight"}
        suffixes[f".ia3_l.{name}"] = ".ia3_l"
        tensors = {
            f"base_model.model.{key.removesuffix(suffix)}{saved}": tensor
            for key, tensor in model.state_dict().items()
            for suffix, saved in suffixes.items()
            if key.endswith(suffix)
        }
        write_safetensors(target / "adapter_model.safetensors", tensors)
        peft_config.save_pretrained(str(target))
