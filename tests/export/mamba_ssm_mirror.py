"""The modules of `mamba_ssm`, which does not import without a GPU: their names, shapes and keywords."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Mixer(nn.Module):
    """The parameters of `mamba_ssm.modules.mamba_simple.Mamba`, made as that class makes them."""

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        rank = -(-d_model // 16) if isinstance(dt_rank, str) else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        torch.zeros(1, d_model * expand, d_state)  # as it allocates the states of a generation


class Block(nn.Module):
    def __init__(self, d_model: int, ssm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model)
        self.mixer = Mixer(d_model, **ssm_cfg)


class Backbone(nn.Module):
    def __init__(self, d_model: int, n_layer: int, vocab_size: int, ssm_cfg: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList([Block(d_model, ssm_cfg) for _ in range(n_layer)])
        self.norm_f = nn.RMSNorm(d_model)


class MambaLMHeadModel(nn.Module):
    """The names and shapes of `mamba_ssm`'s class of this name; its keywords are its config's keys, and no others."""

    def __init__(
        self,
        *,
        d_model: int,
        n_layer: int,
        vocab_size: int,
        ssm_cfg: dict[str, Any],
        rms_norm: bool,
        residual_in_fp32: bool,
        fused_add_norm: bool,
        pad_vocab_size_multiple: int,
        tie_embeddings: bool = True,
    ) -> None:
        super().__init__()
        assert rms_norm
        assert isinstance(residual_in_fp32, bool)
        assert fused_add_norm
        if vocab_size % pad_vocab_size_multiple != 0:
            vocab_size += pad_vocab_size_multiple - (vocab_size % pad_vocab_size_multiple)
        self.backbone = Backbone(d_model, n_layer, vocab_size, ssm_cfg)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
