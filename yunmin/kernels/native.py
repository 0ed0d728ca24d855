"""The CPU's kernels as differentiable operators on tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from yunmin.kernels.cpu_convolution import convolution_backward, convolution_forward
from yunmin.kernels.cpu_scan import CHUNK, scan_forward
from yunmin.kernels.cpu_scan_backward import scan_backward
from yunmin.kernels.vector import LANES, LOG2_E
from yunmin.threads import get_threads, run_team

Rows = tuple[np.ndarray[Any, Any], int, int]


def native_scan(
    u: Tensor,
    raw_delta: Tensor,
    A: Tensor,
    B_ssm: Tensor,
    C_ssm: Tensor,
    D_skip: Tensor,
    z: Tensor | None,
    state: Tensor,
    lengths: Tensor | None,
    *,
    is_raw: bool,
) -> tuple[Tensor, Tensor]:
    """The scan with its skip term, with softplus where `is_raw` and the gate where there is a z.

    Arguments and results are those of `yunmin.scan.gated_scan`.
    """
    compute = _compute_dtype(u)
    wide = [t for t in (u, raw_delta, z) if t is not None]
    # the kernels read and write bfloat16 themselves, where all that is wide has it
    if not all(t.dtype == torch.bfloat16 for t in wide):
        wide = [t.to(compute) for t in wide]
    A, B_ssm, C_ssm, D_skip, state = (t.to(compute) for t in (A, B_ssm, C_ssm, D_skip, state))
    gate = wide[2] if len(wide) > 2 else None
    y, last_state = _Scan.apply(  # type: ignore[no-untyped-call]
        wide[0], wide[1], A, B_ssm, C_ssm, D_skip, gate, state, lengths, is_raw, torch.is_grad_enabled()
    )
    return y.to(u.dtype), last_state


def native_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """Outputs of `yunmin.scan.causal_conv1d` (B, L, D); x may be bfloat16."""
    compute = _compute_dtype(x)
    weight, state = weight.to(compute), state.to(compute)
    bias = None if bias is None else bias.to(compute)
    wide = x if x.dtype == torch.bfloat16 else x.to(compute)
    y: Tensor = _Convolution.apply(wide, weight, bias, state)  # type: ignore[no-untyped-call]
    return y.to(x.dtype)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        if x.numel() > 0:
            shape = (*x.shape, weight.shape[1])
            run_team(convolution_forward, *_convolution_operands(x, weight, bias, state), _rows(y), shape)
        ctx.save_for_backward(x, weight, bias, state)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, state = ctx.saved_tensors
        batch, _, inner = x.shape
        n_taps = weight.shape[1]
        blocks = -(-inner // LANES)
        grad_x = torch.empty(x.shape, dtype=x.dtype)
        grad_before = torch.zeros(batch, n_taps - 1, inner, dtype=weight.dtype)
        grad_taps = torch.zeros(batch, n_taps, blocks * LANES, dtype=weight.dtype)
        grad_bias = torch.zeros(batch, blocks * LANES, dtype=weight.dtype)
        if x.numel() > 0:
            run_team(
                convolution_backward,
                *_convolution_operands(x, weight, bias, state),
                _rows(grad_y),
                _rows(grad_x),
                _rows(grad_before),
                _flat(grad_taps),
                _flat(grad_bias),
                np.zeros(batch * blocks * (n_taps - 1) * LANES, _flat(grad_bias).dtype),
                (*x.shape, n_taps),
            )
        return (
            grad_x,
            grad_taps.sum(0)[:, :inner].T.contiguous(),
            None if bias is None else grad_bias.sum(0)[:inner],
            grad_before.transpose(1, 2),
        )


def _convolution_operands(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Any, ...]:
    """The inputs of both kernels, in their form."""
    missing = -weight.shape[0] % LANES
    offsets = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return (
        _rows(x),
        _rows(state.transpose(1, 2)),
        _flat(F.pad(weight.T, (0, missing))),
        _flat(F.pad(offsets, (0, missing))),
    )


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        raw_delta: Tensor,
        A: Tensor,
        B_ssm: Tensor,
        C_ssm: Tensor,
        D_skip: Tensor,
        z: Tensor | None,
        state: Tensor,
        lengths: Tensor | None,
        is_raw: bool,
        is_recorded: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, length, inner = u.shape
        n = A.shape[1]
        blocks = -(-inner // LANES)
        y = torch.empty(u.shape, dtype=u.dtype)
        states = _to_blocks(state)  # (B, blocks, N, LANES)
        # parameters ask for a gradient under no_grad, too
        chunks = -(-length // CHUNK) if is_recorded and any(ctx.needs_input_grad) else 0
        starts = torch.empty(chunks, batch, blocks, n, LANES, dtype=A.dtype)
        if u.numel() > 0:
            run_team(
                scan_forward,
                *_operands(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, lengths),
                _rows(y),
                _flat(states),
                _flat(starts),
                (batch, length, inner, n),
                is_raw,
                z is not None,
            )
        ctx.is_raw = is_raw
        ctx.save_for_backward(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, lengths, starts)
        return y, _from_blocks(states, inner)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        u, raw_delta, A, B_ssm, C_ssm, D_skip, z, lengths, starts = ctx.saved_tensors
        batch, length, inner = u.shape
        n = A.shape[1]
        threads = get_threads()
        adjoints = _to_blocks(grad_last)  # (B, blocks, N, LANES)
        grad_u, grad_raw = torch.empty(u.shape, dtype=u.dtype), torch.empty(u.shape, dtype=u.dtype)
        grad_z = None if z is None else torch.empty(u.shape, dtype=u.dtype)
        grad_B, grad_C = (torch.zeros(threads, batch, length, n, dtype=A.dtype) for _ in range(2))
        grad_A = torch.zeros_like(adjoints)
        grad_D = torch.zeros(batch, adjoints.shape[1], LANES, dtype=A.dtype)
        if u.numel() > 0:
            run_team(
                scan_backward,
                *_operands(u, raw_delta, A, B_ssm, C_ssm, D_skip, z, lengths),
                _flat(starts),
                _rows(grad_y),
                _flat(adjoints),
                _rows(grad_u),
                _rows(grad_raw),
                _rows(grad_u if grad_z is None else grad_z),
                _flat(grad_B),
                _flat(grad_C),
                _flat(grad_A),
                _flat(grad_D),
                (batch, length, inner, n),
                ctx.is_raw,
                z is not None,
                size=threads,
            )
        return (
            grad_u,
            grad_raw,
            _from_blocks(grad_A.sum(0), inner),
            grad_B.sum(0),
            grad_C.sum(0),
            grad_D.sum(0).flatten()[:inner],
            grad_z,
            _from_blocks(adjoints, inner),
            None,
            None,
            None,
        )


def _operands(
    u: Tensor,
    raw_delta: Tensor,
    A: Tensor,
    B_ssm: Tensor,
    C_ssm: Tensor,
    D_skip: Tensor,
    z: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Any, ...]:
    """The inputs of both kernels, in their form."""
    batch, length, inner = u.shape
    if lengths is None:
        lengths = torch.full((batch,), length)
    return (
        _rows(u),
        _rows(raw_delta),
        _rows(u if z is None else z),
        _rows(B_ssm),
        _rows(C_ssm),
        _flat(_to_blocks(A * LOG2_E)),
        _flat(F.pad(D_skip, (0, -inner % LANES))),
        _flat(lengths.to(torch.int64)),
    )


def _rows(tensor: Tensor) -> Rows:
    """(B, L, width) as kernels take it; copied only where numbers of a row are not neighbours."""
    if tensor.stride(2) != 1 and tensor.shape[2] > 1:
        tensor = tensor.contiguous()
    batch_stride, row_stride = tensor.stride(0), tensor.stride(1)
    span = (tensor.shape[0] - 1) * batch_stride + (tensor.shape[1] - 1) * row_stride + tensor.shape[2]
    return _numpy(tensor.as_strided((span if tensor.numel() > 0 else 0,), (1,))), batch_stride, row_stride


def _flat(tensor: Tensor) -> np.ndarray[Any, Any]:
    return _numpy(tensor.contiguous().view(-1))


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _to_blocks(tensor: Tensor) -> Tensor:
    """(..., D, N) -> a new (..., blocks, N, LANES), filled up with zeros."""
    inner = tensor.shape[-2]
    blocks = -(-inner // LANES)
    padded = F.pad(tensor, (0, 0, 0, -inner % LANES)).view(*tensor.shape[:-2], blocks, LANES, tensor.shape[-1])
    return padded.transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _from_blocks(tensor: Tensor, inner: int) -> Tensor:
    """(..., blocks, N, LANES) -> (..., D, N)."""
    return tensor.transpose(-1, -2).flatten(-3, -2)[..., :inner, :].contiguous()
