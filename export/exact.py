"""The exact part of an export, proven: what was trained, merged, folded, cut, ordered, and rounded to float32 once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.compact import Source, compact_model, trained_model
from export.options import Options
from export.order import reordered
from export.texts import Texts
from export.verify import Probe, logits_as_batch, logits_by_steps, logits_one_by_one, require_parity
from export.wide import in_float64, releasing_layers
from yunmin.artifact import Parity
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.memory import trim_heap
from yunmin.model import MambaLM

Report = Callable[[str], None]


@dataclass(frozen=True)
class Expected:
    """What an export must compute, without the model that computed it.

    Attributes:
        what: a key of `export.verify.TOLERANCES`.
        logits: of the probe's tokens (tokens, V).
        hint: what else is known, for the error.
    """

    what: str
    logits: Tensor
    hint: str = ""


@dataclass(frozen=True)
class Exact:
    """A source's compact float32 weights, and the proof of the mathematics that led to them.

    Attributes:
        checkpoint: shares memory with the source where no stage changed a tensor.
        channels: per layer, the starting inner channel at each position.
        residual: the starting channel of the residual stream at each position.
        parity: the claim "float64".
        expected: the trained model's float32 logits, which the weights must still give when they were written.
    """

    checkpoint: Checkpoint
    channels: tuple[Tensor, ...]
    residual: Tensor
    parity: dict[str, Parity]
    expected: Expected


def exact_export(source: Source, probe: Probe, texts: Texts | None, options: Options, report: Report) -> Exact:
    """Merges, folds, cuts and orders, and proves it in float64.

    Raises:
        CheckpointError: a layer would vanish, or a gate is not finite.
        VerificationError: the result does not compute what the trained model computes.
    """
    report("merging, folding, cutting")
    compact = reordered(compact_model(source), options.order, texts.calibration if texts is not None else None, report)
    report(f"verifying in float64 on {probe.tokens} tokens")
    parity, expected = _verify_float64(source, compact.config, compact.tensors, probe)
    trim_heap()
    compact = compact.cast(torch.float32)  # the one rounding
    checkpoint = replace(source.checkpoint, config=compact.config, tensors=compact.tensors)
    return Exact(checkpoint, compact.channels, compact.residual, {"float64": parity}, expected)


def verify_float32(checkpoint: Checkpoint, expected: Expected, probe: Probe) -> dict[str, Parity]:
    """Float32 weights, in memory or as they were read back, against what they must compute, and by steps."""
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors, shares_memory=True)
    with releasing_layers(model):
        logits = logits_as_batch(model, probe).to(expected.logits.dtype)
    parity = require_parity(expected.what, logits, expected.logits, hint=expected.hint)
    del logits
    trim_heap()
    return {expected.what: parity, "stepwise": require_parity("stepwise", *logits_by_steps(model, probe))}


def expected_of_cut(cut: Checkpoint, probe: Probe) -> Expected:
    """What a model computes that was cut further than is exact, in float64."""
    model = in_float64(MambaLM.from_tensors(cut.config, cut.tensors, shares_memory=True))
    return Expected("cut", logits_one_by_one(model, probe))


def _verify_float64(
    source: Source, config: MambaConfig, tensors: dict[str, Tensor], probe: Probe
) -> tuple[Parity, Expected]:
    """The export's mathematics: both models in float64, without any rounding to float32 between.

    Returns:
        How far the export's logits lie from the trained model's, and those in float32.
    """
    trained = logits_one_by_one(in_float64(trained_model(source)), probe)
    exported = logits_as_batch(in_float64(MambaLM.from_tensors(config, tensors, shares_memory=True)), probe)
    parity = require_parity("float64", exported, trained)
    del exported
    trim_heap()
    with releasing_layers(trained_model(source)) as model:
        single = logits_one_by_one(model, probe)
    rounding = max(float((a - b).abs().max()) for a, b in zip(single, trained, strict=True))
    hint = f" (in float64 both agree, and the trained model's own float32 logits are off by {rounding:.3g})"
    return parity, Expected("float32", single, hint)
