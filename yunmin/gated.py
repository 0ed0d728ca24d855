"""Mixers with gates: what training learns them in, and what an export is verified against.

Gates are modules that return their values, so that training puts sampled ones in place and `yunmin.trained` fixed
ones. They act where a cut is exact: channels on SiLU(conv(x)) before `x_proj` and the scan, states on B.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from yunmin.config import MambaConfig
from yunmin.mixer import MambaMixer


class FixedGate(nn.Module):
    """A gate that always returns the values it was given; ones by default."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values, persistent=False)

    def forward(self) -> Tensor:
        return self.values


class GatedMixer(MambaMixer):
    """A mixer whose inner channels and state columns pass through gates.

    Attributes:
        channel_gate: returns (D,), multiplied onto SiLU(conv(x)).
        state_gate: returns (N,), multiplied onto B.
        observe: is shown SiLU(conv(x)) (B, L, D) before the gates, where set.
    """

    observe: Callable[[Tensor], None] | None = None

    def __init__(self, config: MambaConfig, layer: int) -> None:
        super().__init__(config, layer)
        # on the CPU even where weights start on `meta`, since gates are not loaded with them
        self.channel_gate: nn.Module = FixedGate(torch.ones(config.d_inner[layer], device="cpu"))
        self.state_gate: nn.Module = FixedGate(torch.ones(config.d_state[layer], device="cpu"))

    def gate_channels(self, x: Tensor) -> Tensor:
        if self.observe is not None:
            self.observe(x)
        gate: Tensor = self.channel_gate()
        return x * gate.to(x.dtype)

    def gate_states(self, B_ssm: Tensor) -> Tensor:
        gate: Tensor = self.state_gate()
        return B_ssm * gate.to(B_ssm.dtype)


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask of its shape; `mask` returns it."""

    def __init__(self, linear: nn.Linear, mask: nn.Module) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.mask = mask

    def forward(self, input: Tensor) -> Tensor:
        mask: Tensor = self.mask()
        return F.linear(input, self.weight * mask.to(self.weight.dtype), self.bias)
