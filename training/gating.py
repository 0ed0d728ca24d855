"""Pillar 2: all learned gates of a model, from the first sample to the exact cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from training.config import TrainingConfig
from training.cut import choose_channels, choose_states, gate_block
from training.gates import INITIAL_LOGIT, LearnedGate, block_of_channel, sums_by_unit
from training.masks import initial_mask_logits
from training.sparsity import SparsityTarget, layer_costs, masking_statistics
from yunmin.axes import layer_prefix
from yunmin.gated import GatedMixer, MaskedLinear
from yunmin.model import MambaLM

_START_DEVIATION = 4.0  # of logits within a layer, where they start from activations; 1, 2 and 8 gave worse cuts

_MOST_OPEN = 10.0  # mean to start from where next to nothing is to be cut: further up gates would not move


class Gating:
    """Learned gates on inner channels (or blocks of them), states and weights, as configured.

    Building one puts the gates into the model.

    Args:
        model: built with `GatedMixer`.
        config: what is gated, and its targets.
        scan_order: per layer, int64 (D,); neighbours in it form blocks and N:M groups.

    """

    def __init__(self, model: MambaLM, config: TrainingConfig, scan_order: Sequence[Tensor]) -> None:
        self.model = model
        self.config = config
        self.block = gate_block(config)
        self.targets = {
            "channels": SparsityTarget(config.target_sparsity, config.multiplier_learning_rate),
            "states": SparsityTarget(config.target_state_sparsity, config.multiplier_learning_rate),
            "weights": SparsityTarget(self.mask_sparsity, config.multiplier_learning_rate),
        }
        self.temperature = config.masking_initial_tau
        self.channel_gates: list[LearnedGate] = []
        self.state_gates: list[LearnedGate] = []
        self.mask_gates: dict[str, LearnedGate] = {}
        for layer, mixer in enumerate(mixers_of(model)):
            self._install(layer, mixer, scan_order[layer])
        model.to(model.device)  # the gates, too

    @property
    def mask_sparsity(self) -> float:
        return (
            1 - self.config.mask_n / self.config.mask_m
            if self.config.weight_mask == "n:m"
            else self.config.mask_sparsity
        )

    @property
    def gates(self) -> dict[str, LearnedGate]:
        """Every learned gate by the name of its logits in a checkpoint."""
        named = {f"channel.{i}": gate for i, gate in enumerate(self.channel_gates)}
        named |= {f"state.{i}": gate for i, gate in enumerate(self.state_gates)}
        return named | {f"weight.{name}": gate for name, gate in self.mask_gates.items()}

    @torch.no_grad()
    def start(self, energies: Sequence[Tensor], reach: Sequence[Tensor]) -> None:
        """Lets logits start in the order of what units carry, normally distributed in each layer.

        Args:
            energies: what each channel adds to the residual stream (D,), per layer; a block has the sum.
            reach: how far each state carries (N,), per layer.
        """
        channels, states = self.config.target_sparsity, self.config.target_state_sparsity
        for gate, scores in zip(self.channel_gates, energies, strict=bool(self.channel_gates)):
            of_units = scores if gate.unit_of is None else sums_by_unit(scores, gate.unit_of.cpu())
            gate.logits.copy_(_first_logits(of_units, channels))
        for gate, scores in zip(self.state_gates, reach, strict=bool(self.state_gates)):
            gate.logits.copy_(_first_logits(scores, states))

    def sample(self, progress: float, generator: torch.Generator) -> None:
        """Draws all gates for a step at a point of the gate phase, 0 to 1."""
        first, last = self.config.masking_initial_tau, self.config.masking_tau
        self.temperature = first * (last / first) ** progress
        for target in self.targets.values():
            target.advance(progress)
        for gate in self.gates.values():
            gate.sample(self.temperature, generator)

    def expected_sparsity(self) -> dict[str, Tensor]:
        """Expected share cut of each kind that has gates, differentiable scalars."""
        expected: dict[str, Tensor] = {}
        if self.channel_gates:
            channels = [gate.keep_probability().sum() for gate in self.channel_gates]
            full = [torch.tensor(float(width)) for width in self.model.config.d_inner]
            states = [torch.tensor(float(n)) for n in self.model.config.d_state]
            unit = self.config.sparsity_unit
            kept = torch.stack(layer_costs(self.model.config, channels, states, unit)).sum()
            expected["channels"] = 1 - kept / torch.stack(layer_costs(self.model.config, full, states, unit)).sum()
        for kind, gates in (("states", self.state_gates), ("weights", list(self.mask_gates.values()))):
            if gates:
                expected[kind] = 1 - torch.cat([gate.keep_probability().flatten() for gate in gates]).mean()
        return expected

    def penalty(self) -> Tensor:
        """The Lagrangian terms of all targets, a scalar to add to the loss."""
        terms = [self.targets[kind].penalty(sparsity) for kind, sparsity in self.expected_sparsity().items()]
        return torch.stack(terms).sum() if terms else torch.zeros((), device=self.model.device)

    @torch.no_grad()
    def ascend(self) -> None:
        """Moves the multipliers after a step of the model."""
        for kind, sparsity in self.expected_sparsity().items():
            self.targets[kind].ascend(float(sparsity))

    @contextmanager
    def deterministic(self) -> Iterator[None]:
        """Within it, gates have their values without noise."""
        drawn = {name: gate.suspend() for name, gate in self.gates.items()}
        try:
            yield
        finally:
            for name, gate in self.gates.items():
                gate.resume(drawn[name])

    def regroup(self, scan_order: Sequence[Tensor]) -> None:
        """Lets block gates follow a new scan order; gates on single channels do not depend on it."""
        if self.block > 1 and self.channel_gates:
            for gate, order in zip(self.channel_gates, scan_order, strict=True):
                gate.regroup(block_of_channel(order, self.block).to(gate.logits.device))

    def statistics(self) -> dict[str, float | list[float]]:
        """Masking as it stands, with its target and temperature; see `masking_statistics`."""
        states = [torch.tensor(float(n)) for n in self.model.config.d_state]
        if self.state_gates:
            states = [gate.keep_probability().detach().cpu().sum() for gate in self.state_gates]
        channels = [torch.ones(width) for width in self.model.config.d_inner]
        if self.channel_gates:
            channels = [gate.keep_probability().detach().cpu() for gate in self.channel_gates]
        values = masking_statistics(self.model.config, channels, states, self.config.sparsity_unit)
        expected = self.expected_sparsity()
        values |= {f"{kind}_sparsity": float(s.detach()) for kind, s in expected.items() if kind != "channels"}
        if self.channel_gates:
            values["target"] = self.targets["channels"].target
        return values | ({"temperature": self.temperature} if self.gates else {})

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Tensor]]:
        """Channel gates, state gates and weight masks (by weight name) as they would act without noise now."""
        channels, states = self._open()
        if self.channel_gates:
            channels = tuple(gate.deterministic().cpu() for gate in self.channel_gates)
        if self.state_gates:
            states = tuple(gate.deterministic().cpu() for gate in self.state_gates)
        masks = {f"{name}.weight": gate.deterministic().cpu() > 0 for name, gate in self.mask_gates.items()}
        return channels, states, masks

    def choose(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Exact widths: gates (D,) and (N,) per layer that keep the best channels and states; what has none is open."""
        config, model = self.config, self.model.config
        channels, states = self._open()
        if self.channel_gates:
            chosen = choose_channels(model, config, [gate.logits for gate in self.channel_gates])
            channels = tuple(gate.fixed(kept).cpu() for gate, kept in zip(self.channel_gates, chosen, strict=True))
        if self.state_gates:
            chosen = choose_states(model, config, [gate.logits for gate in self.state_gates])
            states = tuple(gate.fixed(kept).cpu() for gate, kept in zip(self.state_gates, chosen, strict=True))
        return channels, states

    def mask_scores(self) -> dict[str, Tensor]:
        """What decides which weights of each masked projection are kept, by its name."""
        return {name: gate.logits for name, gate in self.mask_gates.items()}

    def _open(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Gates that cut nothing."""
        config = self.model.config
        return tuple(torch.ones(d) for d in config.d_inner), tuple(torch.ones(n) for n in config.d_state)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of the gates: logits, multipliers, and the temperature for the record."""
        if not self.gates:
            return {}
        saved = {f"logits.{name}": gate.logits.detach().cpu() for name, gate in self.gates.items()}
        saved["temperature"] = torch.tensor(self.temperature)
        return saved | {f"multipliers.{kind}": target.multipliers for kind, target in self.targets.items()}

    @torch.no_grad()
    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        if not self.gates:
            return
        for name, gate in self.gates.items():
            gate.logits.copy_(saved[f"logits.{name}"])
        for kind, target in self.targets.items():
            target.multipliers = saved[f"multipliers.{kind}"].clone()
        self.temperature = float(saved["temperature"])

    def _install(self, layer: int, mixer: GatedMixer, order: Tensor) -> None:
        inner, n = self.model.config.d_inner[layer], self.model.config.d_state[layer]
        learns = self.config.gate_ranking == "learned"
        if learns and self.config.target_sparsity > 0:
            unit_of = block_of_channel(order, self.block) if self.block > 1 else None
            logits = torch.full((inner // self.block,), INITIAL_LOGIT)
            mixer.channel_gate = LearnedGate(logits, unit_of, self.config.gate_estimator)
            self.channel_gates.append(mixer.channel_gate)
        if self.config.state_ranking == "learned" and self.config.target_state_sparsity > 0:
            mixer.state_gate = LearnedGate(torch.full((n,), INITIAL_LOGIT), None, self.config.gate_estimator)
            self.state_gates.append(mixer.state_gate)
        for target in self.config.mask_targets if learns and self.config.weight_mask != "none" else ():
            projection = getattr(mixer, target)
            # always zero or one: a fractional weight mask would be a change of weights, not a mask
            gate = LearnedGate(initial_mask_logits(projection.weight), None, "gumbel_sigmoid")
            setattr(mixer, target, MaskedLinear(projection, gate))
            self.mask_gates[f"{layer_prefix(layer)}mixer.{target}"] = gate


def _first_logits(scores: Tensor, target: float) -> Tensor:
    """Logits in the order of scores, normally distributed, that cut about the target at most to begin with."""
    ranks = scores.argsort(stable=True).argsort()
    spread: Tensor = torch.special.ndtri((ranks + 0.5) / len(ranks))
    # the mean of sigmoids of normal logits is about sigmoid(mean / widening) (MacKay 1992)
    widening = math.sqrt(1 + math.pi / 8 * _START_DEVIATION**2)
    mean = min(max(INITIAL_LOGIT, widening * math.log((1 - target) / target)), _MOST_OPEN)
    return mean + _START_DEVIATION * spread


def mixers_of(model: MambaLM) -> list[GatedMixer]:
    """The gated mixers of a model, in order."""
    mixers = []
    for block in model.backbone.layers:
        assert isinstance(block.mixer, GatedMixer), "the model was not built with GatedMixer"
        mixers.append(block.mixer)
    return mixers
