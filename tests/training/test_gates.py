"""Pillar 2: noise, gradients, exact widths, masks."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import random_ids, random_model, small_config
from tests.training.runs import frozen
from training.config_file import parse_config
from training.gates import INITIAL_LOGIT, LearnedGate, block_of_channel, sums_by_unit
from training.gating import Gating
from training.masks import element_mask, n_of_m_mask
from training.sparsity import SparsityTarget, best_units, kept_channels, kept_states, layer_costs, shared_counts
from yunmin.axes import expected_shapes
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ConfigError
from yunmin.gated import GatedMixer


@pytest.mark.parametrize("logit", [-1.5, 0.0, 2.0])
def test_gumbel_sigmoid_keeps_with_the_probability_of_its_logit(logit: float) -> None:
    """One Gumbel draw instead of logistic noise would give 0.632 at logit 0."""
    gate = LearnedGate(torch.full((40_000,), logit))
    gate.sample(0.7, torch.Generator().manual_seed(0))
    drawn = gate()
    assert set(drawn.detach().unique().tolist()) == {0.0, 1.0}
    assert float(drawn.detach().mean()) == pytest.approx(1 / (1 + math.exp(-logit)), abs=0.01)
    assert torch.equal(gate.keep_probability(), torch.sigmoid(gate.logits))


def test_hard_concrete_is_zero_with_the_complement_of_its_keep_probability() -> None:
    gate = LearnedGate(torch.full((40_000,), 0.3), estimator="hard_concrete")
    gate.sample(1.0, torch.Generator().manual_seed(0))
    drawn = gate().detach()
    assert float((drawn > 0).float().mean()) == pytest.approx(float(gate.keep_probability()[0].detach()), abs=0.01)
    assert ((drawn > 0) & (drawn < 1)).any()
    assert (drawn == 1).any()


def test_straight_through_gradient_is_that_of_the_sigmoid_of_the_same_draw() -> None:
    gate = LearnedGate(torch.randn(50))
    rng = torch.Generator().manual_seed(1)
    gate.sample(0.5, rng)
    gate().sum().backward()
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1)).clamp(1e-6, 1 - 1e-6)
    soft = torch.sigmoid((gate.logits.detach() + uniform.logit()) / 0.5)
    assert gate.logits.grad is not None
    assert torch.allclose(gate.logits.grad, soft * (1 - soft) / 0.5, atol=1e-4)


def test_the_same_generator_gives_the_same_sample() -> None:
    gates = [LearnedGate(torch.zeros(20)) for _ in range(2)]
    for gate in gates:
        gate.sample(1.0, torch.Generator().manual_seed(5))
    assert torch.equal(gates[0](), gates[1]())


def test_deterministic_gates_never_close_everything() -> None:
    gate = LearnedGate(torch.tensor([-3.0, -1.0, -2.0]))
    assert gate.deterministic().tolist() == [0.0, 1.0, 0.0]


def test_block_gates_act_on_neighbours_in_scan_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    gate = LearnedGate(torch.tensor([5.0, -5.0, 5.0]), block_of_channel(order, 2))
    closed = (gate.deterministic() == 0).nonzero()[:, 0].tolist()
    assert sorted(closed) == sorted(order[2:4].tolist())


def test_regrouped_blocks_average_their_channels_logits() -> None:
    gate = LearnedGate(torch.tensor([1.0, 3.0]), torch.tensor([0, 0, 1, 1]))
    gate.regroup(torch.tensor([0, 1, 0, 1]))
    assert gate.logits.tolist() == [2.0, 2.0]


def test_multipliers_settle_sparsity_at_its_target() -> None:
    """A lone logit under the penalty alone must settle where expected sparsity meets the target."""
    target = SparsityTarget(0.4, learning_rate=0.05)
    logits = torch.nn.Parameter(torch.full((64,), 2.5))
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for step in range(600):
        target.advance(step / 599)
        sparsity = 1 - torch.sigmoid(logits).mean()
        optimizer.zero_grad()
        target.penalty(sparsity).backward()
        optimizer.step()
        target.ascend(float(sparsity.detach()))
    assert float(1 - torch.sigmoid(logits.detach()).mean()) == pytest.approx(0.4, abs=0.02)


def test_target_rises_over_the_first_fifth() -> None:
    target = SparsityTarget(0.5, 1.0)
    seen = []
    for progress in (0.0, 0.1, 0.2, 0.9):
        target.advance(progress)
        seen.append(target.target)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.5])


@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("unit", ["parameters", "flops", "bytes"])
def test_cost_of_a_cut_equals_the_cost_of_the_smaller_model(unit: str, use_bias: bool) -> None:
    """What the sparsity term calls saved is what the exported model does not have."""
    big = MambaConfig.create(vocab_size=50, d_model=32, n_layers=2, d_state=8, use_bias=use_bias)
    small = big.with_widths(d_inner=(40, 56), d_state=(4, 2))

    def costs(config: MambaConfig) -> float:
        inner = [torch.tensor(float(d), dtype=torch.float64) for d in config.d_inner]
        states = [torch.tensor(float(n), dtype=torch.float64) for n in config.d_state]
        return float(torch.stack(layer_costs(config, inner, states, unit)).sum())  # type: ignore[arg-type]

    before, after = cost_of(big), cost_of(small)
    saved = {
        "parameters": before.parameters - after.parameters,
        "flops": before.flops_per_token - after.flops_per_token,
        "bytes": before.weight_bytes + before.state_bytes - after.weight_bytes - after.state_bytes,
    }[unit]
    # a state column also costs the two rows of x_proj, which go with it: the cost is exact, biases included
    assert costs(big) - costs(small) == saved


@pytest.mark.parametrize(
    ("width", "sparsity", "multiple", "kept"),
    [(512, 0.375, 64, 320), (512, 0.3, 64, 384), (512, 0.99, 64, 64), (512, 0.0, 64, 512), (100, 0.0, 64, 100)],
)
def test_kept_channels_snap_to_multiples(width: int, sparsity: float, multiple: int, kept: int) -> None:
    assert kept_channels(width, sparsity, multiple) == kept


def test_a_multiple_wider_than_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at most the inner width 32, got 64"):
        kept_channels(32, 0.5, 64)


@pytest.mark.parametrize(
    ("n", "sparsity", "kept"), [(16, 0.5, 8), (16, 0.4, 8), (11, 0.0, 11), (11, 0.3, 8), (4, 0.99, 1)]
)
def test_kept_states_snap_to_powers_of_two(n: int, sparsity: float, kept: int) -> None:
    assert kept_states(n, sparsity) == kept


def test_best_units_are_exactly_as_many_even_when_all_tie() -> None:
    chosen = best_units([torch.zeros(10), torch.arange(4.0)], [3, 2])
    assert [int(c.sum()) for c in chosen] == [3, 2]
    assert chosen[1].tolist() == [False, False, True, True]


def test_layers_compete_when_widths_may_differ() -> None:
    counts = shared_counts([torch.full((16,), 2.0), torch.full((16,), -2.0)], 0.5, 4)
    assert counts == [16, 4]


def test_element_mask_keeps_the_exact_share_of_what_is_left() -> None:
    rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 4])
    mask = element_mask(torch.randn(5, 6), 0.5, rows, columns)
    assert int(mask[rows][:, columns].sum()) == 3
    outside = torch.ones(5, 6, dtype=torch.bool)
    outside[rows[:, None], columns[None]] = False
    assert mask[outside].all()


def test_n_of_m_groups_follow_the_order_of_the_columns() -> None:
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    straight = n_of_m_mask(scores, 1, 2, torch.tensor([0]), torch.tensor([0, 1, 2, 3]))
    crossed = n_of_m_mask(scores, 1, 2, torch.tensor([0]), torch.tensor([0, 3, 1, 2]))
    assert straight.tolist() == [[True, False, True, False]]
    assert crossed.tolist() == [[True, True, False, False]]


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide the 5 input channels"):
        n_of_m_mask(torch.randn(2, 5), 2, 4, torch.arange(2), torch.arange(5))


def gating(**options: object) -> Gating:
    values = {
        "channel_multiple": 8,
        "gate_block_size": 8,
        "target_state_sparsity": 0.5,
        "state_ranking": "learned",
    } | options
    model = random_model(small_config(), mixer=GatedMixer)
    rng = torch.Generator().manual_seed(0)
    orders = [torch.randperm(inner, generator=rng) for inner in model.config.d_inner]
    built = Gating(model, parse_config(values), orders)
    with torch.no_grad():
        for gate in built.gates.values():
            gate.logits.add_(torch.randn(gate.logits.shape, generator=rng))
    return built


@pytest.mark.parametrize("channel_gates", ["channel", "block"])
def test_gates_start_in_the_order_of_what_their_units_carry(channel_gates: str) -> None:
    built = gating(channel_gates=channel_gates, uniform_widths=False)
    rng = torch.Generator().manual_seed(3)
    energies = [torch.rand(40, generator=rng).double() for _ in range(2)]
    reach = [torch.rand(5, generator=rng).double() for _ in range(2)]
    built.start(energies, reach)
    for gate, energy in zip(built.channel_gates, energies, strict=True):
        carried = energy if gate.unit_of is None else sums_by_unit(energy, gate.unit_of)
        assert torch.equal(gate.logits.argsort(), carried.argsort())
    assert all(torch.equal(g.logits.argsort(), r.argsort()) for g, r in zip(built.state_gates, reach, strict=True))
    first, second = (gate.logits.detach().sort().values for gate in built.channel_gates)
    assert torch.equal(first, second)  # layers start alike
    assert float(first.mean()) == pytest.approx(INITIAL_LOGIT, abs=1e-5)


@pytest.mark.parametrize("target", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("estimator", ["gumbel_sigmoid", "hard_concrete"])
def test_gates_start_with_no_more_cut_than_about_the_target(estimator: str, target: float) -> None:
    built = gating(target_sparsity=target, state_ranking="activation", gate_estimator=estimator)
    scores = [torch.arange(40).double()] * 2
    built.start(scores, [])
    assert float(built.expected_sparsity()["channels"].detach()) < 1.1 * target + 0.01
    is_cut = [gate.deterministic() == 0 for gate in built.channel_gates]
    assert all(int(cut.sum()) <= 40 * target + 1 for cut in is_cut)


@pytest.mark.parametrize("estimator", ["gumbel_sigmoid", "hard_concrete"])
@pytest.mark.parametrize("channel_gates", ["channel", "block"])
def test_frozen_widths_are_exact(channel_gates: str, estimator: str) -> None:
    built = gating(channel_gates=channel_gates, gate_estimator=estimator)
    orders = [torch.arange(40)] * 2
    channels, states, masks = frozen(built, orders)
    assert [int((c > 0).sum()) for c in channels] == [32, 32]
    assert [int((s > 0).sum()) for s in states] == [2, 2]
    assert not masks


def test_n_of_m_mask_holds_in_scan_order_among_the_survivors() -> None:
    built = gating(weight_mask="n:m", mask_targets=("out_proj",))
    rng = torch.Generator().manual_seed(4)
    orders = [torch.randperm(40, generator=rng) for _ in range(2)]
    channels, _, masks = frozen(built, orders)
    for layer, order in enumerate(orders):
        mask = masks[f"backbone.layers.{layer}.mixer.out_proj.weight"]
        survivors = order[channels[layer][order] > 0]
        groups = mask[:, survivors].view(mask.shape[0], -1, 4)
        assert (groups.sum(-1) == 2).all()


def test_order_changes_nothing_with_channel_and_state_gates_alone() -> None:
    built = gating()
    ids = random_ids(built.model.config, 2, 9)
    built.sample(0.5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = built.model(ids)
        built.regroup([torch.randperm(40), torch.randperm(40)])
        assert torch.equal(built.model(ids), before)


def test_saved_gates_continue_exactly() -> None:
    first, second = gating(weight_mask="element"), gating(weight_mask="element")
    first.sample(0.9, torch.Generator().manual_seed(0))
    first.ascend()
    second.load_tensors(first.tensors())
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name


def test_gates_leave_the_checkpoints_tensors_alone() -> None:
    built = gating(weight_mask="element")
    assert set(built.model.tensors()) == set(expected_shapes(built.model.config))


def test_only_what_has_a_target_gets_gates() -> None:
    config = parse_config({"target_sparsity": 0.0, "target_state_sparsity": 0.5, "state_ranking": "learned"})
    model = random_model(mixer=GatedMixer)
    gating = Gating(model, config, [torch.arange(d) for d in model.config.d_inner])
    assert set(gating.expected_sparsity()) == {"states"}
    assert {name.split(".")[0] for name in gating.gates} == {"state"}
    channels, states, _ = frozen(gating, [torch.arange(d) for d in model.config.d_inner])
    assert all(bool((gate == 1).all()) for gate in channels)  # also of widths that are no multiples
    assert all(int(gate.sum()) < gate.numel() for gate in states)
