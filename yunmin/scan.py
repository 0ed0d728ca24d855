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
L), `native` (this project's kernels for CPUs, likewise linear), `cuda` (the kernels of `mamba_ssm` and
`causal_conv1d`). `YUNMIN_SCAN=name` or `use_backend(name)` forces one.
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
BACKENDS = ("reference", "chunked", "native", "cuda")
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
    """The backend for inputs: the forced one, else `native` on the CPU, `mamba_ssm`'s on CUDA, else `chunked`.

    `mamba_ssm` may not be installed, and has no float64.

    Raises:
        ConfigError: `YUNMIN_SCAN` names an unknown backend, or `native` is forced elsewhere than on the CPU.
        MissingExtraError: `cuda` is forced and its packages are missing.
    """
    forced = _forced[-1] if _forced else os.environ.get("YUNMIN_SCAN", "")
    if forced:
        _require_known(forced)
        if forced == "cuda" and not _cuda_kernels_installed():
            raise MissingExtraError("mamba-ssm", "cuda", "the scan backend 'cuda'")
        if forced == "native" and device.type != "cpu":
            raise ConfigError(f"the scan backend 'native' computes on the CPU, the inputs are on {device}")
        name = forced
    elif device.type == "cpu":
        name = "native"
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
    _check_shapes("selective_scan", u, A, B_ssm, C_ssm, D_skip, state, delta=delta)
    backend = choose_backend(u.device, u.dtype)
    if backend == "native":
        from yunmin.kernels.native import native_scan

        return native_scan(u, delta, A, B_ssm, C_ssm, D_skip, None, state, None, is_raw=False)
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    arguments = [t.to(compute) for t in (u, delta, A, B_ssm, C_ssm, state)]
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = _SCANS[backend](*arguments)
    return (y + D_skip.to(compute) * arguments[0]).to(u.dtype), last_state


