"""What this machine can do at most: bytes read per second, and products of matrices per second by number format.

A figure of a model means little without them. Each is the best of several ways to do the same with libraries, and the
best of several repeats: a limit is what is possible, so a disturbance may only lower it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.cost import cost_of

_READ_BYTES = 2**29  # far more than any cache
_WIDTH = 2048
_REPEATS = 5

Operation = Callable[[], object]


@dataclass(frozen=True)
class Limits:
    """The machine's limits with some number of threads.

    Attributes:
        threads: that were used.
        read_bytes_per_s: of a long read from memory.
        flops_per_s: of matrix products, a multiply-add being two, by format: "fp32", "bf16", "int8".
        best_way: what reached each of them.
    """

    threads: int
    read_bytes_per_s: float
    flops_per_s: dict[str, float]
    best_way: dict[str, str]

    def best_of(self, other: Limits) -> Limits:
        """The higher figure of two measurements, each."""
        read_first = self.read_bytes_per_s >= other.read_bytes_per_s
        flops, ways = {}, {"read": (self if read_first else other).best_way["read"]}
        for name in self.flops_per_s:
            first = self.flops_per_s[name] >= other.flops_per_s[name]
            flops[name] = (self if first else other).flops_per_s[name]
            ways[name] = (self if first else other).best_way[name]
        return Limits(self.threads, max(self.read_bytes_per_s, other.read_bytes_per_s), flops, ways)


@dataclass(frozen=True)
class Traffic:
    """What one token costs at least, whatever computes it; from the shape alone.

    Attributes:
        state_bytes: of one sequence, fp32; a step reads it and writes it.
        layer_flops: of the projections of all layers, per token.
        head_flops: of the head, per token that needs logits.
    """

    state_bytes: int
    layer_flops: int
    head_flops: int

    @classmethod
    def of(cls, config: MambaConfig) -> Traffic:
        d, rank = config.d_model, config.dt_rank
        pairs = zip(config.d_inner, config.d_state, strict=True)
        layers = sum(3 * d * inner + inner * (2 * rank + 2 * n) for inner, n in pairs)
        return cls(cost_of(config).state_bytes, 2 * layers, 2 * config.vocab_size * d)


def decode_limit(limits: Limits, traffic: Traffic, batch_size: int, *, weight_bytes: int, product: str) -> float:
    """Tokens per second of a batch at most: reading weights and states, or the products, whichever takes longer.

    Args:
        limits: of the machine.
        traffic: of the model.
        batch_size: sequences that advance together.
        weight_bytes: that every step reads.
        product: format in which matrices are multiplied, a key of `Limits.flops_per_s`.
    """
    read_s = (weight_bytes + 2 * batch_size * traffic.state_bytes) / limits.read_bytes_per_s
    product_s = batch_size * (traffic.layer_flops + traffic.head_flops) / limits.flops_per_s[product]
    return batch_size / max(read_s, product_s)


def prefill_limit(limits: Limits, traffic: Traffic, length: int, *, product: str) -> float:
    """Tokens per second at most: the products of the projections, and of the head once; the scan counts as free."""
    flops = length * traffic.layer_flops + traffic.head_flops
    return length * limits.flops_per_s[product] / flops


def measure_limits(threads: int) -> Limits:
    """Measures this machine; takes a few seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces that its quantized tensors will move elsewhere
            read, read_way = _fastest(_reads(_READ_BYTES))
            flops, ways = {}, {"read": read_way}
            for name, products in (("fp32", _float32), ("bf16", _bfloat16), ("int8", _int8)):
                flops[name], ways[name] = _fastest(products(_WIDTH))
    finally:
        torch.set_num_threads(before)
    return Limits(threads, read, flops, ways)


def _reads(size: int) -> Iterator[tuple[str, float, Operation]]:
    data = torch.ones(size // 4)
    integers = data.view(torch.int64)
    yield "torch.sum of float32", size, data.sum
    yield "torch.sum of int64", size, integers.sum
    yield "torch.max of int64", size, integers.max


def _float32(n: int) -> Iterator[tuple[str, float, Operation]]:
    a, b = torch.randn(n, n), torch.randn(n, n)
    yield "torch.mm", 2.0 * n**3, lambda: torch.mm(a, b)
    yield "torch.mm, transposed", 2.0 * n**3, lambda: torch.mm(a, b.t())


def _bfloat16(n: int) -> Iterator[tuple[str, float, Operation]]:
    a, b = torch.randn(n, n).bfloat16(), torch.randn(n, n).bfloat16()
    yield "torch.mm", 2.0 * n**3, lambda: torch.mm(a, b)
    yield "torch.mm, transposed", 2.0 * n**3, lambda: torch.mm(a, b.t())


def _int8(n: int) -> Iterator[tuple[str, float, Operation]]:
    a = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    b = torch.randint(-127, 128, (n, n), dtype=torch.int8)
    yield "torch._int_mm", 2.0 * n**3, lambda: torch._int_mm(a, b.t())
    weight = torch.quantize_per_channel(
        torch.randn(n, n), torch.ones(n), torch.zeros(n, dtype=torch.int64), 0, torch.qint8
    )
    inputs = torch.quantize_per_tensor(torch.randn(n, n), 0.05, 128, torch.quint8)
    engine = torch.backends.quantized.engine
    try:
        for name in torch.backends.quantized.supported_engines:
            if name in ("none", "qnnpack"):  # qnnpack needs inputs of seven bits
                continue
            torch.backends.quantized.engine = name
            packed = torch.ops.quantized.linear_prepack(weight, None)
            yield f"torch quantized linear, {name}", 2.0 * n**3, _Quantized(inputs, packed)
    finally:
        torch.backends.quantized.engine = engine


@dataclass(frozen=True)
class _Quantized:
    inputs: Tensor
    packed: object

    def __call__(self) -> object:
        return torch.ops.quantized.linear(self.inputs, self.packed, 1.0, 128)


def _fastest(operations: Iterator[tuple[str, float, Operation]]) -> tuple[float, str]:
    """Amount per second of the fastest operation, and its name."""
    best, way = 0.0, ""
    for name, amount, operation in operations:
        try:
            operation()
        except (RuntimeError, NotImplementedError):  # not on this machine
            continue
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            operation()
            rate = amount / (time.perf_counter() - begin)
            if rate > best:
                best, way = rate, name
    return best, way


def main(argv: list[str]) -> int:
    """`python -m benchmarks.limits [--threads N]`; prints one JSON object."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = arguments.parse_args(argv)
    print(json.dumps(asdict(measure_limits(options.threads))))
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
