"""The selective scan in pure torch, with memory and backward linear in L.

The sequence is cut into chunks whose (T, B, D, N) work tensors stay small. Within a chunk everything but the
recurrence itself is one large operation. The forward keeps only the state at each chunk's start; the backward
recomputes a chunk's states from it, then runs the adjoint recurrence g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_WORK_NUMBERS = 1 << 19  # numbers in one work tensor: 2 MB in fp32, measured fastest on a 2-core machine


def chunked_scan(
    u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The scan without its skip term; arguments and results are those of `yunmin.scan.selective_scan`."""
    y, last_state = _ChunkedScan.apply(u, delta, A, B_ssm, C_ssm, state)  # type: ignore[no-untyped-call]
    return y, last_state


def _chunk_length(batch: int, inner: int, n: int) -> int:
    return max(1, min(64, _WORK_NUMBERS // max(1, batch * inner * n)))


def _time_major(x: Tensor) -> Tensor:
    """(B, L, ...) -> (L, B, ...), copied once so that no chunk is copied again."""
    return x.transpose(0, 1).contiguous()


def _run_chunk(du: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """States and decays of one chunk, both (T, B, N, D), from time-major inputs, A (N, D) and a start (B, N, D)."""
    decay = torch.exp(delta.unsqueeze(2) * A)  # (T, B, N, D)
    states = du.unsqueeze(2) * B_ssm.unsqueeze(3)  # increments first, turned into states in place
    previous = start
    for t in range(states.shape[0]):
        previous = states[t].addcmul_(decay[t], previous)
    return states, decay


def _contract_state(states: Tensor, maps: Tensor) -> Tensor:
    """Sums over N: (T, B, N, D) with (T, B, N) -> (T, B, D)."""
    return torch.matmul(maps.unsqueeze(2), states).squeeze(2)


def _contract_inner(states: Tensor, inner: Tensor) -> Tensor:
    """Sums over D: (T, B, N, D) with (T, B, D) -> (T, B, N)."""
    return torch.matmul(states, inner.unsqueeze(3)).squeeze(3)


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B_ssm: Tensor, C_ssm: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, length, inner = u.shape
        step = _chunk_length(batch, inner, A.shape[1])
        delta_t, B_t, C_t = (_time_major(x) for x in (delta, B_ssm, C_ssm))
        du = delta_t * _time_major(u)  # (L, B, D)
        A_t = A.T.contiguous()  # (N, D)
        y = torch.empty_like(u, memory_format=torch.contiguous_format)
        starts = []
        last = state.transpose(1, 2).contiguous()  # (B, N, D)
        for begin in range(0, length, step):
            chunk = slice(begin, begin + step)
            starts.append(last)
            states, _ = _run_chunk(du[chunk], delta_t[chunk], A_t, B_t[chunk], last)  # (T, B, N, D)
            y[:, chunk] = _contract_state(states, C_t[chunk]).transpose(0, 1)
            last = states[-1].clone()  # not a view, which would keep the whole chunk alive
        ctx.step = step
        ctx.save_for_backward(u, delta, A_t, B_ssm, C_ssm, *starts)
        return y, last.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
        u, delta, A_t, B_ssm, C_ssm, *starts = ctx.saved_tensors
        delta_t, u_t, B_t, C_t, dy_t = (_time_major(x) for x in (delta, u, B_ssm, C_ssm, grad_y))
        du = delta_t * u_t  # (L, B, D)
        grad_du, grad_delta = torch.empty_like(du), torch.empty_like(du)
        grad_B = torch.empty(B_t.shape, dtype=u.dtype, device=u.device)
        grad_C = torch.empty_like(grad_B)
        grad_A = torch.zeros_like(A_t)
        carried = grad_last.transpose(1, 2)  # dLoss/dh at the end of the chunk, without that position's own output
        for index in reversed(range(len(starts))):
            chunk = slice(index * ctx.step, (index + 1) * ctx.step)
            start = starts[index]
            states, decay = _run_chunk(du[chunk], delta_t[chunk], A_t, B_t[chunk], start)
            grad_C[chunk] = _contract_inner(states, dy_t[chunk])
            adjoint = dy_t[chunk].unsqueeze(2) * C_t[chunk].unsqueeze(3)  # (T, B, N, D)
            for t in reversed(range(adjoint.shape[0])):
                carried = adjoint[t].add_(carried).mul(decay[t])
            grad_B[chunk] = _contract_inner(adjoint, du[chunk])
            grad_du[chunk] = _contract_state(adjoint, B_t[chunk])
            # gradient of the exponent delta*A: adjoint * h_{t-1} * decay
            exponent = adjoint.mul_(decay)
            exponent[1:].mul_(states[:-1])
            exponent[0].mul_(start)
            torch.mul(exponent, A_t, out=decay)  # the decay is not needed any more: its memory is
            torch.sum(decay, 2, out=grad_delta[chunk])
            grad_A += torch.mul(exponent, delta_t[chunk].unsqueeze(2), out=decay).sum((0, 1))
        grad_u = grad_du * delta_t
        grad_delta += grad_du * u_t
        to_batch_major = [g.transpose(0, 1) for g in (grad_u, grad_delta, grad_B, grad_C)]
        grad_state = carried.transpose(1, 2)
        return to_batch_major[0], to_batch_major[1], grad_A.T, to_batch_major[2], to_batch_major[3], grad_state
