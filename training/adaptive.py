"""A model under training with its three pillars: what each phase puts in place and takes away again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from training.adapters import Adapters, Allocation, adapter_tensors, allocate, inject_adapters
from training.config import TrainingConfig
from training.cut import exact_masks
from training.gating import Gating, mixers_of, set_fixed_masks
from training.gradients import GradientWatch
from training.importance import ImportanceProbe
from training.observation import ScanOrders
from training.parts import Place
from training.phases import Phase
from training.ranking import Ranking
from training.sparsity import masking_statistics
from training.spectrum import Spectrum, SpectrumProbe
from training.team import ALONE, Team
from yunmin.axes import PROJECTIONS, layer_prefix
from yunmin.errors import TrainingError
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders
from yunmin.trained import inject_adapter, set_fixed_gates

_PROBED_FROM = 0.8  # importance is measured in the last fifth of its phase
_NO_DECAY = ("A_log", ".D", "bias", "norm.weight", "norm_f.weight")


class AdaptiveModel:
    """A `MambaLM` under training, with the three pillars.

    Attributes:
        model: called as `model(input_ids)`; gates and adapters are in place.
        phase: the current one.

    Args:
        model: built with `GatedMixer`.
        config: of the run.
        generator: source of all randomness of the pillars; the same on all processes.
        team: that trains together.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        self.model = model
        self.team = team
        self.config = config
        self.phase = Phase.DENSE
        self._generator = generator
        self._gating: Gating | Ranking | None = None
        self._fixed = Pillars.identity(model.config)  # gates and masks in force outside the gate phase
        self._adapters: dict[str, PeftConfig] = {}
        self._probe = ImportanceProbe(
            {
                f"{layer_prefix(layer)}mixer.{name}": getattr(mixer, name)
                for layer, mixer in enumerate(mixers_of(model))
                for name in PROJECTIONS
            },
            team,
        )
        self._spectra: dict[str, Spectrum] = {}
        self._scans = ScanOrders(model, config, generator, team)
        self._scans.observe(wanted=True)
        self._watch = GradientWatch(model, self.phase, team)

    # --- phases ---------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase, batches: Iterable[Iterable[Tensor]] = ()) -> list[str]:
        """Begins a phase.

        Args:
            phase: the new one.
            batches: to measure importance with before the adapters are allotted: the losses of each one's parts on
                this process, computed when asked for. None where it was measured before.

        Returns:
            Lines for the log.
        """
        lines = self._solve_order() if phase is not Phase.DENSE else []
        self.phase = phase
        match phase:
            case Phase.GATES:
                self._gating = self._new_gating()
                self._rebuild_probe()
            case Phase.RECOVER | Phase.ADAPTERS:
                lines += self._fix_gates()
                lines += self._add_adapters(batches) if phase is Phase.ADAPTERS else []
                self._scans.close()
            case _:
                pass
        self._scans.observe(wanted=True)
        self._watch = GradientWatch(self.model, phase, self.team)
        for parameter in self.model.parameters():
            parameter.grad = None  # what trains no longer keeps no memory for it
        return lines

    def finish(self) -> list[str]:
        """Ends a run whose last phase is that of the gates, which become exact; returns lines for the log."""
        return self._solve_order() + self._fix_gates()

    def restore(self, phase: Phase, pillars: Pillars, checkpoint_folder: Path) -> None:
        """Takes up a phase where a checkpoint left it, instead of `enter`."""
        self.phase = phase
        saved = pillars.training
        if phase in (Phase.RECOVER, Phase.ADAPTERS):
            self._scans.close()
        self._scans.load_tensors(saved)
        if phase is Phase.GATES:
            self._gating = self._new_gating()
            self._gating.load_tensors(saved)
            self._rebuild_probe()
        else:
            self._fixed = pillars
            set_fixed_gates(self.model, pillars)
            set_fixed_masks(self.model, pillars.weight_masks)
        self._probe.scores = saved["importance.scores"].clone()
        self._probe.steps = int(saved["importance.steps"])
        if phase is Phase.ADAPTERS:
            for name, folder in adapter_folders(checkpoint_folder).items():
                self._adapters[name] = inject_adapter(self.model, name, folder, is_trainable=True)
            self._train_only_adapters()
        self._scans.observe(wanted=True)
        self._watch = GradientWatch(self.model, phase, self.team)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the phase for AdamW; gates keep a constant rate (`scheduled` is False)."""
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.phase is Phase.ADAPTERS:
            rate = self.config.adapter_learning_rate or self.config.learning_rate
            return [_group("adapters", trainable, rate, 0.0)]
        gates = {n: p for n, p in trainable.items() if n.endswith(".logits")}
        plain = {n: p for n, p in trainable.items() if n not in gates and n.endswith(_NO_DECAY)}
        decayed = {n: p for n, p in trainable.items() if n not in gates and n not in plain}
        groups = [
            _group("decayed", decayed, self.config.learning_rate, self.config.weight_decay),
            _group("plain", plain, self.config.learning_rate, 0.0),
        ]
        if gates:
            groups.append({**_group("gates", gates, self.config.gate_learning_rate, 0.0), "scheduled": False})
        return groups

    # --- one step -------------------------------------------------------------------------------------------------

    def before_step(self, progress: float) -> None:
        """Prepares a step at a point of the phase, 0 to 1: samples gates, and measures importance near its end."""
        if self._gating is not None:
            self._gating.sample(progress, self._generator)
        probed_phase = Phase.GATES if self.config.enable_masking else Phase.DENSE
        config = self.config
        is_read = config.enable_peft and config.allocation == "importance" and config.importance_steps is None
        if is_read and self.phase is probed_phase and progress >= _PROBED_FROM:
            self._probe.attach()
        else:
            self._probe.detach()

    def show(self, place: Place) -> None:
        """Says which sequences of the batch the next forward pass has."""
        self._scans.show(place)
        if isinstance(self._gating, Ranking):
            self._gating.show(place)

    def penalty(self) -> Tensor:
        """The sparsity term to add to the loss; zero outside the gate phase."""
        if self._gating is None:
            return torch.zeros((), device=self.model.device)
        return self._gating.penalty()

    def after_backward(self) -> None:
        """Takes what a backward pass shows: importance, activation statistics, parameters without gradient.

        Raises:
            TrainingError: a trainable parameter has no gradient, or a zero one for ten steps; names it.
        """
        self._probe.collect()
        self._watch.check()

    def after_step(self) -> list[str]:
        """Moves multipliers and scan order after the optimizer's step; returns lines for the log."""
        if self._gating is not None:
            self._gating.ascend()
        return self._order_changed(self._scans.update())

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it, the model is in evaluation mode and its gates are without noise."""
        was_training = self.model.training
        self._scans.observe(wanted=False)
        self.model.eval()
        try:
            if self._gating is None:
                yield
            else:
                with self._gating.deterministic():
                    yield
        finally:
            self.model.train(was_training)
            self._scans.observe(wanted=True)

    # --- what is known --------------------------------------------------------------------------------------------

    @property
    def scan_order(self) -> tuple[Tensor, ...]:
        """The channel at each position, per layer."""
        return self._scans.orders

    def statistics(self) -> dict[str, float | list[float]]:
        """Masking as it stands: expected sparsity overall and by layer, keep-probabilities, contribution by layer."""
        if self._gating is not None:
            return self._gating.statistics()
        channels, states = self._fixed.channel_gates, self._fixed.state_gates
        return masking_statistics(
            self.model.config,
            [(gate > 0).float() for gate in channels],
            [(gate > 0).float().sum() for gate in states],
            self.config.sparsity_unit,
        )

    def pillars(self) -> Pillars:
        """Everything a checkpoint keeps of the pillars."""
        training = {"importance.scores": self._probe.scores, "importance.steps": torch.tensor(self._probe.steps)}
        channels, states, masks = self._fixed.channel_gates, self._fixed.state_gates, self._fixed.weight_masks
        if self._gating is not None:
            channels, states, masks = self._gating.current()
            training |= self._gating.tensors()
        else:  # what masking ended with stays on record
            kept = ("logits.", "multipliers.", "ranking.", "temperature")
            training |= {n: t for n, t in self._fixed.training.items() if n.startswith(kept)}
        training |= self._scans.tensors()
        return Pillars(channels, states, self.scan_order, masks, training)

    def adapters(self) -> Adapters:
        """The adapters as they are; all processes must ask together."""
        return Adapters(dict(self._adapters), adapter_tensors(self.model, self._adapters))

    def trainable_parameters(self) -> tuple[int, int]:
        """Numbers that are trained, and all numbers."""
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    # --- inside ---------------------------------------------------------------------------------------------------

    def _order_changed(self, layers: list[int]) -> list[str]:
        if not layers:
            return []
        if self._gating is not None:
            self._gating.regroup(self.scan_order)
        return [f"scan order updated in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"]

    def _solve_order(self) -> list[str]:
        if self._gating is not None and self._gating.block > 1:
            return []  # blocks that were learned must not change their members at the last moment
        return self._order_changed(self._scans.solve())

    def _new_gating(self) -> Gating | Ranking:
        if self.config.gate_ranking == "learned":
            return Gating(self.model, self.config, self.scan_order)
        return Ranking(self.model, self.config, self._generator, self.team)

    def _fix_gates(self) -> list[str]:
        """Ends the gate phase: exact widths, fixed gates and masks; orders stay as they are from here on."""
        if self._gating is None:
            return []
        training = self._gating.tensors()
        channels, states = self._gating.choose(self.scan_order)
        scores = self._gating.mask_scores()
        self._gating = None
        lines = self._order_changed(self._scans.solve_among(channels))
        self._scans.close()
        of = self.model.config
        masks = exact_masks(of, self.config, scores, channels, states, self.scan_order)
        self._fixed = Pillars(channels, states, self.scan_order, masks, training)
        set_fixed_gates(self.model, self._fixed)
        set_fixed_masks(self.model, masks)
        self.model.to(self.model.device)
        inner, n = ([int((gate > 0).sum()) for gate in gates] for gates in (channels, states))
        return [*lines, f"gates fixed: {inner} of {list(of.d_inner)} inner channels, {n} of {list(of.d_state)} states"]

    def _rebuild_probe(self) -> None:
        """Follows projections that masks have wrapped; keeps what was measured."""
        scores, steps = self._probe.scores, self._probe.steps
        self._probe.detach()
        projections = {name: self.model.get_submodule(name) for name in self._probe.projections}
        self._probe = ImportanceProbe(projections, self.team)
        self._probe.scores, self._probe.steps = scores, steps

    def _add_adapters(self, batches: Iterable[Iterable[Tensor]]) -> list[str]:
        self._probe.detach()
        self._train_only_adapters()
        lines = self._measure_importance(batches)
        scores = self._importance()
        masked = {name.removesuffix(".weight") for name in self._fixed.weight_masks}
        allocation = allocate(scores, self.config, masked)
        self._adapters = inject_adapters(self.model, allocation, self.config, self._generator, self._spectra)
        self.model.to(self.model.device)
        self._train_only_adapters()
        return lines + _describe(allocation, scores, self.config)

    def _measure_importance(self, batches: Iterable[Iterable[Tensor]]) -> list[str]:
        """Measures with all weights frozen, as they are; scan orders, too, where no phase went before."""
        is_first = self.config.dense_share == 0 and not self.config.enable_masking
        self._scans.observe(wanted=is_first)
        self._rebuild_probe()
        self._probe.attach()
        config = self.config
        wants_spectra = config.importance == "spectrum" or config.lora_init == "gradient"
        spectrum = SpectrumProbe(self._probe.projections, self.team) if wants_spectra else None
        if spectrum is not None:
            spectrum.attach()
        for losses in batches:
            for loss in losses:
                (loss * self.team.size).backward()
            self._probe.collect()
            self._scans.update()
        self._probe.detach()
        if spectrum is not None:
            spectrum.detach()
            self._spectra = self.team.from_first(spectrum.spectra())  # ranks must be the same on all processors
        return self._order_changed(self._scans.solve()) if is_first else []

    def _importance(self) -> dict[str, float]:
        """Score of each projection by the configured measure, or what stands in for it."""
        names = list(self._probe.projections)
        if self.config.allocation == "uniform":
            return dict.fromkeys(names, 0.0)
        if self.config.allocation == "random":
            return dict(zip(names, torch.rand(len(names), generator=self._generator).tolist(), strict=True))
        if self.config.importance == "spectrum":
            return {name: float(self._spectra[name].worth[0]) for name in names}
        if self.config.importance == "gradient":
            if self._probe.steps == 0:
                raise TrainingError("importance was never measured: the phase before the adapters is too short")
            return self._probe.means()
        by_layer = [self._fixed.training[f"logits.channel.{layer}"] for layer in range(self.model.config.n_layers)]
        measured = [
            float((torch.sigmoid(t) if self.config.importance == "probability" else t.abs()).mean()) for t in by_layer
        ]
        return {name: measured[int(name.split(".")[2])] for name in self._probe.projections}

    def _train_only_adapters(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name or ".ia3_" in name)


def _group(name: str, parameters: dict[str, nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
    return {
        "name": name,
        "params": list(parameters.values()),
        "param_names": list(parameters),
        "lr": rate,
        "weight_decay": decay,
        "scheduled": True,
    }


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
