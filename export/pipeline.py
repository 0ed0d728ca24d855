"""Checkpoint in, proven artifact out: the stages in their order, and nothing in place before the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.compact import Compact, Source, compact_model, read_source, trained_model
from export.order import ORDERS_BY_TEXT, OrderKind, reordered
from export.provenance import provenance_of
from export.quality import measure
from export.quantize import quantize_checkpoint
from export.texts import CALIBRATION_TOKENS, MEASURED_TOKENS, Texts, read_texts
from export.verify import Probe, logits_as_batch, logits_by_steps, logits_one_by_one, make_probe, require_parity
from export.verify_quantized import verify_quantized
from export.write import Proof, check_destination, write_artifact
from yunmin.artifact import Manifest, Parity
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.errors import ConfigError
from yunmin.model import MambaLM
from yunmin.quantization.layout import Format, Quantization

Report = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What an export is asked for besides exactness.

    Attributes:
        data: text to verify and to measure perplexity on; None takes the standard library's.
        quantize: how weights are stored.
        calibrate: text that int4 weights are rounded for, and activations are observed on; without it int4 weights are
            rounded to nearest.
        order: of the channels.
        measured_tokens, calibration_tokens: how many tokens of either text are read at most.
    """

    data: str | None = None
    quantize: Format = "none"
    calibrate: str | None = None
    order: OrderKind = "trained"
    measured_tokens: int = MEASURED_TOKENS
    calibration_tokens: int = CALIBRATION_TOKENS

    def __post_init__(self) -> None:
        if self.calibrate is not None and not self.calibrates:
            raise ConfigError(
                f"--calibrate {self.calibrate}: expected --quantize int4, or --order {' or '.join(ORDERS_BY_TEXT)}"
            )
        for name in ("measured_tokens", "calibration_tokens"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name} must be at least 2, got {getattr(self, name)}")

    @property
    def calibrates(self) -> bool:
        """Whether text is needed to calibrate on."""
        return self.rounds_by_text or self.order in ORDERS_BY_TEXT

    @property
    def rounds_by_text(self) -> bool:
        return self.calibrate is not None and self.quantize == "int4"

    @property
    def measures(self) -> bool:
        """Whether something is done that perplexity has to show."""
        return self.quantize != "none"


def export(
    source: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    options: Options = Options(),
    force: bool = False,
    progress: Report | None = None,
) -> Manifest:
    """Merges, folds, cuts, orders and verifies a model, quantizes it where asked to, and writes it as an artifact.

    Args:
        source: run folder, a checkpoint of it, an artifact, a plain Mamba checkpoint, or a Hub id when online.
        out: folder to write; appears whole or not at all.
        adapters: PEFT folders to merge besides those of the checkpoint.
        options: what else is wanted.
        force: whether an existing artifact at `out` is replaced.
        progress: called with the name of each stage as it begins.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: the source or an adapter is damaged or cannot be merged exactly, a layer would vanish, or the
            weights are quantized already.
        ArtifactError: the source is an artifact that does not match its manifest, or `out` cannot be written.
        VerificationError: the result does not compute what the trained model computes, or the runtime not what the
            stored integers stand for; nothing is left at `out`.
        DataError, TokenizerError: a text cannot be read or has nothing to measure.
    """
    out = Path(out)
    report = progress or (lambda _: None)
    check_destination(out, force=force)
    report("reading")
    read = read_source(source, adapters)
    config = read.checkpoint.config
    probe = make_probe(read.checkpoint.tokenizer, config.n_tokens, options.data)
    texts = _texts(read, options)
    report("merging, folding, cutting")
    compact = reordered(compact_model(read), options.order, texts.calibration if texts is not None else None, report)
    report(f"verifying in float64 on {probe.tokens} tokens")
    trained, parity = _verify_float64(read, compact, probe)
    compact = compact.cast(torch.float32)  # the one rounding
    exact = replace(read.checkpoint, config=compact.config, tensors=compact.tensors)
    proof = Proof({"float64": parity}, {})
    artifact, facts = exact, dict[str, Any](order=options.order)
    if options.quantize != "none":
        report(f"verifying in float32 on {probe.tokens} tokens")
        proof = proof.joined(_verify_float32(read, exact, probe, trained))
        if texts is not None:
            proof = proof.joined(measured={"before": measure(exact, texts.measured, report, "as trained")})
        calibration = texts.calibration if texts is not None and options.rounds_by_text else None
        artifact = quantize_checkpoint(exact, Quantization(options.quantize), calibration, report)
        if calibration is not None:
            facts["calibration"] = calibration.describe()

    def verify_written(folder: Path) -> Proof:
        report(f"verifying what was written on {probe.tokens} tokens")
        written = load_checkpoint(folder, quantized=True)
        if options.quantize == "none":
            return proof.joined(_verify_float32(read, written, probe, trained))
        found = proof.joined(verify_quantized(written, probe))
        if texts is None:
            return found
        return found.joined(measured={"after": measure(written, texts.measured, report, f"in {options.quantize}")})

    report("writing")
    return write_artifact(
        out,
        source=read.checkpoint,
        artifact=artifact,
        channels=compact.channels,
        residual=compact.residual,
        provenance=provenance_of(read, probe.origin) | facts,
        verify=verify_written,
        force=force,
    )


def _texts(source: Source, options: Options) -> Texts | None:
    """What to measure and calibrate on; None for a model without tokenizer, where nothing depends on text."""
    tokenizer = source.checkpoint.tokenizer
    if not (options.measures or options.calibrates) or (tokenizer is None and not options.calibrates):
        return None
    return read_texts(
        tokenizer,
        source.checkpoint.config.n_tokens,
        options.data,
        options.calibrate,
        calibrates=options.calibrates,
        measured_tokens=options.measured_tokens,
        calibration_tokens=options.calibration_tokens,
    )


def _verify_float64(source: Source, compact: Compact, probe: Probe) -> tuple[Tensor, Parity]:
    """The export's mathematics: both models in float64, without any rounding to float32 between.

    Returns:
        The trained model's logits (tokens, V), and how far the export's lie from them.
    """
    trained = logits_one_by_one(trained_model(source).double(), probe)  # released before the next model is built
    exported = logits_as_batch(MambaLM.from_tensors(compact.config, compact.tensors), probe)
    return trained, require_parity("float64", exported, trained)


def _verify_float32(source: Source, exported: Checkpoint, probe: Probe, trained_float64: Tensor) -> dict[str, Parity]:
    """The exported weights in float32, as they are written or were read back."""
    trained = logits_one_by_one(trained_model(source), probe)
    rounding = float((trained - trained_float64).abs().max())
    hint = f" (in float64 both agree, and the trained model's own float32 logits are off by {rounding:.3g})"
    model = MambaLM.from_tensors(exported.config, exported.tensors)
    return {
        "float32": require_parity("float32", logits_as_batch(model, probe), trained, hint=hint),
        "stepwise": require_parity("stepwise", *logits_by_steps(model, probe)),
    }
