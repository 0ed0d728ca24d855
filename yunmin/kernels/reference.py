"""The recurrence as it is written in the paper: slow, obvious, and what every other implementation must equal."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One position after the other, differentiated by autograd; without the skip term.

    Arguments and results are those of `yunmin.scan.selective_scan`.
    """
    outputs = []
    for t in range(u.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * A)  # (B, D, N)
        increment = (delta[:, t] * u[:, t])[:, :, None] * B_ssm[:, t, None, :]  # (B, D, N)
        state = decay * state + increment
        outputs.append((state * C_ssm[:, t, None, :]).sum(-1))  # (B, D)
    if not outputs:
        return torch.zeros_like(u), state
    return torch.stack(outputs, dim=1), state  # (B, L, D)
