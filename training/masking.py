"""Pillar 2: what the gate phase learns and what it only ranks, taken together."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from training.activations import Activations
from training.config import TrainingConfig
from training.gating import Gating
from training.parts import Place
from training.ranking import Ranking
from training.team import ALONE, Team
from yunmin.errors import TrainingError
from yunmin.model import MambaLM

_FIRST_BATCHES = 8  # that show where gates start


class Masking:
    """Learned gates and rankings of a gate phase: channels and states each have one or the other.

    Args:
        model: built with `GatedMixer`; gets the gates.
        config: what is learned or ranked, and targets.
        scan_order: per layer, int64 (D,); neighbours in it form blocks and N:M groups.
        generator: of random scores.
        team: that trains together.
    """

    def __init__(
        self,
        model: MambaLM,
        config: TrainingConfig,
        scan_order: Sequence[Tensor],
        generator: torch.Generator,
        team: Team = ALONE,
    ) -> None:
        self.model = model
        self.team = team
        self._gates = Gating(model, config, scan_order)
        self._ranking = Ranking(model, config, generator, team)
        self._observing = self._ranking.activations

    @property
    def has_learned_blocks(self) -> bool:
        """Whether neighbours in scan order share gates."""
        return bool(self._gates.channel_gates) and self._gates.block > 1

    def sample(self, progress: float, generator: torch.Generator) -> None:
        """Prepares a step at a point of the gate phase, 0 to 1: draws gates, and observes activations near its end."""
        self._gates.sample(progress, generator)
        self._ranking.observe(progress)

    def begin(self, batches: Iterable[Iterable[Tensor]]) -> None:
        """Lets the logits of channels and states follow what activations show, before the first step.

        Args:
            batches: the losses of each one's parts on this process, computed when asked for.

        Raises:
            TrainingError: there are none.
        """
        gates = self._gates
        if not (gates.follow_activations and (gates.channel_gates or gates.state_gates)):
            return
        seen = Activations(self.model, self.team, channels=bool(gates.channel_gates), states=bool(gates.state_gates))
        self._observing = seen
        seen.watch()
        for losses in itertools.islice(batches, _FIRST_BATCHES):
            for _ in losses:
                pass
            seen.collect()
        seen.unwatch()
        if seen.steps == 0:
            raise TrainingError("gate_start=activation: there is no batch to start from")
        self._observing = self._ranking.activations
        gates.start(seen.energies(), seen.reach)

    def show(self, place: Place) -> None:
        """Says which sequences of the batch come next."""
        self._observing.place = place

    def penalty(self) -> Tensor:
        """The Lagrangian terms of all targets, a scalar to add to the loss."""
        return self._gates.penalty()

    def ascend(self) -> None:
        """Moves the multipliers after a step, and adds what its activations showed."""
        self._gates.ascend()
        self._ranking.activations.collect()

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Within it, gates have their values without noise, and nothing is observed."""
        self._ranking.activations.unwatch()
        with self._gates.deterministic():
            yield

    def regroup(self, scan_order: Sequence[Tensor]) -> None:
        """Lets block gates follow a new scan order; blocks that are ranked form at the cut."""
        self._gates.regroup(scan_order)

    def statistics(self) -> dict[str, float | list[float]]:
        """Masking as it stands; what is ranked is open until the cut."""
        return self._gates.statistics()

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor]]:
        """Channel gates, state gates and weight masks (by weight name) as they would act without noise now."""
        return self._gates.current()

    def choose(self, scan_order: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Exact widths: gates (D,) and (N,) per layer that keep the best channels, or blocks in scan order, and states.

        Raises:
            TrainingError: activations decide, and none was seen.
        """
        channels, states = self._gates.choose()
        if self._ranking.has_channels:
            channels = self._ranking.choose_channels(scan_order)
        if self._ranking.has_states:
            states = self._ranking.choose_states()
        self._ranking.activations.unwatch()
        return channels, states

    def mask_scores(self) -> dict[str, Tensor]:
        """What decides which weights of each masked projection are kept, by its name."""
        return self._gates.mask_scores() or self._ranking.mask_scores()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return self._gates.tensors() | self._ranking.tensors()

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        self._gates.load_tensors(saved)
        self._ranking.load_tensors(saved)
