"""The kernels of `mamba_ssm` and `causal_conv1d`, called with activations so that adapters always take effect.

The fused `mamba_inner_fn` is not used: it reads raw projection weights and would bypass LoRA. The packages cannot be
imported without a GPU, hence only inside the functions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CONVOLUTION_TAPS = (2, 3, 4)  # what causal_conv1d is compiled for
_CORRECTION_NUMBERS = 1 << 26  # numbers in a work tensor of the initial state's correction


def cuda_scan(
    u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan without its skip term; arguments (float32) and results are those of `yunmin.scan.selective_scan`.

    One position uses `selective_state_update`. A longer sequence uses `selective_scan_fn`, which starts from zero;
    the carried state's share, exp(A * sum of delta) applied to it, is exact and added afterwards.
    """
    if u.numel() == 0:
        return torch.zeros_like(u), state.clone()
    if u.shape[1] == 1 and not torch.is_grad_enabled():
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        last_state = state.clone()
        y = selective_state_update(last_state, u[:, 0], delta[:, 0], A, B_ssm[:, 0], C_ssm[:, 0])  # (B, D)
        return y.unsqueeze(1), last_state

    y, last_state = _scan_from_zero(u, delta, A, B_ssm, C_ssm)
    if state.requires_grad or bool(state.any()):
        share, decayed = _carried_share(delta, A, C_ssm, state)
        y, last_state = y + share, last_state + decayed
    return y, last_state


def _scan_from_zero(u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, L, D) and the last state (B, D, N), both differentiable."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    length, n = u.shape[1], A.shape[1]
    needs_gradient = torch.is_grad_enabled()
    if needs_gradient:
        # The kernel has no gradient for the state it returns. N more steps of size zero read it out as outputs
        # instead, one column each, since C picks the column and a step of size zero changes nothing.
        u, delta, B_ssm = (F.pad(x, (0, 0, 0, n)) for x in (u, delta, B_ssm))
        columns = torch.eye(n, dtype=C_ssm.dtype, device=C_ssm.device).expand(C_ssm.shape[0], n, n)
        C_ssm = torch.cat([C_ssm, columns], dim=1)
    channel_major = [x.transpose(1, 2).contiguous() for x in (u, delta, B_ssm, C_ssm)]
    y, last_state = selective_scan_fn(
        channel_major[0], channel_major[1], A, channel_major[2], channel_major[3], return_last_state=True
    )  # (B, D, L), (B, D, N)
    if needs_gradient:
        y, last_state = y[:, :, :length], y[:, :, length:]
    return y.transpose(1, 2), last_state


def _carried_share(delta: Tensor, A: Tensor, C_ssm: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """What a carried state adds to the outputs (B, L, D) and to the last state (B, D, N)."""
    elapsed = delta.cumsum(1)  # (B, L, D)
    length = max(1, _CORRECTION_NUMBERS // state.numel())
    shares = []
    for begin in range(0, delta.shape[1], length):
        decay = torch.exp(elapsed[:, begin : begin + length, :, None] * A)  # (B, T, D, N)
        shares.append(torch.einsum("btdn,bdn,btn->btd", decay, state, C_ssm[:, begin : begin + length]))
    return torch.cat(shares, dim=1), state * torch.exp(elapsed[:, -1, :, None] * A)


def cuda_convolution(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution and SiLU over inputs that begin with the K-1 carried ones: (B, K-1+L, D) -> (B, L, D)."""
    from causal_conv1d import causal_conv1d_fn

    channel_major = inputs.transpose(1, 2).contiguous()  # (B, D, K-1+L)
    y: Tensor = causal_conv1d_fn(channel_major, weight, bias, activation="silu")
    return y[:, :, weight.shape[1] - 1 :].transpose(1, 2)
