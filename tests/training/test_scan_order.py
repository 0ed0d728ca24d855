"""Pillar 1: statistics, solution and life of a scan order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from training.scan_order import VariableScanOptimizer
from yunmin.channel_path import nearest_neighbour, path_cost, two_opt
from yunmin.errors import ShapeError, YunminError


def correlated(channels: int, seed: int = 0, batch: int = 4, length: int = 50) -> torch.Tensor:
    """Activations (B, L, D) whose channels share a few hidden signals."""
    rng = torch.Generator().manual_seed(seed)
    signals = torch.randn(batch, length, 3, generator=rng)
    mixing = torch.randn(3, channels, generator=rng)
    return signals @ mixing + 0.1 * torch.randn(batch, length, channels, generator=rng) + 5.0


def test_correlations_accumulated_over_batches_equal_those_of_all_data() -> None:
    optimizer = VariableScanOptimizer(7, update_frequency=100)
    batches = [correlated(7, seed, length=length) for seed, length in enumerate((50, 1, 13))]
    for batch in batches:
        optimizer.update_permutation(batch)
    rows = torch.cat([b.reshape(-1, 7) for b in batches]).double().numpy()
    assert np.abs(optimizer.correlation() - np.corrcoef(rows.T)).max() < 1e-12


def test_correlations_survive_a_large_offset() -> None:
    optimizer = VariableScanOptimizer(5)
    x = correlated(5).double()
    optimizer.update_permutation(x + 1e6)
    expected = np.corrcoef(x.reshape(-1, 5).numpy().T)
    assert np.abs(optimizer.correlation() - expected).max() < 1e-6


@pytest.mark.parametrize("constant", [0.0, 3.0, 1e8])
def test_constant_channels_correlate_with_nothing(constant: float) -> None:
    x = correlated(6)
    x[..., 2] = constant
    optimizer = VariableScanOptimizer(6)
    optimizer.update_permutation(x)
    rho = optimizer.correlation()
    assert np.isfinite(rho).all()
    assert not rho[2].any()
    assert optimizer.solve() in (True, False)
    assert sorted(optimizer.get_permutation().tolist()) == list(range(6))


def test_all_constant_channels_leave_the_order_as_it_is() -> None:
    optimizer = VariableScanOptimizer(4, update_frequency=1)
    assert not optimizer.update_permutation(torch.ones(2, 3, 4))
    assert optimizer.get_permutation().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 33])
def test_order_is_a_permutation_and_its_inverse_is_one(channels: int) -> None:
    optimizer = VariableScanOptimizer(
        channels, update_frequency=1, start="random", generator=torch.Generator().manual_seed(3)
    )
    optimizer.update_permutation(correlated(channels))
    order, inverse = optimizer.get_permutation(), optimizer.get_inverse_permutation()
    assert torch.equal(inverse[order], torch.arange(channels))
    assert torch.equal(order[inverse], torch.arange(channels))


def test_two_opt_finds_the_best_path_of_points_on_a_line() -> None:
    rng = np.random.default_rng(0)
    points = rng.permutation(12).astype(np.float64)
    cost = np.abs(points[:, None] - points[None, :])
    found = two_opt(nearest_neighbour(cost, 0), cost)
    assert path_cost(found, cost) == 11.0


@pytest.mark.parametrize("seed", range(5))
def test_two_opt_ends_where_no_reversal_helps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.random((9, 9))
    cost = cost + cost.T
    found = two_opt(rng.permutation(9).astype(np.int64), cost)
    best = path_cost(found, cost)
    for i, j in itertools.combinations(range(9), 2):
        reversed_segment = np.concatenate([found[:i], found[i : j + 1][::-1], found[j + 1 :]])
        assert path_cost(reversed_segment, cost) >= best - 1e-9


def test_solving_never_lengthens_the_path() -> None:
    optimizer = VariableScanOptimizer(20, start="random", generator=torch.Generator().manual_seed(0))
    optimizer.update_permutation(correlated(20))
    cost = optimizer.cost_matrix()
    before = path_cost(optimizer.get_permutation().numpy(), cost)
    assert optimizer.solve()
    assert path_cost(optimizer.get_permutation().numpy(), cost) < before


def test_duplicated_channels_end_up_side_by_side() -> None:
    rng = torch.Generator().manual_seed(0)
    signals = torch.randn(4, 200, 5, generator=rng)
    x = signals[..., torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4])] * torch.linspace(-2, 3, 10)
    optimizer = VariableScanOptimizer(10, update_frequency=1)
    assert optimizer.update_permutation(x)
    inverse = optimizer.get_inverse_permutation()
    assert (inverse[:5] - inverse[5:]).abs().tolist() == [1] * 5


def test_static_mode_solves_once_and_dynamic_mode_again() -> None:
    static = VariableScanOptimizer(6, update_frequency=2, mode="static")
    dynamic = VariableScanOptimizer(6, update_frequency=2)
    for seed in range(6):
        static.update_permutation(correlated(6, seed))
        dynamic.update_permutation(correlated(6, seed))
    assert static.solutions == 1
    assert dynamic.solutions == 3


def test_gradients_weigh_the_cost_of_the_channels_that_matter() -> None:
    x = correlated(5)
    plain, weighted = VariableScanOptimizer(5), VariableScanOptimizer(5)
    gradient = torch.zeros_like(x)
    gradient[..., 1] = 1.0
    plain.update_permutation(x)
    weighted.update_permutation(x, gradient)
    ratio = weighted.cost_matrix()[0, 1:] / plain.cost_matrix()[0, 1:]
    assert ratio[0] == pytest.approx(2.5)  # (0 + 5) / 2: all weight lies on channel 1
    assert np.allclose(ratio[1:], 0.0)


def test_mean_squares_are_the_same_with_and_without_correlations() -> None:
    with_path, plain = VariableScanOptimizer(6), VariableScanOptimizer(6, objective=lambda order, _: order)
    for seed, length in enumerate((50, 1, 13)):
        with_path.update_permutation(correlated(6, seed, length=length))
        plain.update_permutation(correlated(6, seed, length=length))
    torch.testing.assert_close(plain.mean_squares(), with_path.mean_squares(), rtol=1e-12, atol=0.0)
    again = VariableScanOptimizer(6, objective=lambda order, _: order)
    again.load_statistics(plain.statistics())
    assert torch.equal(again.mean_squares(), plain.mean_squares())


def test_saved_statistics_continue_exactly() -> None:
    whole, first = (VariableScanOptimizer(6, update_frequency=4) for _ in range(2))
    for seed in range(3):
        whole.update_permutation(correlated(6, seed))
        first.update_permutation(correlated(6, seed))
    second = VariableScanOptimizer(6, update_frequency=4)
    second.load_statistics(first.statistics())
    assert whole.update_permutation(correlated(6, 9)) == second.update_permutation(correlated(6, 9))
    for name, tensor in whole.statistics().items():
        assert torch.equal(tensor, second.statistics()[name]), name


def test_wrong_width_and_infinite_activations_are_refused() -> None:
    optimizer = VariableScanOptimizer(4)
    with pytest.raises(ShapeError, match=r"expected \(B, L, 4\)"):
        optimizer.update_permutation(torch.zeros(2, 3, 5))
    with pytest.raises(YunminError, match="not finite"):
        optimizer.update_permutation(torch.full((1, 2, 4), float("nan")))


def test_objective_of_ones_own_decides_the_order() -> None:
    seen = {}

    def objective(order: torch.Tensor, mean_squares: torch.Tensor) -> torch.Tensor:
        seen["mean_squares"] = mean_squares
        return order.flip(0)

    optimizer = VariableScanOptimizer(5, update_frequency=2, objective=objective)
    batches = [correlated(5, seed) for seed in range(2)]
    assert not optimizer.update_permutation(batches[0])
    assert optimizer.update_permutation(batches[1])
    assert optimizer.get_permutation().tolist() == [4, 3, 2, 1, 0]
    rows = torch.cat([b.reshape(-1, 5) for b in batches]).double()
    torch.testing.assert_close(seen["mean_squares"], rows.square().mean(0), rtol=1e-10, atol=1e-12)
