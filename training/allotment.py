"""Pillar 3: who gets which adapter: importance, measured while masking learns or with frozen weights, decides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

import torch
from peft import PeftConfig
from torch import Tensor

from training.adapters import Allocation, allocate, inject_adapters
from training.config import TrainingConfig
from training.gating import mixers_of
from training.importance import ImportanceProbe
from training.phases import Phase
from training.spectrum import Spectrum, SpectrumProbe
from training.team import ALONE, Team
from yunmin.axes import PROJECTIONS, layer_prefix
from yunmin.errors import TrainingError
from yunmin.model import MambaLM
from yunmin.pillars import Pillars

_PROBED_FROM = 0.8  # importance is measured in the last fifth of its phase


class Allotment:
    """Measures how much the projections of a model matter, and puts adapters into it.

    Args:
        model: built with `GatedMixer`.
        config: measure, shares and ranks.
        team: that trains together.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, team: Team = ALONE) -> None:
        self.model = model
        self.config = config
        self.team = team
        names = [f"{layer_prefix(layer)}mixer.{p}" for layer in range(len(mixers_of(model))) for p in PROJECTIONS]
        self.probe = ImportanceProbe({name: model.get_submodule(name) for name in names}, team)
        self._spectra: dict[str, Spectrum] = {}
        probed_phase = Phase.GATES if config.enable_masking else Phase.DENSE
        reads = config.enable_peft and config.allocation == "importance" and config.importance_batches == 0
        self._probed_phase = probed_phase if reads else None

    # --- measuring ------------------------------------------------------------------------------------------------

    def before_step(self, phase: Phase, progress: float) -> None:
        """Measures near the end of the phase before the adapters, at a point of it from 0 to 1."""
        if phase is self._probed_phase and progress >= _PROBED_FROM:
            self.probe.attach()
        else:
            self.probe.detach()

    def follow(self) -> None:
        """Follows projections that masks have wrapped; keeps what was measured."""
        scores, steps = self.probe.scores, self.probe.steps
        self.probe.detach()
        self.probe = ImportanceProbe(
            {name: self.model.get_submodule(name) for name in self.probe.projections}, self.team
        )
        self.probe.scores, self.probe.steps = scores, steps

    def measure(self, batches: Iterable[Iterable[Tensor]], after_batch: Callable[[], object]) -> None:
        """Measures with all weights as they are.

        Args:
            batches: the losses of each one's parts on this process, computed when asked for; the first
                `importance_batches` are.
            after_batch: called after each one.
        """
        self.follow()
        self.probe.attach()
        spectrum = SpectrumProbe(self.probe.projections, self.team) if self.config.needs_spectra else None
        if spectrum is not None:
            spectrum.attach()
        for losses in itertools.islice(batches, self.config.importance_batches):
            for loss in losses:
                (loss * self.team.size).backward()
            self.probe.collect()
            after_batch()
        self.probe.detach()
        if spectrum is not None:
            spectrum.detach()
            self._spectra = self.team.from_first(spectrum.spectra())  # ranks must be the same on all processors

    # --- allotting ------------------------------------------------------------------------------------------------

    def adapt(self, fixed: Pillars, generator: torch.Generator) -> tuple[dict[str, PeftConfig], list[str]]:
        """Puts adapters into the model by what was measured.

        Args:
            fixed: gates, whose logits two measures read, and masks, whose projections get no LoRA.
            generator: of the adapters' first values, and of a random allocation.

        Returns:
            The adapters by name, and lines for the log.

        Raises:
            TrainingError: importance was not measured.
        """
        scores = self._scores(fixed, generator)
        masked = {name.removesuffix(".weight") for name in fixed.weight_masks}
        allocation = allocate(scores, self.config, masked)
        adapters = inject_adapters(self.model, allocation, self.config, generator, self._spectra)
        return adapters, _describe(allocation, scores, self.config)

    def _scores(self, fixed: Pillars, generator: torch.Generator) -> dict[str, float]:
        """Score of each projection by the configured measure, or what stands in for it."""
        names = list(self.probe.projections)
        if self.config.allocation == "uniform":
            return dict.fromkeys(names, 0.0)
        if self.config.allocation == "random":
            return dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
        if self.config.importance == "spectrum":
            return {name: float(self._spectra[name].worth[0]) for name in names}
        if self.config.importance == "gradient":
            if self.probe.steps == 0:
                raise TrainingError("importance was never measured: the phase before the adapters is too short")
            return self.probe.means()
        by_layer = [fixed.training[f"logits.channel.{layer}"] for layer in range(self.model.config.n_layers)]
        measured = [
            float((torch.sigmoid(t) if self.config.importance == "probability" else t.abs()).mean()) for t in by_layer
        ]
        return {name: measured[int(name.split(".")[2])] for name in names}

    # --- what a checkpoint keeps ----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Sums of what was measured so far."""
        return {"importance.scores": self.probe.scores, "importance.steps": torch.tensor(self.probe.steps)}

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        self.probe.scores = saved["importance.scores"].clone()
        self.probe.steps = int(saved["importance.steps"])


def _describe(allocation: Allocation, scores: dict[str, float], config: TrainingConfig) -> list[str]:
    counts = f"LoRA on {len(allocation.lora)}, IA3 on {len(allocation.ia3)}, frozen {len(allocation.frozen)}"
    measure = f" ({config.importance})" if config.allocation == "importance" else ""
    lines = [f"adapters, allocation {config.allocation}{measure}: {counts} of {len(scores)} projections"]
    ranked = [*allocation.lora, *allocation.ia3, *allocation.frozen]
    lines += [f"  {kind:<6} {', '.join(_short(n) for n in getattr(allocation, kind))}" for kind in ("lora", "ia3")]
    values = sorted(scores[name] for name in ranked)
    ties = sum(a == b for a, b in itertools.pairwise(values))
    if ties and config.allocation == "importance":
        lines.append(f"  {ties} scores tie and were ranked by name: with equal widths this measure sees layers only")
    if any(name.endswith("dt_proj") for name in (*allocation.lora, *allocation.ia3)):
        lines.append("  transformers reads dt_proj.weight past its adapter: merge there, or export from here")
    return lines


def _short(name: str) -> str:
    layer, projection = name.split(".")[2], name.rpartition(".")[2]
    return f"{layer}.{projection}"
