"""Pillar 2 without learning: cuts by magnitude, by activations or at random.

Without a learned gate the weights train on in the gate phase as in the dense one; at its end the same exact widths are
cut as learned gates would have. So all rankings take as many steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from training.activations import Activations
from training.config import TrainingConfig
from training.cut import choose_channels, choose_states, gate_block
from training.gates import block_of_channel, sums_by_unit
from training.gating import mixers_of
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
        activations: what was seen near the end of the phase.

    Args:
        model: built with `GatedMixer`; gets observers while activations are measured.
        config: rankings, targets and multiples.
        generator: of random scores.
        team: that trains together.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        self.model = model
        self.config = config
        self.has_channels = config.gate_ranking != "learned" and config.target_sparsity > 0
        self.has_states = config.state_ranking != "learned" and config.target_state_sparsity > 0
        by_channel, by_state = config.gate_ranking == "activation", config.state_ranking == "activation"
        self.activations = Activations(
            model, team, channels=self.has_channels and by_channel, states=self.has_states and by_state
        )
        # random scores are drawn now, so that checkpoints of the phase hold them; others are summed up in their place
        self.channels, self.states = self.activations.squares, self.activations.reach
        if self.has_channels and config.gate_ranking == "random":
            self.channels = _random(model.config.d_inner, generator)
        if self.has_states and config.state_ranking == "random":
            self.states = _random(model.config.d_state, generator)

    def observe(self, progress: float) -> None:
        """Observes activations near the end of the phase, at a point of it from 0 to 1, where they decide."""
        if progress >= _OBSERVED_FROM:
            self.activations.watch()

    # --- what a checkpoint keeps ----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Random scores, or sums of what was observed."""
        if not self.has_channels and not self.has_states:
            return {}
        saved = {f"ranking.channel.{layer}": scores for layer, scores in enumerate(self.channels)}
        saved |= {f"ranking.state.{layer}": scores for layer, scores in enumerate(self.states)}
        return saved | {"ranking.steps": torch.tensor(self.activations.steps)}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        if not self.has_channels and not self.has_states:
            return
        for kind, scores in (("channel", self.channels), ("state", self.states)):
            for layer, values in enumerate(scores):
                values.copy_(saved[f"ranking.{kind}.{layer}"])
        self.activations.steps = int(saved["ranking.steps"])

    # --- the cut --------------------------------------------------------------------------------------------------

    def choose_channels(self, scan_order: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gates (D,) per layer that keep the best channels, or blocks in scan order; exact widths.

        Raises:
            TrainingError: activations decide, and none was seen.
        """
        units = [block_of_channel(order, gate_block(self.config)) for order in scan_order]
        scores = [sums_by_unit(s, unit) for s, unit in zip(self._channel_scores(), units, strict=True)]
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
                return self.activations.energies()
            case _:
                return self.channels

    def _state_scores(self) -> list[Tensor]:
        if self.config.state_ranking == "magnitude":
            return [state_squares(mixer) for mixer in mixers_of(self.model)]
        if self.config.state_ranking == "activation":
            self._check_seen("state_ranking")
        return self.states

    def _check_seen(self, key: str) -> None:
        if self.activations.steps == 0:
            raise TrainingError(f"{key}: no activations were seen: the gate phase is too short")


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


def _random(widths: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    return [torch.rand(width, generator=generator, dtype=torch.float64) for width in widths]


def _squares(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().square().sum(1 - axis).cpu()
