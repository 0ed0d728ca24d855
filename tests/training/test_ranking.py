"""Cuts without learned gates: what ranks, equal widths, no gate and no penalty before the cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models import random_ids, random_model, random_tensors, small_config
from tests.training.runs import frozen, interrupt_after, small_run
from tests.training.test_resume import assert_same_checkpoint
from training.activations import state_gains
from training.config_file import parse_config
from training.gating import mixers_of
from training.ranking import Ranking, channel_squares, state_squares
from training.run import resume, train
from yunmin.axes import take
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import ConfigError, TrainingError
from yunmin.gated import GatedMixer
from yunmin.pillars import load_pillars


def _ranking(kind: str, **options: Any) -> Ranking:
    values = {"channel_multiple": 8, "gate_block_size": 8, "target_sparsity": 0.4, "target_state_sparsity": 0.5}
    config = parse_config(values | {"gate_ranking": kind, "state_ranking": kind} | options)
    model = random_model(small_config(), mixer=GatedMixer)
    return Ranking(model, config, torch.Generator().manual_seed(1))


def _orders(ranking: Ranking) -> list[torch.Tensor]:
    return [torch.randperm(d, generator=torch.Generator().manual_seed(d)) for d in ranking.model.config.d_inner]


def _observe(ranking: Ranking, batches: int = 2) -> torch.Tensor:
    ids = random_ids(ranking.model.config, 2 * batches, 9)
    for batch in ids.chunk(batches):
        ranking.observe(0.9)
        ranking.model(batch)
        ranking.activations.collect()
    return ids


def test_magnitude_of_a_channel_is_what_its_cut_removes() -> None:
    config, weights = small_config(), random_tensors(small_config())
    own = ("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    squares = channel_squares(mixers_of(random_model(config, mixer=GatedMixer))[1])
    for channel in (0, 17, 39):
        others = torch.tensor([j for j in range(40) if j != channel])
        _, cut = take(config, weights, "inner", others, layer=1)
        names = [f"backbone.layers.1.mixer.{name}" for name in own]
        removed = sum(float(weights[n].double().square().sum() - cut[n].double().square().sum()) for n in names)
        assert float(squares[channel]) == pytest.approx(removed)


def test_magnitude_of_a_state_is_that_of_its_rows() -> None:
    mixer = mixers_of(random_model(small_config(), mixer=GatedMixer))[0]
    rows = mixer.x_proj.weight.double().square().sum(1)
    assert float(state_squares(mixer)[2]) == pytest.approx(float((rows[3 + 2] + rows[3 + 5 + 2]).detach()))


def test_activations_are_what_the_scan_gives_and_what_it_reads_and_writes_with() -> None:
    ranking = _ranking("activation")
    ids = _observe(ranking)
    mixer = mixers_of(ranking.model)[0]
    seen: list[torch.Tensor] = []
    mixer.observe = seen.append
    outputs: list[torch.Tensor] = []
    mixer.out_proj.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    with torch.no_grad():
        ranking.model(ids)
        dt_B_C = mixer.x_proj(seen[0])
    _, B_ssm, C_ssm = dt_B_C.double().flatten(0, 1).split([3, 5, 5], dim=-1)
    assert torch.allclose(ranking.channels[0], outputs[0].double().square().sum((0, 1)))
    assert torch.allclose(ranking.states[0], (B_ssm * C_ssm).abs().sum(0) * state_gains(mixer), rtol=1e-6)
    assert ranking.activations.steps == 2


def test_the_gain_of_a_state_is_what_a_steady_input_leaves_in_it() -> None:
    mixer = mixers_of(random_model(small_config(), mixer=GatedMixer))[0]
    delta = torch.nn.functional.softplus(mixer.dt_proj.bias.detach().double())[:, None]
    decay = (-delta * mixer.A_log.detach().double().exp()).exp()
    state = torch.zeros_like(decay)
    for _ in range(100_000):
        state, before = decay * state + delta, state
        if torch.equal(state, before):
            break
    assert torch.allclose(state_gains(mixer), state.mean(0))


@pytest.mark.parametrize("blocks", ["channel", "block"])
@pytest.mark.parametrize("kind", ["magnitude", "activation", "random"])
def test_every_ranking_keeps_the_same_exact_widths(kind: str, blocks: str) -> None:
    ranking = _ranking(kind, channel_gates=blocks)
    _observe(ranking)
    orders = _orders(ranking)
    channels, states, _ = frozen(ranking, orders)
    assert [int(gate.sum()) for gate in channels] == [24, 24]
    assert [int(gate.sum()) for gate in states] == [2, 2]
    if blocks == "block":
        assert all(len(set(part.tolist())) == 1 for part in channels[0][orders[0]].split(8))


def test_the_best_channels_and_blocks_are_kept() -> None:
    ranking = _ranking("magnitude")
    kept = frozen(ranking, _orders(ranking))[0][0].bool()
    scores = channel_squares(mixers_of(ranking.model)[0])
    assert scores[kept].min() > scores[~kept].max()
    ranking, orders = _ranking("magnitude", channel_gates="block"), _orders(ranking)
    blocks = scores[orders[0]].view(-1, 8).sum(1)
    kept = frozen(ranking, orders)[0][0][orders[0]].view(-1, 8)[:, 0].bool()
    assert blocks[kept].min() > blocks[~kept].max()


def test_layers_compete_where_widths_need_not_be_uniform() -> None:
    ranking = _ranking("magnitude", uniform_widths=False)
    for parameter in mixers_of(ranking.model)[0].parameters():
        parameter.data *= 3
    widths = [int(gate.sum()) for gate in frozen(ranking, _orders(ranking))[0]]
    assert widths == [40, 8]


def test_weight_masks_keep_the_largest_weights_among_survivors() -> None:
    ranking = _ranking("random", weight_mask="n:m")
    channels, _, masks = frozen(ranking, _orders(ranking))
    name = "backbone.layers.0.mixer.out_proj.weight"
    inner = _orders(ranking)[0]
    inner = inner[channels[0][inner] > 0]
    groups = mixers_of(ranking.model)[0].out_proj.weight.detach().abs()[:, inner].view(24, -1, 4)
    kept = masks[name][:, inner].view(24, -1, 4)
    assert bool((kept.sum(-1) == 2).all())
    assert bool((groups.masked_fill(~kept, 9).amin(-1) >= groups.masked_fill(kept, 0).amax(-1)).all())


def test_activations_that_were_never_seen_are_told() -> None:
    ranking = _ranking("activation")
    with pytest.raises(TrainingError, match="no activations were seen"):
        frozen(ranking, _orders(ranking))


@pytest.mark.parametrize("options", [{"importance": "magnitude"}, {"importance": "probability"}])
def test_measures_of_gates_need_learned_gates(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="gate_ranking must be learned"):
        parse_config({"gate_ranking": "random"} | options)


@pytest.mark.parametrize("kind", ["magnitude", "activation", "random"])
def test_the_gate_phase_trains_as_the_dense_one_and_a_resumed_run_cuts_the_same(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "gate_ranking": kind,
        "state_ranking": kind,
        "scan_start": "identity",
        "enable_peft": False,
    }
    whole = train(small_run(tmp_path / "whole", **options))
    for step in (15, 16):  # within the last fifth of the gate phase, and at its end
        with monkeypatch.context() as patch:
            interrupt_after(step, patch)
            stopped = train(small_run(tmp_path / f"{step}", **options))
        assert_same_checkpoint(resume(stopped.run).checkpoint, whole.checkpoint)
    uncut = whole.run / "checkpoint-16"
    gates = load_pillars(uncut, load_checkpoint(uncut).config).channel_gates
    assert all(bool((gate == 1).all()) for gate in gates)
    dense = train(small_run(tmp_path / "dense", **options, enable_masking=False, checkpoint_interval=16))
    ours, theirs = (load_file(run / "checkpoint-16" / "model.safetensors") for run in (whole.run, dense.run))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("channels", "states"), [("random", "activation"), ("activation", "random")])
def test_random_scores_stay_as_they_were_drawn_while_activations_are_summed(channels: str, states: str) -> None:
    ranking = _ranking(channels, state_ranking=states)
    before = {name: tensor.clone() for name, tensor in ranking.tensors().items()}
    _observe(ranking)
    same = {name.split(".")[1] for name, tensor in ranking.tensors().items() if torch.equal(tensor, before[name])}
    assert same == {"channel" if channels == "random" else "state"}


@pytest.mark.parametrize(("channels", "states"), [("learned", "activation"), ("activation", "learned")])
def test_channels_and_states_are_chosen_by_different_things(
    channels: str, states: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"gate_ranking": channels, "state_ranking": states, "enable_peft": False}
    options |= {"scan_objective": "auto", "scan_gradient_weighted": False, "weight_mask": "none"}
    options["channel_gates"] = "block" if channels == "learned" else "channel"  # ordered by saliency, or for int4
    whole = train(small_run(tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        interrupt_after(15, patch)
        stopped = train(small_run(tmp_path / "stopped", **options))
    assert_same_checkpoint(resume(stopped.run).checkpoint, whole.checkpoint)
    gates = load_file(whole.run / "checkpoint-16" / "pillars.safetensors")
    learned = {"learned": "logits", "activation": "ranking"}
    assert any(name.endswith(f"{learned[channels]}.channel.0") for name in gates), gates.keys()
    assert any(name.endswith(f"{learned[states]}.state.0") for name in gates), gates.keys()
    assert not any(name.endswith("logits.state.0") for name in gates) or states == "learned"
    final = load_pillars(whole.checkpoint, load_checkpoint(whole.checkpoint).config)
    assert [int((gate > 0).sum()) for gate in (*final.channel_gates, *final.state_gates)] == [24, 24, 2, 2]


def test_a_run_that_ends_with_its_gates_ends_with_exact_ones(tmp_path: Path) -> None:
    for kind in ("learned", "magnitude"):
        rankings = {"gate_ranking": kind, "state_ranking": kind}
        result = train(small_run(tmp_path / kind, **rankings, enable_peft=False, recover_share=0))
        pillars = load_pillars(result.checkpoint, load_checkpoint(result.checkpoint).config)
        assert [int((gate > 0).sum()) for gate in (*pillars.channel_gates, *pillars.state_gates)] == [24, 24, 2, 2]
        assert set(result.validations) == {"dense", "gates", "hard_gates"}
        assert resume(result.run).checkpoint == result.checkpoint
