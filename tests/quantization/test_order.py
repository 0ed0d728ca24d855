"""Orders in which groups of int4 weights lose least."""

from __future__ import annotations

import pytest
import torch

from yunmin.quantization.order import Grouped, _Search, quantization_order


def _weight(rows: int, inputs: int, seed: int = 0, *, spread: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=rng) * torch.exp(spread * torch.randn(inputs, generator=rng))


@pytest.mark.parametrize("inputs", [1, 5, 32, 33, 64, 100, 160])
def test_order_is_a_permutation_that_loses_no_more(inputs: int) -> None:
    weights = [Grouped(_weight(20, inputs)), Grouped(_weight(30, inputs, 1), torch.rand(inputs))]
    order = quantization_order(weights)
    assert sorted(order.tolist()) == list(range(inputs))
    assert sum(w.error(order) for w in weights) <= sum(w.error() for w in weights)


def test_channels_of_like_size_come_together() -> None:
    weight = torch.randn(16, 128, generator=torch.Generator().manual_seed(0))
    large = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:32]
    weight[:, large] *= 5
    order = quantization_order([Grouped(weight)])
    groups = [set(group.tolist()) for group in order.split(32)]
    assert set(large.tolist()) in groups
    assert Grouped(weight).error(order) < 0.6 * Grouped(weight).error()


def test_search_improves_on_sorting() -> None:
    weights = [Grouped(_weight(12, 128, seed, spread=0.1)) for seed in range(2)]
    search = _Search(weights)
    by_size = torch.argsort(search.sizes, descending=True)
    found = search.improved(by_size)
    assert sum(w.error(found) for w in weights) < sum(w.error(by_size) for w in weights)


@pytest.mark.parametrize("sizes", [(3, 3), (4, 2), (1, 3), (1, 1)])
def test_gain_of_a_swap_is_what_computing_anew_gives(sizes: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(2)
    a, b = (torch.rand(5, size, generator=rng) for size in sizes)
    h_a, h_b = (torch.rand(size, generator=rng) for size in sizes)

    def loss(x: torch.Tensor, h: torch.Tensor) -> float:
        return float(x.amax(1).sum() * h.sum())

    gain = _Search._gain(a, b, h_a, h_b)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            new_a, new_b, new_h_a, new_h_b = a.clone(), b.clone(), h_a.clone(), h_b.clone()
            new_a[:, i], new_b[:, j], new_h_a[i], new_h_b[j] = b[:, j], a[:, i], h_b[j], h_a[i]
            expected = loss(a, h_a) + loss(b, h_b) - loss(new_a, new_h_a) - loss(new_b, new_h_b)
            assert float(gain[i, j]) == pytest.approx(expected, abs=1e-5)


def test_order_found_is_the_same_each_time() -> None:
    weights = [Grouped(_weight(3000, 64))]  # more rows than are searched
    assert torch.equal(quantization_order(weights), quantization_order(weights))
