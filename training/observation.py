"""Pillar 1: the scan orders of all layers, fed with what their convolutions or scans give while the model trains."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from training.config import TrainingConfig
from training.gating import mixers_of
from training.parallel import whole
from training.parts import Place
from training.recompute import is_recomputing
from training.scan_order import VariableScanOptimizer
from training.team import ALONE, Team
from yunmin.model import MambaLM
from yunmin.n_of_m_order import n_of_m_order
from yunmin.quantization.order import Grouped, quantization_order

_POSITIONS = 256  # observed per step and layer: enough for a correlation over many steps, and cheap


class ScanOrders:
    """One `VariableScanOptimizer` per layer, and the observers that feed them.

    Args:
        model: built with `GatedMixer`; gets observers while `observe(True)` is in force.
        config: mode, start and frequency.
        generator: source of random starts.
        team: that trains together; all of it has the same orders.
    """

    def __init__(self, model: MambaLM, config: TrainingConfig, generator: torch.Generator, team: Team = ALONE) -> None:
        self.model = model
        self.config = config
        self._is_closed = config.scan_mode == "none"
        self._team = team
        self._place: Place | None = None
        self._seen: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        is_by_path = config.order_objective == "correlation"
        self._scans = [
            VariableScanOptimizer(
                inner,
                config.scan_update_frequency,
                start=config.scan_start,
                mode="static" if config.scan_mode == "static" else "dynamic",
                generator=generator,
                objective=None if is_by_path else functools.partial(self._ordered, layer),
            )
            for layer, inner in enumerate(model.config.d_inner)
        ]

    @property
    def orders(self) -> tuple[Tensor, ...]:
        """The channel at each position, int64 (D,), per layer."""
        return tuple(scan.get_permutation() for scan in self._scans)

    @property
    def are_open(self) -> bool:
        """Whether the orders may still change: until closed, and until every static one is solved."""
        return not self._is_closed and not all(scan.is_done for scan in self._scans)

    def close(self) -> None:
        """Keeps the orders as they are from here on."""
        self._is_closed = True
        self.observe(wanted=False)

    def observe(self, *, wanted: bool) -> None:
        """Attaches the observers while orders are open, or detaches them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        is_wanted = wanted and self.are_open
        is_of_outputs = self.config.order_objective == "saliency"  # what the scan gives, gated: `out_proj`'s input
        for layer, mixer in enumerate(mixers_of(self.model)):
            observe = self._observer(layer) if is_wanted else None
            mixer.observe = None if is_of_outputs else observe
            if observe is not None and is_of_outputs:
                self._handles.append(mixer.out_proj.register_forward_pre_hook(_of_input(observe)))

    def update(self) -> list[int]:
        """Hands the last step's activations over; returns the layers whose order changed."""
        changed = []
        for layer, x in sorted(self._seen.items()):
            gradient = self._gradients.get(layer)
            if self._team.size > 1:
                x = self._team.total(x.float())
                if gradient is not None:  # losses come multiplied by the team's size
                    gradient = self._team.total(gradient.float()) / self._team.size
            update = self._scans[layer].update_permutation
            if self._changed(layer, functools.partial(update, x, gradient)):
                changed.append(layer)
        self._seen.clear()
        self._gradients.clear()
        return changed

    def solve(self) -> list[int]:
        """Solves now from what was seen so far; returns the layers whose order changed."""
        if not self.are_open:
            return []
        return [layer for layer, scan in enumerate(self._scans) if self._changed(layer, scan.solve)]

    def solve_among(self, channels: Sequence[Tensor]) -> list[int]:
        """Orders the channels that a cut keeps once more where groups form among them; the others go last.

        Args:
            channels: final gates (D,), per layer.

        Returns:
            The layers whose order changed.
        """
        changed: list[int] = []
        objective = self.config.order_objective
        has_groups = objective == "quantization" or (objective == "n:m" and self.config.weight_mask == "n:m")
        if self._is_closed or not has_groups:
            return changed
        for layer, (scan, gate) in enumerate(zip(self._scans, channels, strict=True)):
            before, mean_squares = scan.get_permutation(), scan.latest_mean_squares()
            kept, cut = before[gate[before] > 0], before[gate[before] == 0]
            if cut.numel():
                order = torch.cat([self._ordered(layer, kept, mean_squares), cut])
                scan.adopt(order if self._team.size == 1 else self._team.from_first(order))
                changed += [] if torch.equal(scan.get_permutation(), before) else [layer]
        return changed

    def show(self, place: Place) -> None:
        """Says which sequences of the batch come next."""
        self._place = place

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: orders, and statistics while they still matter."""
        return {
            f"scan.{layer}.{name}": tensor
            for layer, scan in enumerate(self._scans)
            for name, tensor in scan.statistics().items()
            if self.are_open or name in ("order", "counters", "solved_for")
        }

    def load_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Continues from `tensors()`."""
        for layer, scan in enumerate(self._scans):
            prefix = f"scan.{layer}."
            scan.load_statistics({n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)})

    def _changed(self, layer: int, solve: Callable[[], bool]) -> bool:
        """Whether the order changed; where a team solved for one, all of it takes that of the first process."""
        scan = self._scans[layer]
        before, solutions = scan.get_permutation(), scan.solutions
        changed = solve()
        if self._team.size == 1 or scan.solutions == solutions:
            return changed
        scan.adopt(self._team.from_first(scan.get_permutation()))
        return not torch.equal(scan.get_permutation(), before)

    def _ordered(self, layer: int, channels: Tensor, mean_squares: Tensor) -> Tensor:
        """Some of a layer's channels in a better order for the weights it has; the one given is where searches start.

        Args:
            layer: whose channels they are.
            channels: int64.
            mean_squares: of all channels (D,).
        """
        if self.config.order_objective == "n:m":
            masked = [name for name in ("x_proj", "out_proj") if name in self.config.mask_targets] or ["out_proj"]
            weights = [weight[:, channels] for weight in self._weights(layer, masked)]
            return channels[n_of_m_order(weights, self.config.mask_n, self.config.mask_m)]
        x_proj, out_proj = (weight[:, channels] for weight in self._weights(layer, ("x_proj", "out_proj")))
        own = mean_squares[channels]
        if self.config.order_objective == "saliency":
            saliency = own * out_proj.double().square().sum(0)  # mean square of what a channel adds to the output
            return channels[torch.argsort(saliency, descending=True, stable=True)]
        return channels[quantization_order([Grouped(x_proj, own.float()), Grouped(out_proj)])]

    def _weights(self, layer: int, projections: Sequence[str]) -> list[Tensor]:
        mixer = mixers_of(self.model)[layer]
        return [whole(getattr(mixer, name).weight.detach()).float().cpu() for name in projections]

    def _observer(self, layer: int) -> Callable[[Tensor], None]:
        def observe(x: Tensor) -> None:
            if is_recomputing():
                return
            batch, length, inner = x.shape
            place = self._place or Place(0, batch, batch)
            # every `stride`-th position of the whole batch, however it is divided
            stride = max(1, place.total * length // _POSITIONS)
            positions = -(-place.total * length // stride)
            start = -place.first * length % stride
            slot = (place.first * length + start) // stride

            def put(found: dict[int, Tensor], values: Tensor) -> None:
                picked = values[: place.rows].reshape(-1, inner)[start::stride]
                whole_batch = found.setdefault(layer, picked.new_zeros(1, positions, inner))
                whole_batch[0, slot : slot + len(picked)] = picked

            put(self._seen, x.detach())
            if self.config.scan_gradient_weighted and x.requires_grad:
                x.register_hook(lambda gradient: put(self._gradients, gradient))

        return observe


def _of_input(observe: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        observe(inputs[0])

    return hook
