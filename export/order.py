"""Other orders of the channels: exact, and measurably better or worse for int4 groups.

The inner order of each layer groups the inputs of `x_proj` and `out_proj`, the order of the residual stream, one for
the model, those of `in_proj`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from export.compact import Compact
from export.statistics import InputStatistics, input_statistics
from export.texts import Text
from yunmin.axes import layer_prefix, take
from yunmin.channel_path import correlation_matrix, nearest_neighbour, two_opt
from yunmin.model import MambaLM
from yunmin.quantization.order import Grouped, quantization_order

OrderKind = Literal["trained", "identity", "random", "correlation", "quantization"]
ORDERS: tuple[str, ...] = get_args(OrderKind)
ORDERS_BY_TEXT = ("correlation", "quantization")
_SEED = 0


def reordered(compact: Compact, kind: OrderKind, text: Text | None, report: Callable[[str], None]) -> Compact:
    """The same function with its inner and residual channels in another order.

    Args:
        compact: in any dtype; not modified.
        kind: "trained" keeps what is there; "identity" has the inner channels ascend as they started; "random" is drawn
            from a fixed seed; "correlation" puts channels of correlated activations side by side, "quantization" those
            that lose least in a group of int4 weights.
        text: activations are observed on; only the last two need it.
        report: told how far it is.
    """
    if kind == "trained":
        return compact
    layers = range(compact.config.n_layers)
    if kind == "identity":
        inner = [torch.argsort(channels) for channels in compact.channels]
        return permuted(compact, inner, torch.argsort(compact.residual))
    if kind == "random":
        rng = torch.Generator().manual_seed(_SEED)
        inner = [torch.randperm(width, generator=rng) for width in compact.config.d_inner]
        return permuted(compact, inner, torch.randperm(compact.config.d_model, generator=rng))
    assert text is not None
    single = compact.cast(torch.float32)
    report(f"observing activations on {text.sequences().numel()} tokens of {text.source}")
    model = MambaLM.from_tensors(single.config, single.tensors)
    statistics = input_statistics(
        model, text.sequences(), second_moments=("x_proj", "in_proj") if kind == "correlation" else ()
    )
    if kind == "correlation":
        report("solving for the correlation order")
        inner = [_correlation_order([statistics[f"{layer_prefix(i)}mixer.x_proj"]]) for i in layers]
        residual = _correlation_order([statistics[f"{layer_prefix(i)}mixer.in_proj"] for i in layers])
        return permuted(compact, inner, residual)
    inner = []
    for i in layers:
        inner.append(quantization_order(_grouped(single, statistics, i, ("x_proj", "out_proj"))))
        report(f"ordered for int4 groups {i + 1} of {len(layers)} layers")
    residual = quantization_order([g for i in layers for g in _grouped(single, statistics, i, ("in_proj",))])
    return permuted(compact, inner, residual)


def permuted(compact: Compact, inner: list[Tensor], residual: Tensor) -> Compact:
    """Bakes a permutation of each layer's inner channels and one of the residual stream into the weights.

    Args:
        compact: not modified.
        inner: per layer, the present channel at each new position, int64 (D,).
        residual: the same for the residual stream, int64 (d,).
    """
    config, tensors = take(compact.config, compact.tensors, "model", residual)
    for layer, order in enumerate(inner):
        config, tensors = take(config, tensors, "inner", order, layer)
    channels = tuple(old[order] for old, order in zip(compact.channels, inner, strict=True))
    return replace(compact, config=config, tensors=tensors, channels=channels, residual=compact.residual[residual])


def _grouped(
    compact: Compact, statistics: dict[str, InputStatistics], layer: int, projections: tuple[str, ...]
) -> list[Grouped]:
    names = [f"{layer_prefix(layer)}mixer.{projection}" for projection in projections]
    return [Grouped(compact.tensors[f"{name}.weight"], statistics[name].mean_squares.float()) for name in names]


def _correlation_order(observed: list[InputStatistics]) -> Tensor:
    """A short path through channels, by the mean of their correlations where several layers share them."""
    parts = [correlation_matrix(o.mean, o.covariance()) for o in observed]
    cost = 1.0 - abs(sum(parts[1:], parts[0]) / len(parts))
    return torch.from_numpy(two_opt(nearest_neighbour(cost, 0), cost))
