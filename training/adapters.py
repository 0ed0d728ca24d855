"""Pillar 3: which projection gets LoRA, which IA3, which nothing; and the adapters themselves, through `peft`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import Tensor

from training.config import TrainingConfig
from training.parallel import whole
from training.spectrum import Spectrum
from yunmin.errors import ConfigError
from yunmin.files import write_safetensors
from yunmin.model import MambaLM
from yunmin.trained import adapter_host


@dataclass(frozen=True)
class Allocation:
    """The projections, by module name, of each kind of adapter."""

    lora: tuple[str, ...]
    ia3: tuple[str, ...]
    frozen: tuple[str, ...]


@dataclass(frozen=True)
class Adapters:
    """Trained adapters: `peft`'s configurations, and tensors, by the adapters' names."""

    configs: dict[str, PeftConfig]
    tensors: dict[str, dict[str, Tensor]]

    def save(self, folder: Path) -> None:
        """Writes each adapter as a standard PEFT folder, `folder/lora` and `folder/ia3`."""
        for name, peft_config in self.configs.items():
            target = folder / name
            target.mkdir(parents=True)
            write_safetensors(target / "adapter_model.safetensors", self.tensors[name])
            peft_config.save_pretrained(str(target))


def allocate(scores: Mapping[str, float], config: TrainingConfig, masked: Collection[str]) -> Allocation:
    """Ranks projections and shares out the adapters.

    The most important projections that may have LoRA get it, up to `lora_share` of all; of the rest the most important
    get IA3, up to `ia3_share` of all. A masked projection never gets LoRA, whose merge would revive cut weights. With
    uniform allocation all that may have LoRA get it, and none IA3.

    Args:
        scores: importance by module name, or what stands in for it.
        config: the shares and targets.
        masked: modules with a weight mask.
    """
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    may_have_lora = [n for n in ranked if n.rpartition(".")[2] in config.lora_targets and n not in masked]
    lora_share, ia3_share = config.lora_share, config.ia3_share if config.enable_ia3 else 0.0
    if config.allocation == "uniform":
        lora_share, ia3_share = 1.0, 0.0
    lora = set(may_have_lora[: round(lora_share * len(ranked))])
    rest = [name for name in ranked if name not in lora]
    ia3 = set(rest[: round(ia3_share * len(ranked))])
    return Allocation(
        tuple(n for n in ranked if n in lora),
        tuple(n for n in ranked if n in ia3),
        tuple(n for n in ranked if n not in lora and n not in ia3),
    )


def ranks_within(
    sizes: Mapping[str, tuple[int, int]], allocation: Allocation, config: TrainingConfig
) -> dict[str, int]:
    """The rank of LoRA on each projection: `peft_r`, or the largest with which all adapters fit `adapter_parameters`.

    Within a budget, ranks differ by at most one, the most important projections having the larger one; but none exceeds
    the smaller side of its projection, beyond which LoRA gains nothing.

    Args:
        sizes: inputs and outputs by module name.
        allocation: where adapters go; LoRA's most important first.
        config: gives rank or budget.

    Raises:
        ConfigError: the budget is less than IA3 and LoRA of rank 1 take.
    """
    ranks = dict.fromkeys(allocation.lora, config.peft_r)
    if config.adapter_parameters is None:
        return ranks
    ia3 = sum(sizes[name][1] for name in allocation.ia3)
    least = ia3 + sum(sum(sizes[name]) for name in allocation.lora)
    if config.adapter_parameters < least:
        raise ConfigError(
            f"adapter_parameters: {config.adapter_parameters} is less than the {least} that IA3 on "
            f"{len(allocation.ia3)} and LoRA of rank 1 on {len(allocation.lora)} projections take"
        )
    left = config.adapter_parameters - ia3
    ranks = dict.fromkeys(allocation.lora, 0)
    growing = list(allocation.lora)
    while growing:
        grown = []
        for name in growing:
            if sum(sizes[name]) <= left:
                ranks[name], left = ranks[name] + 1, left - sum(sizes[name])
                grown.append(name)
        if len(grown) < len(growing):
            break
        growing = [name for name in grown if ranks[name] < min(sizes[name])]
    return ranks


def ranks_by_worth(
    sizes: Mapping[str, tuple[int, int]],
    allocation: Allocation,
    config: TrainingConfig,
    spectra: Mapping[str, Spectrum],
) -> dict[str, int]:
    """The rank of LoRA on each projection, within the budget of `ranks_within`: one, and whatever ranks are worth most.

    Args:
        sizes: inputs and outputs by module name.
        allocation: where adapters go.
        config: gives the budget; without `adapter_parameters` it is what `peft_r` on all of them would train.
        spectra: what ranks are worth, by module name.

    Raises:
        ConfigError: the budget is less than IA3 and LoRA of rank 1 take.
    """
    ranks_within(sizes, allocation, config)  # refuses what is too little
    if config.adapter_parameters is None:
        left = config.peft_r * sum(sum(sizes[name]) for name in allocation.lora)
    else:
        left = config.adapter_parameters - sum(sizes[name][1] for name in allocation.ia3)
    ranks = dict.fromkeys(allocation.lora, 1)
    left -= sum(sum(sizes[name]) for name in ranks)
    more = [(float(worth), name) for name in ranks for worth in spectra[name].worth[1 : min(sizes[name])]]
    for _, name in sorted(more, key=lambda one: (-one[0], one[1])):
        if sum(sizes[name]) <= left:
            ranks[name], left = ranks[name] + 1, left - sum(sizes[name])
    return ranks


def inject_adapters(
    model: MambaLM,
    allocation: Allocation,
    config: TrainingConfig,
    generator: torch.Generator,
    spectra: Mapping[str, Spectrum] | None = None,
) -> dict[str, PeftConfig]:
    """Adds fresh adapters to a model, in place, under the names `lora` and `ia3`.

    Two names on disjoint modules keep both trainable; one name for both would mix them up.

    Args:
        model: gets the adapters.
        allocation: where.
        config: rank or budget, alpha and dropout.
        generator: of LoRA's initial values.
        spectra: of the weights' gradients, where ranks or first directions go by them.

    Returns:
        The configurations by adapter name.

    Raises:
        ConfigError: the budget is too small.
    """
    configs: dict[str, PeftConfig] = {}
    sizes = _sizes(model, (*allocation.lora, *allocation.ia3))
    ranks = ranks_within(sizes, allocation, config)  # refuses a budget that is too small, whatever it is spent on
    if allocation.lora:
        if spectra and config.importance == "spectrum" and config.allocation == "importance":
            ranks = ranks_by_worth(sizes, allocation, config, spectra)
        rank = min(ranks.values())
        larger = {name: r for name, r in ranks.items() if r > rank}
        scale = config.peft_alpha / config.peft_r  # the same, whatever the ranks are
        configs["lora"] = LoraConfig(
            r=rank,
            lora_alpha=config.peft_alpha if rank == config.peft_r else scale * rank,
            rank_pattern=larger,
            alpha_pattern={name: scale * r for name, r in larger.items()},
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
    if spectra and config.lora_init == "gradient":
        _begin_along_gradients(model, allocation.lora, spectra)
    return configs


@torch.no_grad()
def _begin_along_gradients(model: MambaLM, names: Sequence[str], spectra: Mapping[str, Spectrum]) -> None:
    """Gives A the leading directions of the gradients, as long as the rows that it was drawn with; B stays zero."""
    for name in names:
        a = model.get_parameter(f"{name}.lora_A.lora.weight")  # (r, in)
        directions = spectra[name].directions[: a.shape[0]].to(a)
        a[: directions.shape[0]] = directions * a.norm(dim=1).mean()


def _sizes(model: MambaLM, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of projections, by module name."""
    shapes = ((name, model.get_parameter(f"{name}.weight").shape) for name in names)
    return {name: (shape[1], shape[0]) for name, shape in shapes}


def adapter_tensors(model: MambaLM, configs: Mapping[str, PeftConfig]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each adapter, by the names that `PeftModel.save_pretrained` would give them."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name in configs:
        suffixes = {f".lora_A.{name}.weight": ".lora_A.weight", f".lora_B.{name}.weight": ".lora_B.weight"}
        suffixes[f".ia3_l.{name}"] = ".ia3_l"
        tensors[name] = {
            f"base_model.model.{key.removesuffix(suffix)}{saved}": whole(tensor)
            for key, tensor in model.state_dict().items()
            for suffix, saved in suffixes.items()
            if key.endswith(suffix)
        }
    return tensors