def gated_scan(
    u: Tensor,
    raw_delta: Tensor,
    A: Tensor,
    B_ssm: Tensor,
    C_ssm: Tensor,
    D_skip: Tensor,
    z: Tensor,
    state: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan of `softplus(raw_delta)` with its outputs multiplied by SiLU(z); one kernel where the backend has it.

    Computes in float32, or in float64 where the inputs are float64.

    Args:
        u: inputs (B, L, D).
        raw_delta: step sizes before softplus (B, L, D).
        A: decay rates, negative (D, N).
        B_ssm: input maps (B, L, N).
        C_ssm: output maps (B, L, N).
        D_skip: skip weights (D,).
        z: gates before SiLU (B, L, D).
        state: carried state (B, D, N); not modified.
        lengths: int64 (B,), positions of each row that are real; None if all. The others leave the state as it is,
            whatever their inputs are, and their outputs are zero.

    Returns:
        Outputs (B, L, D) in u's dtype, and the state after each row's last real position (B, D, N).

    Raises:
        ShapeError: the widths disagree; names the argument.
    """
    _check_shapes("gated_scan", u, A, B_ssm, C_ssm, D_skip, state, raw_delta=raw_delta, z=z)
    if lengths is not None and lengths.shape != u.shape[:1]:
        raise ShapeError(f"gated_scan: lengths has shape {tuple(lengths.shape)}, expected {tuple(u.shape[:1])}")
    if choose_backend(u.device, u.dtype) == "native":
        from yunmin.kernels.native import native_scan

        return native_scan(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, state, lengths, is_raw=True)
    compute = torch.float64 if u.dtype == torch.float64 else torch.float32
    if lengths is not None:
        is_padding = (torch.arange(u.shape[1], device=u.device) >= lengths[:, None])[..., None]  # (B, L, 1)
        # zeros, so that NaN in padding turns into no NaN times zero, backward neither
        u, raw_delta, B_ssm, C_ssm, z = (t.masked_fill(is_padding, 0.0) for t in (u, raw_delta, B_ssm, C_ssm, z))
        delta = F.softplus(raw_delta.to(compute)).masked_fill(is_padding, 0.0)  # a step of zero keeps the state
    else:
        delta = F.softplus(raw_delta.to(compute))
    y, last_state = selective_scan(u.to(compute), delta, A, B_ssm, C_ssm, D_skip, state)
    return (y * F.silu(z.to(compute))).to(u.dtype), last_state


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU, continuing from carried inputs.

    Args:
        x: inputs (B, L, D).
        weight: taps (D, K), the last one for the current position.
        bias: (D,) or None.
        state: the K-1 inputs before x (B, D, K-1); zeros at the start of a sequence.

    Returns:
        Outputs (B, L, D), and all inputs seen (B, K-1+L, D), from which the next state is taken.
    """
    return _convolve(x, weight, bias, state), _all_inputs(x, state)


def carried_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `causal_conv1d`, but returns the next state, and copies no more of the inputs than that.

    Args:
        x: as in `causal_conv1d`.
        weight: likewise.
        bias: likewise.
        state: likewise; not modified.
        lengths: int64 (B,), positions of each row that are real; None if all.

    Returns:
        Outputs (B, L, D), and the inputs of each row's last K-1 real positions (B, D, K-1) in the state's dtype.
    """
    return _convolve(x, weight, bias, state), _last_inputs(x, state, lengths)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    backend = choose_backend(x.device, x.dtype)
    if backend == "native":
        from yunmin.kernels.native import native_convolution

        return native_convolution(x, weight, bias, state)
    inputs = _all_inputs(x, state)
    length, taps = x.shape[1], weight.shape[1]
    if backend == "cuda" and taps in CONVOLUTION_TAPS and x.numel() > 0:
        return cuda_convolution(inputs, weight, bias)
    total = inputs[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        total = torch.addcmul(total, inputs[:, tap : tap + length], weight[:, tap])
    return F.silu(total if bias is None else total + bias)


def _all_inputs(x: Tensor, state: Tensor) -> Tensor:
    """The carried inputs and x (B, K-1+L, D)."""
    return torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)


def _last_inputs(x: Tensor, state: Tensor, lengths: Tensor | None) -> Tensor:
    """The last K-1 real ones of the carried inputs and x, as a state of its own (B, D, K-1)."""
    count, length = state.shape[2], x.shape[1]
    if lengths is None:
        new = x[:, max(0, length - count) :].transpose(1, 2).to(state.dtype)
        return torch.cat([state[:, :, length:], new], dim=2)
    rows = lengths[:, None] + torch.arange(count, device=x.device)  # (B, K-1), counted from the first carried input
    rows = rows[..., None].expand(-1, -1, x.shape[2])  # (B, K-1, D)
    carried = state.transpose(1, 2).gather(1, rows.clamp(max=count - 1))
    if length == 0:
        return carried.transpose(1, 2).contiguous()
    new = x.gather(1, (rows - count).clamp(min=0)).to(state.dtype)
    return torch.where(rows < count, carried, new).transpose(1, 2).contiguous()


def _check_shapes(
    caller: str,
    u: Tensor,
    A: Tensor,
    B_ssm: Tensor,
    C_ssm: Tensor,
    D_skip: Tensor,
    state: Tensor,
    **like_u: Tensor,
) -> None:
    batch, length, inner = u.shape
    n = A.shape[-1]
    expected = {name: (tensor, (batch, length, inner)) for name, tensor in like_u.items()} | {
        "A": (A, (inner, n)),
        "B_ssm": (B_ssm, (batch, length, n)),
        "C_ssm": (C_ssm, (batch, length, n)),
        "D_skip": (D_skip, (inner,)),
        "state": (state, (batch, inner, n)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ShapeError(f"{caller}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _require_known(name: str) -> None:
    if name not in BACKENDS:
        raise ConfigError(f"scan backend must be one of {', '.join(BACKENDS)}, got {name!r}")


@functools.cache
def _cuda_kernels_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "causal_conv1d"))


@functools.cache
def _log_choice(name: str, device_type: str, forced: bool) -> None:
    logger.info("scan backend %s on %s%s", name, device_type, " (forced)" if forced else "")
