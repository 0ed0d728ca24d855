"""Proof that the runtime computes what the stored integers stand for: the same logits as plain torch, on real text."""

from __future__ import annotations

import torch
from torch import Tensor

from export.verify import Probe, logits_one_by_one, require_parity, steps_of
from yunmin.artifact import Parity
from yunmin.checkpoint import Checkpoint
from yunmin.quantization.reference import quantized_network
from yunmin.runtime.native.runtime import NativeRuntime


def verify_quantized(checkpoint: Checkpoint, probe: Probe) -> dict[str, Parity]:
    """Compares the native runtime with the torch network on integers, and its steps with its whole sequences.

    Args:
        checkpoint: quantized, as it was read back.
        probe: what to compare on.

    Raises:
        VerificationError: they differ by more than the few activations that lie at the edge of two levels explain.
    """
    expected = logits_one_by_one(quantized_network(checkpoint), probe)
    runtime = NativeRuntime(checkpoint)
    sequences = [torch.tensor([sequence]) for sequence in probe.sequences]
    served = torch.cat([runtime.forward(sequence)[0] for sequence in sequences])
    return {
        "quantized": require_parity("quantized", served, expected),
        "stepwise": require_parity("stepwise", *_by_steps(runtime, probe)),
    }


def _by_steps(runtime: NativeRuntime, probe: Probe) -> tuple[Tensor, Tensor]:
    """The last positions' logits by a prefill and single steps, and by one pass, both (sequences, steps + 1, V)."""
    steps = steps_of(probe)
    stepped = []
    for sequence in probe.sequences:
        logits, state = runtime.prefill(sequence[:-steps])
        rows = [logits.clone()]
        for token_id in sequence[-steps:]:
            logits, state = runtime.step([token_id], state)
            rows.append(logits[0].clone())
        stepped.append(torch.stack(rows))
    whole = [runtime.forward(torch.tensor([sequence]))[0, -steps - 1 :] for sequence in probe.sequences]
    return torch.stack(stepped), torch.stack(whole)
