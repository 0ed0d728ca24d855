"""The two sequence operators of a Mamba block, and the one place where their implementation is chosen.

Glossary, used everywhere in this project:

    B  batch                        d  width of the residual stream (`d_model`)
    L  length of the sequence       D  inner width of a layer (`d_inner`)
    V  vocabulary                   N  state size per inner channel (`d_state`)
    K  taps of the convolution      R  rank of the step-size projection (`dt_rank`)

    u      input of the scan (B, L, D)            A  = -exp(A_log), decay rates (D, N)
    delta  step sizes, after softplus (B, L, D)   B_ssm, C_ssm  input and output maps (B, L, N)
    h      state (B, D, N):  h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,   y_t = C_t h_t + D_skip u_t

Backends of the scan: `reference` (a plain loop, the definition), `chunked` (pure torch, memory and backward linear in
L), `cuda` (the kernels of `mamba_ssm` and `causal_conv1d`). `YUNMIN_SCAN=name` or `use_backend(name)` forces one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from yunmin.errors import ConfigError, MissingExtraError, ShapeError
from yunmin.kernels.chunked import chunked_scan
from yunmin.kernels.cuda import CONVOLUTION_TAPS, cuda_convolution, cuda_scan
from yunmin.kernels.reference import reference_scan

logger = logging.getLogger("yunmin.scan")

_SCANS = {"reference": reference_scan, "chunked": chunked_scan, "cuda": cuda_scan}
BACKENDS = tuple(_SCANS)
_forced: list[str] = []


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend within the block.

    Raises:
        ConfigError: there is no backend of that name.
    """
    _require_known(name)
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def choose_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend for inputs: the forced one, else `mamba_ssm`'s on CUDA where installed, else `chunked`.

    `mamba_ssm` has no float64.

    Raises:
        ConfigError: `YUNMIN_SCAN` names an unknown backend.
        MissingExtraError: `cuda` is forced and its packages are missing.
    """
    forced = _forced[-1] if _forced else os.environ.get("YUNMIN_SCAN", "")
    if forced:
        _require_known(forced)
        if forced == "cuda" and not _cuda_kernels_installed():
            raise MissingExtraError("mamba-ssm", "cuda", "the scan backend 'cuda'")
        name = forced
    else:
        fits_cuda = device.type == "cuda" and dtype != torch.float64
        name = "cuda" if fits_cuda and _cuda_kernels_installed() else "chunked"
    _log_choice(name, device.type, bool(forced))
    return name


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor, D_skip: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the selective state-space recurrence (Gu & Dao 2023, eq. 2) over a sequence.

    Computes in float32, or in float64 where the inputs are float64.

    Args:
        u: inputs (B, L, D).
        delta: step sizes after softplus (B, L, D); 0 leaves the state as it is.
        A: decay rates, negative (D, N).
        B_ssm: input maps (B, L, N).
        C_ssm: output maps (B, L, N).
        D_skip: skip weights (D,).
        state: carried state (B, D, N); not modified.

    Returns:
        Outputs (B, L, D) in u's dtype, and the state after the last position (B, D, N).

    Raises:
        ShapeError: the widths disagree; names the argument.
    """
    batch, length, inner = u.shape
    n = A.shape[-1]
    expected = {
        "delta": (delta, (batch, length, inner)),
        "A": (A, (inner, n)),
        "B_ssm": (B_ssm, (batch, length, n)),
        "C_ssm": (C_ssm, (batch, length, n)),
        "D_skip": (D_skip, (inner,)),
        "state": (state, (batch, inner, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    backend = choose_backend(u.device, u.dtype)
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    arguments = [t.to(compute) for t in (u, delta, A, B_ssm, C_ssm, state)]
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = _SCANS[backend](*arguments)
    return (y + D_skip.to(compute) * arguments[0]).to(u.dtype), last_state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU, continuing from carried inputs.

    Runs in `causal_conv1d`'s kernel where the scan's backend is `cuda` and the kernel has that many taps.

    Args:
        x: inputs (B, L, D).
        weight: taps (D, K), the last one for the current position.
        bias: (D,) or None.
        state: the K-1 inputs before x (B, D, K-1); zeros at the start of a sequence.

    Returns:
        Outputs (B, L, D), and all inputs seen (B, K-1+L, D), from which the next state is taken.
    """
    inputs = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)  # (B, K-1+L, D)
    length, taps = x.shape[1], weight.shape[1]
    if taps in CONVOLUTION_TAPS and x.numel() > 0 and choose_backend(x.device, x.dtype) == "cuda":
        return cuda_convolution(inputs, weight, bias), inputs
    total = inputs[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        total = torch.addcmul(total, inputs[:, tap : tap + length], weight[:, tap])
    return F.silu(total if bias is None else total + bias), inputs


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise ConfigError(f"scan backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@functools.cache
def _cuda_kernels_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


@functools.cache
def _log_choice(name: str, device_type: str, forced: bool) -> None:
    logger.info("scan backend %s on %s%s", name, device_type, " (forced)" if forced else "")
