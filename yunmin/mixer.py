"""One Mamba-1 mixer (Gu & Dao 2023, figure 3), with the module names of Hugging Face's `MambaMixer`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from yunmin.config import MambaConfig
from yunmin.scan import carried_convolution, gated_scan


class MambaMixer(nn.Module):
    """Projection, causal convolution, selective scan, gate, projection.

    The projections are called as modules, never through their raw weights, so that adapters on them always take
    effect. `gate_channels` and `gate_states` are the identity here; `yunmin.gated` overrides them.
    """

    def __init__(self, config: MambaConfig, layer: int) -> None:
        super().__init__()
        inner, n = config.d_inner[layer], config.d_state[layer]
        self.split_sizes = [config.dt_rank, n, n]
        self.in_proj = nn.Linear(config.d_model, 2 * inner, bias=config.use_bias)
        self.conv1d = nn.Conv1d(inner, inner, config.d_conv, groups=inner, bias=config.use_conv_bias)
        self.x_proj = nn.Linear(inner, config.dt_rank + 2 * n, bias=False)
        self.dt_proj = nn.Linear(config.dt_rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, n))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.d_model, bias=config.use_bias)

    def gate_channels(self, x: Tensor) -> Tensor:
        """Applies the channel gates to the convolution's activations (B, L, D)."""
        return x

    def gate_states(self, B_ssm: Tensor) -> Tensor:
        """Applies the state gates to the input maps (B, L, N)."""
        return B_ssm

    def forward(
        self, hidden: Tensor, conv_state: Tensor, ssm_state: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the mixer over a sequence from a carried state.

        Args:
            hidden: normalized residual stream (B, L, d).
            conv_state: last K-1 inputs of the convolution (B, D, K-1); not modified.
            ssm_state: state of the scan (B, D, N); not modified.
            lengths: int64 (B,), positions of each row that are real, the rest being padding at its end; None if all.

        Returns:
            Output (B, L, d) and the two states after the last real position.
        """
        x, z = self.in_proj(hidden).chunk(2, dim=-1)  # (B, L, D) each
        x, conv_state = carried_convolution(x, self.conv1d.weight[:, 0], self.conv1d.bias, conv_state, lengths)
        x = self.gate_channels(x)
        dt, B_ssm, C_ssm = self.x_proj(x).split(self.split_sizes, dim=-1)  # (B, L, R), (B, L, N) twice
        A = -torch.exp(self.A_log.to(ssm_state.dtype))
        y, ssm_state = gated_scan(
            x, self.dt_proj(dt), A, self.gate_states(B_ssm), C_ssm, self.D, z, ssm_state, lengths
        )  # (B, L, D)
        return self.out_proj(y), conv_state, ssm_state

    @torch.no_grad()
    def reset_parameters(self, config: MambaConfig, generator: torch.Generator | None) -> None:
        """Mamba's own initialization: A_log = log(1..N), step sizes log-uniform in [time_step_min, time_step_max]."""
        for projection in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5), generator=generator)
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if config.rescale_prenorm_residual:
            self.out_proj.weight /= math.sqrt(config.n_layers)
        bound = 1 / math.sqrt(config.d_conv)
        nn.init.uniform_(self.conv1d.weight, -bound, bound, generator=generator)
        if self.conv1d.bias is not None:
            nn.init.uniform_(self.conv1d.bias, -bound, bound, generator=generator)
        inner, n = self.A_log.shape
        self.A_log.copy_(torch.arange(1, n + 1, dtype=torch.float32).log().expand(inner, n))
        nn.init.ones_(self.D)
        scale = config.dt_rank**-0.5 * config.time_step_scale
        if config.time_step_init_scheme == "constant":
            nn.init.constant_(self.dt_proj.weight, scale)
        else:
            nn.init.uniform_(self.dt_proj.weight, -scale, scale, generator=generator)
        low, high = math.log(config.time_step_min), math.log(config.time_step_max)
        dt = torch.exp(torch.rand(inner, generator=generator) * (high - low) + low).clamp(min=config.time_step_floor)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
