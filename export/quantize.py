"""An exact export's float32 weights, stored as integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from export.calibration import calibrated_tensors
from export.texts import Text
from yunmin.checkpoint import Checkpoint
from yunmin.quantization.layout import Quantization
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.rounding import round_tensors


def quantize_checkpoint(
    checkpoint: Checkpoint, quantization: Quantization, calibration: Text | None, report: Callable[[str], None]
) -> Checkpoint:
    """The checkpoint with its projections, embedding and head in int8 or int4.

    Args:
        checkpoint: float32; not modified.
        quantization: the formats.
        calibration: text that int4 weights are rounded for; None rounds each to nearest.
        report: told how far it is.

    Raises:
        CheckpointError: a weight cannot be quantized; names it.
    """
    config, tensors = checkpoint.config, checkpoint.tensors
    if calibration is None:
        report(f"rounding to {quantization.format}")
        weights = round_tensors(tensors, quantization)
    else:
        sequences = calibration.sequences()
        report(f"calibrating {quantization.format} on {sequences.numel()} tokens of {calibration.source}")
        weights = calibrated_tensors(
            config,
            tensors,
            quantization,
            sequences,
            progress=lambda done, total: report(f"calibrated {done} of {total} layers"),
        )
    stored = pack_tensors(config, tensors, weights, quantization)
    return replace(checkpoint, tensors=stored, quantization=quantization)
