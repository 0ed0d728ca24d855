"""Checkpoint in, proven artifact out: the stages in their order, and nothing in place before the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from export.change import changed
from export.compact import Compact, Source, compact_model, read_source, trained_model
from export.curve_plot import CURVE_FILE, can_plot, plot_curve
from export.options import EXACT, Options
from export.order import reordered
from export.provenance import provenance_of
from export.quality import measure
from export.texts import Texts, read_texts
from export.verify import Probe, logits_as_batch, logits_by_steps, logits_one_by_one, make_probe, require_parity
from export.verify_quantized import verify_quantized
from export.write import Proof, check_destination, write_artifact
from yunmin.artifact import Manifest, Parity
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.model import MambaLM

Report = Callable[[str], None]


def export(
    source: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    options: Options = EXACT,
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
            stored integers stand for, or nothing smaller keeps the perplexity; nothing is left at `out`.
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
    if options.measures:
        report(f"verifying in float32 on {probe.tokens} tokens")
        proof = proof.joined(_verify_float32(read, exact, probe, trained))
        if texts is not None:
            proof = proof.joined(measured={"before": measure(exact, texts.measured, report, "as trained")})
    change = changed(exact, proof.perplexity.get("before"), texts, options, report)

    def verify_written(folder: Path) -> Proof:
        report(f"verifying what was written on {probe.tokens} tokens")
        if "search" in change.facts and can_plot():
            plot_curve(folder / CURVE_FILE, change.facts["search"])
        written = load_checkpoint(folder, quantized=True)
        if written.quantization.format != "none":
            proven = proof.joined(verify_quantized(written, probe))
        elif change.artifact is exact:
            return proof.joined(_verify_float32(read, written, probe, trained))
        else:
            proven = proof.joined(_verify_cut(change.artifact, written, probe))
        if texts is None:
            return proven
        return proven.joined(measured={"after": measure(written, texts.measured, report, "of what was written")})

    report("writing")
    return write_artifact(
        out,
        source=read.checkpoint,
        artifact=change.artifact,
        channels=tuple(channels[index] for channels, index in zip(compact.channels, change.kept, strict=True)),
        residual=compact.residual,
        provenance=provenance_of(read, compact.channels, probe.origin) | change.facts,
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


def _verify_cut(cut: Checkpoint, written: Checkpoint, probe: Probe) -> dict[str, Parity]:
    """A model that was cut further than is exact, as it was read back, against the same in float64."""
    wide = {name: tensor.double() for name, tensor in cut.tensors.items()}
    expected = logits_one_by_one(MambaLM.from_tensors(cut.config, wide), probe)
    model = MambaLM.from_tensors(written.config, written.tensors)
    return {
        "cut": require_parity("cut", logits_as_batch(model, probe).double(), expected),
        "stepwise": require_parity("stepwise", *logits_by_steps(model, probe)),
    }
