"""Pillar 2: what channels and states carry on real text, which cuts and gates go by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from training.gating import mixers_of
from training.parts import Place
from training.recompute import is_recomputing
from training.team import ALONE, Team
from yunmin.errors import TrainingError
from yunmin.gated import GatedMixer
from yunmin.model import MambaLM

FIRST_BATCHES = 8  # that show where gates start


class Activations:
    """Sums over what passes through a model's mixers while it is watched.

    Attributes:
        steps: batches that were summed up.
        squares: of what each channel gives `out_proj`, float64 (D,) per layer.
        reach: how far each state carries, float64 (N,) per layer: |B C| times `state_gains`.
        place: of the sequences in the batch that come next.

    Args:
        model: built with `GatedMixer`; gets observers while it is watched.
        team: that trains together.
        channels: whether channels are observed.
        states: whether states are.
    """

    def __init__(self, model: MambaLM, team: Team = ALONE, *, channels: bool, states: bool) -> None:
        self.model = model
        self.team = team
        self.steps = 0
        self.squares = [torch.zeros(width, dtype=torch.float64) for width in model.config.d_inner]
        self.reach = [torch.zeros(width, dtype=torch.float64) for width in model.config.d_state]
        self.place: Place | None = None
        self._channels, self._states = channels, states
        self._seen_channels: dict[int, Tensor] = {}
        self._seen_states: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def watch(self) -> None:
        """Attaches the observers, unless they are."""
        if self._handles:
            return
        for layer, mixer in enumerate(mixers_of(self.model)):
            if self._channels:
                self._handles.append(mixer.out_proj.register_forward_pre_hook(partial(self._see_channels, layer)))
            if self._states:
                self._handles.append(mixer.x_proj.register_forward_hook(partial(self._see_states, layer)))

    def unwatch(self) -> None:
        """Detaches them; `watch` goes on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def is_needed(self) -> bool:
        """Whether anything is to be observed."""
        return self._channels or self._states

    def look_at(self, batches: Iterable[Iterable[Tensor]], after_batch: Callable[[], object]) -> None:
        """Sums up the first batches, without gradients.

        Args:
            batches: the losses of each one's parts on this process, computed when asked for.
            after_batch: called after each one.

        Raises:
            TrainingError: there are none.
        """
        self.watch()
        looked = 0
        with torch.no_grad():
            for losses in itertools.islice(batches, FIRST_BATCHES):
                for _ in losses:
                    pass
                self.collect()
                after_batch()
                looked += 1
        self.unwatch()
        if looked == 0:
            raise TrainingError("the gate phase: there is no batch to start from")

    def collect(self) -> None:
        """Adds what the last batch showed."""
        self.steps += bool(self._seen_channels or self._seen_states)
        for sums, seen in ((self.squares, self._seen_channels), (self.reach, self._seen_states)):
            for layer, values in seen.items():
                sums[layer] += self.team.total(values).cpu()
            seen.clear()

    def energies(self) -> list[Tensor]:
        """What each channel adds to the residual stream, the sum of its squares, float64 (D,) per layer."""
        mixers = mixers_of(self.model)
        return [sums * _column_squares(mixer) for sums, mixer in zip(self.squares, mixers, strict=True)]

    def _see_channels(self, layer: int, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not is_recomputing():
            squares = self._own_rows(inputs[0]).square().sum(0, dtype=torch.float64)
            self._seen_channels[layer] = squares + self._seen_channels.get(layer, 0.0)

    def _see_states(self, layer: int, _module: nn.Module, _inputs: tuple[Tensor, ...], maps: Tensor) -> None:
        if not is_recomputing():
            mixer = mixers_of(self.model)[layer]
            _, B_ssm, C_ssm = self._own_rows(maps).double().split(mixer.split_sizes, dim=-1)
            reach = (B_ssm * C_ssm).abs().sum(0) * state_gains(mixer)
            self._seen_states[layer] = reach + self._seen_states.get(layer, 0.0)

    def _own_rows(self, values: Tensor) -> Tensor:
        """What belongs to this process's sequences, (B, L, _) as (B*L, _), float32 or wider."""
        rows = None if self.place is None else self.place.rows
        own = values.detach()[:rows].flatten(0, -2)
        return own.to(torch.promote_types(own.dtype, torch.float32))


@torch.no_grad()
def state_gains(mixer: GatedMixer) -> Tensor:
    """What a state holds of a steady input, per unit of B, float64 (N,): mean over channels of d / (1 - exp(d A)).

    The geometric sum of the recurrence at the step size d that a channel's bias gives: a state that decays slowly holds
    more, so that |B C| alone would rank states of different decay wrongly.
    """
    delta = F.softplus(mixer.dt_proj.bias.double())[:, None]  # (D, 1)
    return (delta / -torch.expm1(-delta * mixer.A_log.double().exp())).mean(0)


def _column_squares(mixer: GatedMixer) -> Tensor:
    return mixer.out_proj.weight.detach().double().square().sum(0).cpu()
