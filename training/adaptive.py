"""A model under training with its three pillars: what each phase puts in place and takes away again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig
from torch import Tensor

from training.activations import Activations
from training.adapters import Adapters, adapter_tensors
from training.allotment import Allotment
from training.config import TrainingConfig
from training.cut import check_widths, exact_masks
from training.gradients import GradientWatch
from training.masking import Masking, starts_from
from training.observation import ScanOrders
from training.parts import Place
from training.phases import Phase
from training.sparsity import masking_statistics
from training.team import ALONE, Team
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders
from yunmin.trained import inject_adapter, set_fixed_gates, set_fixed_masks


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

    Raises:
        ConfigError: blocks, multiples or N:M groups do not fit the layers' widths.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        check_widths(model.config, config)
        self.model = model
        self.team = team
        self.config = config
        self.phase = Phase.DENSE
        self._generator = generator
        self._masking: Masking | None = None
        self._first: Activations | None = None  # seen before gates are put in
        self._fixed = Pillars.identity(model.config)  # gates and masks in force outside the gate phase
        self._adapters: dict[str, PeftConfig] = {}
        self._allotment = Allotment(model, config, team)
        self._scans = ScanOrders(model, config, generator, team)
        self._scans.observe(wanted=True)
        self._watch = GradientWatch(model, self.phase, team)

    # --- phases ---------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase, batches: Iterable[Iterable[Tensor]] = ()) -> list[str]:
        """Begins a phase.

        Args:
            phase: the new one.
            batches: of which what is measured first takes as many as it needs: the losses of each one's parts on this
                process, computed when asked for.

        Returns:
            Lines for the log.
        """
        lines = self._solve_order() if phase is not Phase.DENSE else []
        self.phase = phase
        match phase:
            case Phase.GATES:
                lines += self._begin_masking(batches)
                self._allotment.follow()
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
            self._install_masking().load_tensors(saved)
            self._allotment.follow()
        else:
            self._fixed = pillars
            set_fixed_gates(self.model, pillars)
            set_fixed_masks(self.model, pillars.weight_masks)
        self._allotment.load_tensors(saved)
        if phase is Phase.ADAPTERS:
            for name, folder in adapter_folders(checkpoint_folder).items():
                self._adapters[name] = inject_adapter(self.model, name, folder, is_trainable=True)
            self._train_only_adapters()
        self._scans.observe(wanted=True)
        self._watch = GradientWatch(self.model, phase, self.team)

    # --- one step -------------------------------------------------------------------------------------------------

    def before_step(self, progress: float) -> None:
        """Prepares a step at a point of the phase, 0 to 1: samples gates, and measures importance near its end."""
        if self._masking is not None:
            self._masking.sample(progress, self._generator)
        self._allotment.before_step(self.phase, progress)

    def show(self, place: Place) -> None:
        """Says which sequences of the batch the next forward pass has."""
        self._scans.show(place)
        if self._first is not None:
            self._first.place = place
        if self._masking is not None:
            self._masking.show(place)

    def penalty(self) -> Tensor:
        """The sparsity term to add to the loss; zero outside the gate phase."""
        if self._masking is None:
            return torch.zeros((), device=self.model.device)
        return self._masking.penalty()

    def after_backward(self) -> None:
        """Takes what a backward pass shows: importance, activation statistics, parameters without gradient.

        Raises:
            TrainingError: a trainable parameter has no gradient, or a zero one for ten steps; names it.
        """
        self._allotment.probe.collect()
        self._watch.check()

    def after_step(self) -> list[str]:
        """Moves multipliers and scan order after the optimizer's step; returns lines for the log."""
        if self._masking is not None:
            self._masking.ascend()
        return self._order_changed(self._scans.update())

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Within it, the model is in evaluation mode and its gates are without noise."""
        was_training = self.model.training
        self._scans.observe(wanted=False)
        self.model.eval()
        try:
            if self._masking is None:
                yield
            else:
                with self._masking.deterministic():
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
        if self._masking is not None:
            return self._masking.statistics()
        channels, states = self._fixed.channel_gates, self._fixed.state_gates
        return masking_statistics(
            self.model.config,
            [(gate > 0).float() for gate in channels],
            [(gate > 0).float().sum() for gate in states],
            self.config.sparsity_unit,
        )

    def pillars(self) -> Pillars:
        """Everything a checkpoint keeps of the pillars."""
        training = self._allotment.tensors()
        channels, states, masks = self._fixed.channel_gates, self._fixed.state_gates, self._fixed.weight_masks
        if self._masking is not None:
            channels, states, masks = self._masking.current()
            training |= self._masking.tensors()
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
        if self._masking is not None:
            self._masking.regroup(self.scan_order)
        return [f"scan order updated in layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"]

    def _solve_order(self) -> list[str]:
        if self._masking is not None and self.config.has_learned_blocks:
            return []  # blocks that were learned must not change their members at the last moment
        return self._order_changed(self._scans.solve())

    def _begin_masking(self, batches: Iterable[Iterable[Tensor]]) -> list[str]:
        """Puts gates in, which start from what batches show; learned blocks form in an order that is solved first."""
        config = self.config
        changed: list[int] = []
        is_solvable = config.scan_mode != "none" and not config.scan_gradient_weighted
        needs_order = is_solvable and config.has_learned_blocks and config.dense_share == 0
        starts = Activations(self.model, self.team, **starts_from(config))
        if starts.is_needed or needs_order:
            self._scans.observe(wanted=needs_order)
            self._first = starts
            starts.look_at(batches, lambda: changed.extend(self._scans.update()))
            self._first = None
            changed += self._scans.solve() if needs_order else []
        lines = self._order_changed(sorted(set(changed)))
        self._install_masking(starts if starts.is_needed else None)
        return lines

    def _install_masking(self, starts: Activations | None = None) -> Masking:
        self._masking = Masking(self.model, self.config, self.scan_order, self._generator, self.team, starts)
        if self.config.has_learned_blocks and self.config.order_objective == "saliency":
            self._scans.close()  # what gates have closed for a while says nothing of what it would add
        return self._masking

    def _fix_gates(self) -> list[str]:
        """Ends the gate phase: exact widths, fixed gates and masks; orders stay as they are from here on."""
        if self._masking is None:
            return []
        training = self._masking.tensors()
        channels, states = self._masking.choose(self.scan_order)
        scores = self._masking.mask_scores()
        self._masking = None
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

    def _add_adapters(self, batches: Iterable[Iterable[Tensor]]) -> list[str]:
        self._train_only_adapters()
        is_first = self.config.dense_share == 0 and not self.config.enable_masking  # orders, too, are learned here
        self._scans.observe(wanted=is_first)
        changed: set[int] = set()
        self._allotment.measure(batches, lambda: changed.update(self._scans.update()))
        changed.update(self._scans.solve() if is_first else ())
        lines = self._order_changed(sorted(changed))
        self._adapters, described = self._allotment.adapt(self._fixed, self._generator)
        self.model.to(self.model.device)
        self._train_only_adapters()
        return lines + described

    def _train_only_adapters(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name or ".ia3_" in name)
