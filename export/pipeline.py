"""Checkpoint in, proven artifact out: the stages in their order, and nothing in place before the proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from export.change import changed
from export.compact import Source, read_source
from export.curve_plot import CURVE_FILE, can_plot, plot_curve
from export.exact import Expected, exact_export, expected_of_cut, verify_float32
from export.options import EXACT, Options
from export.provenance import provenance_of
from export.quality import measure
from export.texts import Texts, read_texts
from export.verify import Probe, make_probe
from export.verify_quantized import verify_quantized
from export.write import Proof, artifact_folder, check_destination, finish_artifact, write_weights
from yunmin.artifact import Manifest, Parity
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.memory import trim_heap

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
        VerificationError: the result does not compute what the trained model computes, or a runtime not what the
            stored weights stand for, or nothing smaller keeps the perplexity; nothing is left at `out`, but where it is
            the repository for Triton that fails, which is written from a finished artifact.
        ConfigError: options that do not go together, or a precision that does not hold the weights.
        DataError, TokenizerError: a text cannot be read or has nothing to measure.
        StateError: an initial state of a repository for Triton is missing, damaged or another model's.
        MissingExtraError: an ONNX graph or a repository for Triton is wanted and its packages are missing.
    """
    out = Path(out)
    report = progress or (lambda _: None)
    check_destination(out, force=force)
    if options.onnx:
        from export.onnx_graph.stage import require_onnx

        require_onnx("--onnx")
    if options.triton is not None:
        from export.onnx_graph.stage import require_onnx
        from export.triton.repository import check_repository, named_states

        require_onnx("--triton")
        states = named_states(options.triton_initial_states)
        check_repository(Path(options.triton), out, states=tuple(states), force=force)
    with artifact_folder(out, force=force) as folder:
        made = _write_weights(folder, source, adapters, options, report)  # its tensors go with its frame
        trim_heap()
        report(f"verifying what was written on {made.probe.tokens} tokens")
        written = load_checkpoint(folder, quantized=True)
        proof = made.proof.joined(_verify_written(written, made))
        if made.texts is not None:
            proof = proof.joined(
                measured={"after": measure(written, made.texts.measured, report, "of what was written")}
            )
        facts, written = made.facts, replace(written, tensors={})
        if options.onnx:
            from export.onnx_graph.stage import add_graph

            graph, parity = add_graph(folder, written.quantization.format, options, made.probe, report)
            facts, proof = {**facts, "onnx": graph}, proof.joined(parity)
        report("hashing")
        manifest = finish_artifact(
            folder, out.absolute().name, before=made.before, written=written, provenance=facts, proof=proof
        )
    if options.triton is not None:
        from export.triton.repository import write_repository

        report("writing and verifying the model repository for Triton")
        write_repository(Path(options.triton), out, initial_states=states, force=force)
    return manifest


@dataclass(frozen=True)
class _Made:
    """What is left of an export's first half once its weights are written.

    Attributes:
        before: config of the source.
        facts: for the manifest.
        proof: of what led to the weights.
        expected: what they must compute in float32; None where they are integers.
        probe: to compare on.
        texts: to measure on, where what is exact was changed.
    """

    before: MambaConfig
    facts: dict[str, Any]
    proof: Proof
    expected: Expected | None
    probe: Probe
    texts: Texts | None


def _write_weights(
    folder: Path, source: str | Path, adapters: Sequence[str | Path], options: Options, report: Report
) -> _Made:
    """Everything up to the weights in the folder."""
    report("reading")
    read = read_source(source, adapters)
    probe = make_probe(read.checkpoint.tokenizer, read.checkpoint.config.n_tokens, options.data)
    texts = texts_for(read, options)
    exact = exact_export(read, probe, texts, options, report)
    checkpoint, expected = exact.checkpoint, exact.expected
    proof = Proof(exact.parity, {})
    if options.measures:
        report(f"verifying in float32 on {probe.tokens} tokens")
        proof = proof.joined(verify_float32(checkpoint, expected, probe))
        if texts is not None:
            proof = proof.joined(measured={"before": measure(checkpoint, texts.measured, report, "as trained")})
    change = changed(checkpoint, proof.perplexity.get("before"), texts, options, report)
    report("writing")
    artifact = change.artifact
    channels = tuple(channels[index] for channels, index in zip(exact.channels, change.kept, strict=True))
    write_weights(folder, read.checkpoint, artifact, channels, exact.residual)
    if "search" in change.facts and can_plot():
        plot_curve(folder / CURVE_FILE, change.facts["search"])
    made = _Made(
        before=read.checkpoint.config,
        facts=provenance_of(read, exact.channels, probe.origin) | change.facts,
        proof=proof,
        expected=expected if artifact is checkpoint else None,
        probe=probe,
        texts=texts if options.measures else None,
    )
    if artifact is not checkpoint and artifact.quantization.format == "none":
        return replace(made, expected=expected_of_cut(artifact, probe))
    return made


def _verify_written(written: Checkpoint, made: _Made) -> dict[str, Parity]:
    if written.quantization.format != "none":
        return verify_quantized(written, made.probe)
    assert made.expected is not None
    return verify_float32(written, made.expected, made.probe)


def texts_for(source: Source, options: Options) -> Texts | None:
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
