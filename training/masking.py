"""Pillar 2: what the gate phase learns and what it only ranks, taken together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from training.activations import Activations
from training.config import TrainingConfig
from training.gating import Gating
from training.parts import Place
from training.ranking import Ranking
from training.team import ALONE, Team
from yunmin.model import MambaLM


def starts_from(config: TrainingConfig) -> dict[str, bool]:
    """Which activations learned gates start from, as `Activations` takes them."""
    is_wanted = config.gate_start == "activation"
    return {
        "channels": is_wanted and config.gate_ranking == "learned" and config.target_sparsity > 0,
        "states": is_wanted and config.state_ranking == "learned" and config.target_state_sparsity > 0,
    }


class Masking:
    """Learned gates and rankings of a gate phase: channels and states each have one or the other.

    Args:
        model: built with `GatedMixer`; gets the gates.
        config: what is learned or ranked, and targets.
        scan_order: per layer, int64 (D,); neighbours in it form blocks and N:M groups.
        generator: of random scores.
        team: that trains together.
        starts: what was seen before the phase, if logits start from it; None where they start alike, or go on.
    """

    def __init__(
        self,
        model: MambaLM,
        config: TrainingConfig,
        scan_order: Sequence[Tensor],
        generator: torch.Generator,
        team: Team = ALONE,
        starts: Activations | None = None,
    ) -> None:
        self._gates = Gating(model, config, scan_order)
        if starts is not None:
            self._gates.start(starts.energies(), starts.reach)
        self._ranking = Ranking(model, config, generator, team)

    def sample(self, progress: float, generator: torch.Generator) -> None:
        """Prepares a step at a point of the gate phase, 0 to 1: draws gates, and observes activations near its end."""
        self._gates.sample(progress, generator)
        self._ranking.observe(progress)

    def show(self, place: Place) -> None:
        """Says which sequences of the batch come next."""
        self._ranking.activations.place = place

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
