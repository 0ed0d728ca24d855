"""The loss of one step: cross-entropy, sparsity and distillation, over the parts of a batch and a team's processes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.adaptive import AdaptiveModel
from training.config import TrainingConfig
from training.data import IGNORED
from training.parallel import Parallel
from training.parts import Part
from training.phases import Phase
from training.team import Team
from yunmin.checkpoint import load_checkpoint
from yunmin.model import MambaLM


@dataclass(frozen=True)
class Loss:
    """The parts of a step's loss, of the whole batch."""

    total: float
    cross_entropy: float
    regularization: float
    distillation: float


class Learner:
    """Computes losses and their gradients.

    Args:
        config: of the run.
        team: that trains together.
        device: to compute on.
    """

    def __init__(self, config: TrainingConfig, team: Team, device: torch.device) -> None:
        self.config = config
        self.team = team
        self.device = device
        self._teacher: MambaLM | None = None

    def backward(self, adaptive: AdaptiveModel, parallel: Parallel, parts: list[Part], step: int) -> Loss:
        """Adds the gradients of the batch's mean loss; each token counts the same, whichever part it is in.

        Args:
            adaptive: prepared for the step.
            parallel: its model.
            parts: this process's, of one batch.
            step: of the run, for the noise of dropout.
        """
        weight, size = self.config.distillation_weight, self.team.size
        sums = torch.zeros(4, dtype=torch.float64)
        for number, part in enumerate(parts):
            if size > 1:  # no two processes drop the same, and a resumed run drops what it would have
                torch.manual_seed((self.config.seed + 1_000_003 * (step + 1) + 7_919 * self.team.rank) % 2**63 + number)
            adaptive.show(part.place)
            with parallel.part(is_last=number == len(parts) - 1):
                with self.products():
                    logits = parallel(part.inputs)  # (B, L, V)
                cross_entropy = part.share * mean_cross_entropy(logits, part.labels)
                penalty = adaptive.penalty() / (size * len(parts))
                distillation = part.share * self._distillation(adaptive.phase, part, logits)
                loss = cross_entropy + penalty + weight * distillation
                (loss * size).backward()  # of which the average over processes is taken
            sums += torch.tensor([float(t.detach()) for t in (loss, cross_entropy, penalty, distillation)]).double()
        return Loss(*self.team.total(sums).tolist())

    def products(self) -> torch.autocast:
        """Within it, projections and head multiply in the configured precision; norms and scan stay in float32."""
        is_narrow = self.config.matmul_precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_narrow)

    def _distillation(self, phase: Phase, part: Part, logits: Tensor) -> Tensor:
        """Mean KL divergence from the starting checkpoint over the tokens that are learned, while recovering."""
        is_learned = part.labels != IGNORED
        if phase is not Phase.RECOVER or self.config.distillation_weight == 0 or not bool(is_learned.any()):
            return torch.zeros((), device=self.device)
        if self._teacher is None:
            assert self.config.checkpoint is not None
            starting = load_checkpoint(self.config.checkpoint)
            self._teacher = MambaLM.from_tensors(starting.config, starting.tensors).to(self.device)
        with torch.no_grad(), self.products():
            target = F.log_softmax(self._teacher(part.inputs).float(), dim=-1)
        own = F.log_softmax(logits.float(), dim=-1)
        return F.kl_div(own[is_learned], target[is_learned], reduction="batchmean", log_target=True)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Over the tokens that are learned; zero where there are none.

    Args:
        logits: (B, L, V).
        labels: int64 (B, L).
    """
    reduction = "mean" if bool((labels != IGNORED).any()) else "sum"
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction=reduction)
