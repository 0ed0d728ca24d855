"""mamba.py (the package `mambapy`): a parallel scan in plain PyTorch, and a step function."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mambapy.mamba import Mamba, MambaConfig, RMSNorm
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.adapters.contract import Setup, Unavailable


class MambapyLM(nn.Module):
    """Its `lm.LM` line by line, which cannot be imported without mamba_ssm since version 1.2 (through its Mamba-2)."""

    def __init__(self, config: Any, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps, config.mup)
        self.lm_head = nn.Linear(config.d_model, vocab_size, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (B, L) -> logits (B, L, V)."""
        logits: Tensor = self.lm_head(self.norm_f(self.mamba(self.embedding(tokens))))
        return logits

    def step(self, token: Tensor, caches: list[Any]) -> tuple[Tensor, list[Any]]:
        """Ids (B,) and caches of all layers -> logits (B, V) and the next caches."""
        hidden, caches = self.mamba.step(self.embedding(token), caches)
        return self.lm_head(self.norm_f(hidden)), caches


def load_mambapy(folder: str) -> MambapyLM:
    """Its language model with the weights of a Hugging Face folder.

    Raises:
        Unavailable: its configuration cannot express this model.
    """
    raw = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    d_model, d_inner = raw["hidden_size"], raw["intermediate_size"]
    if not isinstance(d_inner, int) or d_inner % d_model:
        raise Unavailable(f"mambapy takes d_inner as a whole multiple of d_model {d_model} only, found {d_inner}")
    config = MambaConfig(
        d_model=d_model,
        n_layers=raw["num_hidden_layers"],
        dt_rank=raw["time_step_rank"],
        d_state=raw["state_size"],
        expand_factor=d_inner // d_model,
        d_conv=raw["conv_kernel"],
        rms_norm_eps=raw["layer_norm_epsilon"],
        bias=raw["use_bias"],
        conv_bias=raw["use_conv_bias"],
    )
    with torch.device("meta"):
        model = MambapyLM(config, raw["vocab_size"])
    renamed = {_its_name(name): tensor for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    renamed.setdefault("lm_head.weight", renamed["embedding.weight"])
    model.load_state_dict(renamed, assign=True)
    model.requires_grad_(True)
    if raw["tie_word_embeddings"]:
        model.lm_head.weight = model.embedding.weight
    return model


class MambapyEngine:
    """See `Engine`. Its forward keeps no state, so a text that was read at once cannot be continued."""

    can_continue = False

    def __init__(self, setup: Setup) -> None:
        self.folder = setup.model
        self.versions = {"mambapy": mambapy_version(), "torch": torch.__version__}
        torch.set_num_threads(setup.threads)

    def load(self) -> None:
        self.model = load_mambapy(self.folder).eval()

    def start(self, batch_size: int) -> None:
        config = self.model.config
        empty = torch.zeros(batch_size, config.d_inner, config.d_conv - 1)
        self.caches: list[Any] = [(None, empty.clone()) for _ in range(config.n_layers)]

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int]) -> None:
        hidden = self.model.mamba(self.model.embedding(torch.tensor([list(token_ids)])))  # (1, L, d)
        self._logits: Tensor = self.model.lm_head(self.model.norm_f(hidden[:, -1]))  # the head once, as others do

    @torch.inference_mode()
    def step(self, token_ids: Sequence[int]) -> None:
        self._logits, self.caches = self.model.step(torch.tensor(list(token_ids)), self.caches)

    def logits(self) -> list[float]:
        values: list[float] = self._logits[0].tolist()
        return values


def mambapy_version() -> str:
    return version("mambapy")


def _its_name(name: str) -> str:
    name = name.replace("backbone.embeddings", "embedding").replace("backbone.norm_f", "norm_f")
    return name.replace("backbone.layers", "mamba.layers")
