"""The phases of a run and the steps that belong to each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from training.config import TrainingConfig
from yunmin.errors import ConfigError


class Phase(StrEnum):
    """What is trained.

    DENSE: all weights. GATES: weights and gates, towards the target sparsity. RECOVER: weights behind fixed gates.
    ADAPTERS: LoRA and IA3 only, allotted by importance, which earlier phases or frozen weights showed.
    """

    DENSE = "dense"
    GATES = "gates"
    RECOVER = "recover"
    ADAPTERS = "adapters"


@dataclass(frozen=True)
class PhaseSpan:
    """Steps `start` to `stop - 1` of a run."""

    phase: Phase
    start: int
    stop: int

    def progress(self, step: int) -> float:
        """Where a step lies in its phase: 0 at the first, 1 at the last, or at the only one."""
        last = self.stop - 1
        return 1.0 if step == last else (step - self.start) / (last - self.start)


def plan_phases(config: TrainingConfig, total_steps: int) -> tuple[PhaseSpan, ...]:
    """Divides the steps among the phases of the enabled pillars, in proportion to their shares.

    Args:
        config: gives the shares.
        total_steps: of the run.

    Returns:
        Contiguous spans that cover every step; a phase without a share is left out.

    Raises:
        ConfigError: an enabled pillar has no share, or there are fewer steps than phases.
    """
    shares = {Phase.DENSE: config.dense_share}
    if config.enable_masking:
        if config.gate_share == 0:
            raise ConfigError("gate_share: must be above 0 while enable_masking is true")
        shares |= {Phase.GATES: config.gate_share, Phase.RECOVER: config.recover_share}
    if config.enable_peft:
        if config.adapter_share == 0:
            raise ConfigError("adapter_share: must be above 0 while enable_peft is true")
        shares[Phase.ADAPTERS] = config.adapter_share
    shares = {phase: share for phase, share in shares.items() if share > 0}
    if not shares:
        raise ConfigError("dense_share: must be above 0 where no other phase is enabled")
    if total_steps < len(shares):
        raise ConfigError(f"{total_steps} steps cannot hold the {len(shares)} phases {', '.join(shares)}")
    spans, start, mass = [], 0, 0.0
    for number, (phase, share) in enumerate(shares.items(), 1):
        mass += share
        later = len(shares) - number  # each later phase keeps at least one step
        stop = min(max(start + 1, round(total_steps * mass / sum(shares.values()))), total_steps - later)
        spans.append(PhaseSpan(phase, start, stop))
        start = stop
    return tuple(spans)
