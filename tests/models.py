"""Small models that are never easy: every weight random, gates not binary, adapters far from the identity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yunmin.axes import expected_shapes
from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, save_pillars
from yunmin.tokenizer import Tokenizer

LORA_TARGETS = r".*\.0\.mixer\.(in_proj|x_proj)|.*\.1\.mixer\.dt_proj"
IA3_TARGETS = r".*\.0\.mixer\.out_proj|.*\.1\.mixer\.(in_proj|x_proj)"

TEXT = """The quick brown fox jumps over the lazy dog; 0123456789 times, she said.
def scan(state, inputs):
    for value in inputs:
        state = 0.5 * state + value
    return state
Grüße aus Köln: naïve café, 速い茶色の狐, 👩‍👩‍👧 and 👍🏽 — “done”.
"""


def small_config(**options: Any) -> MambaConfig:
    """Odd widths, biases on: d 24, D 40, N 5, R 3, 2 layers, 300 ids."""
    values: dict[str, Any] = {
        "vocab_size": 300,
        "d_model": 24,
        "d_inner": (40, 40),
        "d_state": (5, 5),
        "dt_rank": 3,
        "use_bias": True,
        "tie_word_embeddings": False,
    }
    return MambaConfig(**values | options)


def random_tensors(config: MambaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a stable model in which every parameter is random: norms, D, biases and A_log, too."""
    rng = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=rng, dtype=torch.float64)
        if name.endswith("A_log"):
            return 0.5 * noise
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            return 1 + 0.3 * noise
        if name.endswith("dt_proj.bias"):
            return noise - 2.5
        if name.endswith("bias"):
            return 0.3 * noise
        if name.endswith("conv1d.weight"):
            return 0.5 * noise
        # deep models stay as well conditioned as shallow ones, so that one tolerance serves both
        gain = 1.5 if "out_proj" not in name else 1.0 / math.sqrt(config.n_layers)
        if "x_proj" in name:
            gain = 1.0
        return noise * (gain / math.sqrt(shape[-1]))

    return {name: draw(name, shape).to(dtype) for name, shape in expected_shapes(config).items()}


def random_model(
    config: MambaConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any
) -> MambaLM:
    """A model of `random_tensors`; `options` are those of `MambaLM.from_tensors`."""
    config = small_config() if config is None else config
    return MambaLM.from_tensors(config, random_tensors(config, seed, dtype), **options)


def random_ids(config: MambaConfig, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids (B, L)."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(config.n_tokens, (batch, length), generator=rng)


def random_pillars(config: MambaConfig, seed: int = 0, *, keep: float = 0.7, masked: bool = False) -> Pillars:
    """Gates that are partly zero and nowhere one, a random scan order, and on request an element mask per layer."""
    rng = torch.Generator().manual_seed(seed)

    def gate(width: int) -> Tensor:
        values = 0.4 + 1.2 * torch.rand(width, generator=rng)
        order = torch.randperm(width, generator=rng)
        values[order[max(1, round(keep * width)) :]] = 0.0
        return values

    shapes = expected_shapes(config)
    names = [f"backbone.layers.{i}.mixer.out_proj.weight" for i in range(config.n_layers)] if masked else []
    return Pillars(
        tuple(gate(inner) for inner in config.d_inner),
        tuple(gate(n) for n in config.d_state),
        tuple(torch.randperm(inner, generator=rng) for inner in config.d_inner),
        {name: torch.rand(shapes[name], generator=rng) < 0.6 for name in names},
    )


def write_adapters(
    folder: Path, config: MambaConfig, seed: int = 0, *, lora: str = LORA_TARGETS, ia3: str = IA3_TARGETS
) -> dict[str, Path]:
    """Writes random LoRA and IA3 adapters on disjoint projections as standard PEFT folders.

    Args:
        folder: of a checkpoint; the adapters go to `adapters/lora` and `adapters/ia3` in it.
        config: of the model.
        seed: of the adapters' values.
        lora: regular expression of the modules that get LoRA.
        ia3: of those that get IA3.

    Returns:
        The two folders by name.
    """
    from peft import IA3Config, LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from torch import nn

    configs = {
        "lora": LoraConfig(r=3, lora_alpha=5, target_modules=lora),
        "ia3": IA3Config(target_modules=ia3, feedforward_modules=[]),
    }
    rng = torch.Generator().manual_seed(seed)
    folders = {}
    for name, adapter in configs.items():
        host = nn.Module()  # without a config, or peft would refuse LoRA on out_proj
        host.backbone = random_model(config).backbone
        inject_adapter_in_model(adapter, host, adapter_name=name)
        for parameter_name, parameter in host.named_parameters():
            if f".{name}" in parameter_name and "lora_" in parameter_name:
                parameter.data = 0.5 * torch.randn(parameter.shape, generator=rng)
            elif f".{name}" in parameter_name and "ia3_" in parameter_name:
                parameter.data = 0.3 + 1.5 * torch.rand(parameter.shape, generator=rng)
        folders[name] = folder / "adapters" / name
        folders[name].mkdir(parents=True)
        _save_adapter(folders[name], adapter, get_peft_model_state_dict(host, adapter_name=name))
    return folders


def trained_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """A byte-level BPE with merges inside and across characters."""
    return Tokenizer.train([TEXT * 4], vocab_size)


def write_model(
    folder: Path,
    config: MambaConfig | None = None,
    seed: int = 0,
    *,
    tokenizer: Tokenizer | None = None,
    pillars: Pillars | None = None,
) -> Path:
    """Writes a random model as a Hugging Face folder, with tokenizer and pillars where given."""
    config = small_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    write_checkpoint(folder, config, random_tensors(config, seed))
    if tokenizer is not None:
        tokenizer.save(folder)
    if pillars is not None:
        save_pillars(folder, pillars)
    return folder


def hf_model(seed: int = 0, **options: Any) -> Any:
    """A `transformers` MambaForCausalLM (fp32, evaluation mode) in which every parameter is random."""
    from transformers import MambaConfig as HFConfig
    from transformers import MambaForCausalLM

    values: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "time_step_rank": 3,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    model = MambaForCausalLM(HFConfig(**values | options)).eval()
    config = MambaConfig.from_dict(model.config.to_dict())
    result = model.load_state_dict(random_tensors(config, seed), strict=False)
    assert not result.unexpected_keys
    assert result.missing_keys in ([], ["lm_head.weight"])  # a tied head follows the embedding
    return model


def _save_adapter(folder: Path, adapter: Any, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    adapter.save_pretrained(str(folder))
    prefixed = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors")
