"""Pillar 2 without learning: cuts by magnitude, by activations or at random.

Without a learned gate the weights train on in the gate phase as in the dense one; at its end the same exact widths are
cut as learned gates would have. So all rankings have an equal budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from training.config import TrainingConfig
from training.cut import choose_channels, choose_states, gate_block
from training.gates import block_of_channel
from training.gating import mixers_of
from training.parts import Place
from training.recompute import is_recomputing
from training.team import ALONE, Team
from yunmin.axes import layer_prefix
from yunmin.errors import TrainingError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM

_OBSERVED_FROM = 0.8  # activations are observed in the last fifth of the gate phase


class Ranking:
    """Decides at the end of the gate phase which of the units without learned gates are cut.

    Attributes:
        has_channels: whether channels are ranked.
        has_states: whether states are.
        place: of the sequences in the batch that come next.

    Args:
        model: built with `GatedMixer`; gets observers while activations are measured.
        config: rankings, targets and multiples.
        generator: of random scores.
        team: that trains together.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        self.model = model
        self.team = team
        self.config = config
        self.steps = 0
        self.place: Place | None = None
        self.has_channels = config.gate_ranking != "learned" and config.target_sparsity > 0
        self.has_states = config.state_ranking != "learned" and config.target_state_sparsity > 0
        # random ones are drawn now, so that checkpoints of the phase hold them
        self.channels = _scores(self.has_channels and config.gate_ranking == "random", model.config.d_inner, generator)
        self.states = _scores(self.has_states and config.state_ranking == "random", model.config.d_state, generator)
        self._seen_channels: dict[int, Tensor] = {}
        self._seen_states: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    # --- the steps of the gate phase ------------------------------------------------------------------------------

    @property
    def _by_activations(self) -> tuple[bool, bool]:
        """Whether activations rank channels, and states."""
        return (
            self.has_channels and self.config.gate_ranking == "activation",
            self.has_states and self.config.state_ranking == "activation",
        )

    def observe(self, progress: float) -> None:
        """Observes activations near the end of the phase, at a point of it from 0 to 1, where they decide."""
        if progress < _OBSERVED_FROM or self._handles:
            return
        by_channel, by_state = self._by_activations
        for layer, mixer in enumerate(mixers_of(self.model)):
            if by_channel:
                self._handles.append(mixer.out_proj.register_forward_pre_hook(partial(self._see_channels, layer)))
            if by_state:
                self._handles.append(mixer.x_proj.register_forward_hook(partial(self._see_states, layer)))

    def collect(self) -> None:
        """Adds what the step's activations showed."""
        self.steps += bool(self._seen_channels or self._seen_states)
        for scores, seen in ((self.channels, self._seen_channels), (self.states, self._seen_states)):
            for layer, sums in seen.items():
                scores[layer] += self.team.total(sums).cpu()
            seen.clear()

    def detach(self) -> None:
        """Stops observing; `observe` begins again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- what a checkpoint keeps ----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Random scores, or sums of what was observed."""
        if not self.has_channels and not self.has_states:
            return {}
        saved = {f"ranking.channel.{layer}": scores for layer, scores in enumerate(self.channels)}
        saved |= {f"ranking.state.{layer}": scores for layer, scores in enumerate(self.states)}
        return saved | {"ranking.steps": torch.tensor(self.steps)}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        if not self.has_channels and not self.has_states:
            return
        self.channels = [saved[f"ranking.channel.{layer}"].clone() for layer in range(len(self.channels))]
        self.states = [saved[f"ranking.state.{layer}"].clone() for layer in range(len(self.states))]
        self.steps = int(saved["ranking.steps"])

    # --- the cut --------------------------------------------------------------------------------------------------

    def choose_channels(self, scan_order: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gates (D,) per layer that keep the best channels, or blocks in scan order; exact widths.

        Raises:
            TrainingError: activations decide, and none was seen.
        """
        units = [block_of_channel(order, gate_block(self.config)) for order in scan_order]
        scores = [_by_unit(s, unit) for s, unit in zip(self._channel_scores(), units, strict=True)]
        kept = choose_channels(self.model.config, self.config, scores)
        return tuple(k[unit].float() for k, unit in zip(kept, units, strict=True))

    def choose_states(self) -> tuple[Tensor, ...]:
        """Gates (N,) per layer that keep the best states; exact numbers.

        Raises:
            TrainingError: activations decide, and none was seen.
        """
        return tuple(kept.float() for kept in choose_states(self.model.config, self.config, self._state_scores()))

    def mask_scores(self) -> dict[str, Tensor]:
        """The magnitudes of the weights of each masked projection, by its name."""
        return {
            f"{layer_prefix(layer)}mixer.{target}": getattr(mixer, target).weight.detach().abs()
            for layer, mixer in enumerate(mixers_of(self.model))
            for target in (self.config.mask_targets if self.config.weight_mask != "none" else ())
        }

    def _channel_scores(self) -> list[Tensor]:
        """Squares, of weights or of what channels add to the output (D,): what a block has is then the sum."""
        match self.config.gate_ranking:
            case "magnitude":
                return [channel_squares(mixer) for mixer in mixers_of(self.model)]
            case "activation":
                self._check_seen("gate_ranking")
                return [
                    seen * _squares(mixer.out_proj.weight, 1)
                    for seen, mixer in zip(self.channels, mixers_of(self.model), strict=True)
                ]
            case _:
                return self.channels

    def _state_scores(self) -> list[Tensor]:
        if self.config.state_ranking == "magnitude":
            return [state_squares(mixer) for mixer in mixers_of(self.model)]
        if self.config.state_ranking == "activation":
            self._check_seen("state_ranking")
        return self.states

    def _check_seen(self, key: str) -> None:
        if self.steps == 0:
            raise TrainingError(f"{key}: no activations were seen: the gate phase is too short")

    def _see_channels(self, layer: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Adds the squares of what `out_proj` is given (D,)."""
        if not _is_counted():
            return
        squares = self._own_rows(inputs[0]).square().sum(0)
        self._seen_channels[layer] = squares + self._seen_channels.get(layer, 0.0)

    def _see_states(self, layer: int, _module: nn.Module, _inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        """Adds how far what `x_proj` gives lets each state carry (N,)."""
        if not _is_counted():
            return
        mixer = mixers_of(self.model)[layer]
        _, B_ssm, C_ssm = self._own_rows(maps).split(mixer.split_sizes, dim=-1)
        reach = (B_ssm * C_ssm).abs().sum(0) * state_gains(mixer)
        self._seen_states[layer] = reach + self._seen_states.get(layer, 0.0)

    def _own_rows(self, values: Tensor) -> Tensor:
        """What belongs to this process's sequences, (B, L, _) as (B*L, _), float64."""
        rows = None if self.place is None else self.place.rows
        return values.detach()[:rows].double().flatten(0, -2)


def _is_counted() -> bool:
    """Whether a training step computes something for the first time."""
    return torch.is_grad_enabled() and not is_recomputing()


@torch.no_grad()
def channel_squares(mixer: GatedMixer) -> Tensor:
    """Sum of squares of all weights of each inner channel: what a cut removes, float64 (D,)."""
    x_rows, z_rows = _squares(mixer.in_proj.weight, 0).chunk(2)
    convolution = _squares(mixer.conv1d.weight.flatten(1), 0)
    columns = _squares(mixer.x_proj.weight, 1) + _squares(mixer.out_proj.weight, 1)
    return x_rows + z_rows + convolution + columns + _squares(mixer.dt_proj.weight, 0)


@torch.no_grad()
def state_squares(mixer: GatedMixer) -> Tensor:
    """Sum of squares of the rows of `x_proj` that write to and read from each state, float64 (N,)."""
    rank, states, _ = mixer.split_sizes
    rows = _squares(mixer.x_proj.weight, 0)[rank:].view(2, states)
    return rows.sum(0)


@torch.no_grad()
def state_gains(mixer: GatedMixer) -> Tensor:
    """What a state holds of a steady input, per unit of B, float64 (N,): mean over channels of d / (1 - exp(d A)).

    The geometric sum of the recurrence at the step size d that a channel's bias gives: a state that decays slowly holds
    more, so that |B C| alone would rank states of different decay wrongly.
    """
    delta = F.softplus(mixer.dt_proj.bias.double())[:, None]  # (D, 1)
    return (delta / -torch.expm1(-delta * mixer.A_log.double().exp())).mean(0)


def _scores(is_random: bool, widths: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """Scores to begin with, per layer: random ones, or sums of nothing."""
    if is_random:
        return [torch.rand(width, generator=generator, dtype=torch.float64) for width in widths]
    return [torch.zeros(width, dtype=torch.float64) for width in widths]


def _squares(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().square().sum(1 - axis).cpu()


def _by_unit(scores: Tensor, unit_of: Tensor) -> Tensor:
    return torch.zeros(int(unit_of.max()) + 1, dtype=scores.dtype).index_add_(0, unit_of, scores)
