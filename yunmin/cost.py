"""What a model costs, counted from its config: parameters, FLOPs per token, bytes of state."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from yunmin.axes import expected_shapes
from yunmin.config import MambaConfig
from yunmin.quantization.layout import FLOAT32, Quantization, stored_bytes


@dataclass(frozen=True)
class Cost:
    """The size of a model.

    Attributes:
        parameters: numbers stored; a tied head counts once.
        weight_bytes: of the tensors in the file: in fp32, or quantized with scales and padding.
        flops_per_token: floating-point operations of one decode step, a multiply-add being two.
        state_bytes: of one sequence's fp32 state.
    """

    parameters: int
    weight_bytes: int
    flops_per_token: int
    state_bytes: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def cost_of(config: MambaConfig, quantization: Quantization = FLOAT32) -> Cost:
    """Counts a model from its config and how its weights are stored."""
    parameters = sum(math.prod(shape) for shape in expected_shapes(config).values())
    d, rank, taps = config.d_model, config.dt_rank, config.d_conv
    flops = 2 * config.vocab_size * d + 4 * d  # head and final norm
    state = 0
    for inner, n in zip(config.d_inner, config.d_state, strict=True):
        projections = 2 * (d * 2 * inner + inner * (rank + 2 * n) + rank * inner + inner * d)
        convolution = 2 * taps * inner + 5 * inner  # taps, SiLU
        # per channel and state: delta*A, exp, decay*h, du*B, add, h*C, add; per channel: softplus, du, skip, gate
        scan = 7 * inner * n + 12 * inner
        flops += projections + convolution + scan + 5 * d  # norm and residual
        state += inner * (taps - 1 + n)
    return Cost(parameters, stored_bytes(config, quantization), flops, 4 * state)
