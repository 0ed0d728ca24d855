"""An order that lets N:M masks keep more."""

from __future__ import annotations

import itertools

import pytest
import torch

from yunmin.errors import ShapeError
from yunmin.n_of_m_order import n_of_m_order, retained_magnitude


def test_retained_magnitude_is_that_of_the_mask_by_hand() -> None:
    weight = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, -1.0, 1.0]])
    assert retained_magnitude(weight, 2, 4) == pytest.approx((7 + 2) / 12)
    assert retained_magnitude(weight, 1, 2, torch.tensor([0, 2, 1, 3])) == pytest.approx((4 + 3 + 1 + 1) / 12)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4)])
def test_no_single_swap_improves_what_was_found(n: int, m: int) -> None:
    magnitude = torch.rand(5, 16, generator=torch.Generator().manual_seed(n + m)).square()
    found = n_of_m_order([magnitude], n, m)
    for a, b in itertools.combinations(range(16), 2):
        order = found.clone()
        order[[a, b]] = found[[b, a]]
        assert retained_magnitude(magnitude, n, m, order) <= retained_magnitude(magnitude, n, m, found) + 1e-5


def test_an_order_reaches_the_optimum_where_large_channels_start_side_by_side() -> None:
    weight = torch.ones(6, 16) * 0.01
    weight[:, :8] = 1.0  # of the first two groups each keeps only half
    order = n_of_m_order([weight], 2, 4)
    assert sorted(order.tolist()) == list(range(16))
    assert retained_magnitude(weight, 2, 4) == pytest.approx((4 + 4 * 0.01) / (8 + 8 * 0.01))
    assert retained_magnitude(weight, 2, 4, order) == pytest.approx(8 / (8 + 8 * 0.01))


def test_random_weights_keep_more_than_as_they_are_and_each_weight_counts_alike() -> None:
    rng = torch.Generator().manual_seed(0)
    scale = torch.rand(64, generator=rng) * 3
    small, large = torch.randn(40, 64, generator=rng) * scale, 1000 * torch.randn(24, 64, generator=rng)
    order = n_of_m_order([small, large], 2, 4)
    for weight in (small, large):
        assert retained_magnitude(weight, 2, 4, order) > retained_magnitude(weight, 2, 4) + 0.005
    alone = n_of_m_order([small], 2, 4)
    assert retained_magnitude(small, 2, 4, alone) > retained_magnitude(small, 2, 4, order)
    assert torch.equal(n_of_m_order([small, large], 2, 4), order)


def test_columns_that_make_no_groups_are_refused() -> None:
    with pytest.raises(ShapeError, match="a multiple of 4 columns, got 6"):
        n_of_m_order([torch.ones(2, 6)], 2, 4)
