"""Pillar 2 without learning: cuts by magnitude, by activations or at random, the baselines of learned gates.

In the gate phase the weights train on as in the dense one; at its end the same exact widths are cut as learned gates
would have. So all rankings have an equal budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

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
from training.sparsity import masking_statistics
from training.team import ALONE, Team
from yunmin.axes import layer_prefix
from yunmin.errors import TrainingError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM

_OBSERVED_FROM = 0.8  # activations are observed in the last fifth of the gate phase


class Ranking:
    """Decides at the end of the gate phase what is cut; has the methods of `Gating`.

    Args:
        model: built with `GatedMixer`; gets observers while activations are measured.
        config: ranking, targets and multiples.
        generator: of random scores.
        team: that trains together.

    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        self.model = model
        self.team = team
        self.config = config
        self.steps = 0
        self.place: Place | None = None
        widths, states = model.config.d_inner, model.config.d_state
        if config.gate_ranking == "random":  # drawn now, so that checkpoints of the phase hold them
            self.channels = [torch.rand(d, generator=generator, dtype=torch.float64) for d in widths]
            self.states = [torch.rand(n, generator=generator, dtype=torch.float64) for n in states]
        else:
            self.channels = [torch.zeros(d, dtype=torch.float64) for d in widths]
            self.states = [torch.zeros(n, dtype=torch.float64) for n in states]
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._handles: list[RemovableHandle] = []

    # --- the steps of the gate phase ------------------------------------------------------------------------------

    def sample(self, progress: float, _generator: torch.Generator) -> None:
        """Samples nothing; observes activations near the end of the phase where they decide."""
        if self.config.gate_ranking == "activation" and progress >= _OBSERVED_FROM and not self._handles:
            self._handles = [
                mixer.x_proj.register_forward_hook(self._observer(layer, mixer))
                for layer, mixer in enumerate(mixers_of(self.model))
            ]

    def show(self, place: Place) -> None:
        """Says which sequences of the batch come next."""
        self.place = place

    def penalty(self) -> Tensor:
        """Zero: nothing pulls the weights towards a sparsity."""
        return torch.zeros((), device=self.model.device)

    def ascend(self) -> None:
        """Adds what the step's activations showed."""
        for layer, (channels, states) in self._seen.items():
            self.channels[layer] += self.team.total(channels).cpu()
            self.states[layer] += self.team.total(states).cpu()
        self.steps += bool(self._seen)
        self._seen.clear()

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Within it, nothing is observed."""
        self._detach()
        yield

    def regroup(self, scan_order: Sequence[Tensor]) -> None:
        """Blocks form at the cut, so there is nothing to do."""

    # --- what is known --------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float | list[float]]:
        """Nothing is cut yet; see `masking_statistics`."""
        channels, states, _ = self.current()
        return masking_statistics(self.model.config, channels, [s.sum() for s in states], self.config.sparsity_unit)

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor]]:
        """All gates are open, and there are no masks."""
        config = self.model.config
        return tuple(torch.ones(d) for d in config.d_inner), tuple(torch.ones(n) for n in config.d_state), {}

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: random scores, or sums of what was observed."""
        saved = {f"ranking.channel.{layer}": scores for layer, scores in enumerate(self.channels)}
        saved |= {f"ranking.state.{layer}": scores for layer, scores in enumerate(self.states)}
        return saved | {"ranking.steps": torch.tensor(self.steps)}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        self.channels = [saved[f"ranking.channel.{layer}"].clone() for layer in range(len(self.channels))]
        self.states = [saved[f"ranking.state.{layer}"].clone() for layer in range(len(self.states))]
        self.steps = int(saved["ranking.steps"])

    # --- the cut --------------------------------------------------------------------------------------------------

    def choose(self, scan_order: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Exact widths: gates (D,) and (N,) per layer that keep the best channels, or blocks in scan order, and states.

        Raises:
            TrainingError: activations decide, and none was seen.
        """
        self._detach()
        if self.config.gate_ranking == "activation" and self.steps == 0:
            raise TrainingError("gate_ranking: no activations were seen: the gate phase is too short")
        config, model = self.config, self.model.config
        units = [block_of_channel(order, gate_block(config)) for order in scan_order]
        scores = [_by_unit(s, unit) for s, unit in zip(self._channel_scores(), units, strict=True)]
        kept = choose_channels(model, config, scores)
        channels = tuple(k[unit].float() for k, unit in zip(kept, units, strict=True))
        return channels, tuple(k.float() for k in choose_states(model, config, self._state_scores()))

    def mask_scores(self) -> dict[str, Tensor]:
        """The magnitudes of the weights of each masked projection, by its name."""
        return {
            f"{layer_prefix(layer)}mixer.{target}": getattr(mixer, target).weight.detach().abs()
            for layer, mixer in enumerate(mixers_of(self.model))
            for target in (self.config.mask_targets if self.config.weight_mask != "none" else ())
        }

    def _channel_scores(self) -> list[Tensor]:
        """Squares of the scores of channels (D,): what a block has is then the sum."""
        match self.config.gate_ranking:
            case "magnitude":
                return [channel_squares(mixer) for mixer in mixers_of(self.model)]
            case "activation":
                return [
                    seen.square() * _squares(mixer.out_proj.weight, 1)
                    for seen, mixer in zip(self.channels, mixers_of(self.model), strict=True)
                ]
            case _:
                return self.channels

    def _state_scores(self) -> list[Tensor]:
        if self.config.gate_ranking == "magnitude":
            return [state_squares(mixer) for mixer in mixers_of(self.model)]
        return self.states

    def _observer(self, layer: int, mixer: GatedMixer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def observe(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled() or is_recomputing():
                return
            with torch.no_grad():
                rows = None if self.place is None else self.place.rows
                x, maps = (t.detach()[:rows].double().flatten(0, -2) for t in (inputs[0], output))  # (B*L, _)
                _, B_ssm, C_ssm = maps.split(mixer.split_sizes, dim=-1)
                reach = (B_ssm * C_ssm).abs().sum(0) * state_gains(mixer)  # (N,)
                channels, states = self._seen.get(layer, (0.0, 0.0))
                self._seen[layer] = (channels + x.abs().sum(0), states + reach)

        return observe

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


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


def _squares(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().square().sum(1 - axis).cpu()


def _by_unit(scores: Tensor, unit_of: Tensor) -> Tensor:
    return torch.zeros(int(unit_of.max()) + 1, dtype=scores.dtype).index_add_(0, unit_of, scores)
