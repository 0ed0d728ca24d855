"""Checkpoint in, a model for other people's runtimes out: the same exact stages and proofs as an artifact's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from export.compact import compact_config, read_source
from export.exact import exact_export, verify_float32
from export.formats import check_format, check_format_destination, write_format
from export.options import Options
from export.pipeline import texts_for
from export.verify import make_probe
from export.write import Proof


def export_format(
    source: str | Path,
    out: str | Path,
    *,
    options: Options,
    adapters: Sequence[str | Path] = (),
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Merges, folds, cuts, orders and verifies a model, and writes it in the format that `options` name.

    Args:
        source: as in `export.pipeline.export`.
        out: folder, or GGUF file, to write; appears whole or not at all.
        options: with a format other than "artifact".
        adapters: PEFT folders to merge besides those of the checkpoint.
        force: whether what such an export wrote at `out` before gives way.
        progress: called with the name of each stage as it begins.

    Returns:
        What the weights were shown to be.

    Raises:
        ConfigError: the format cannot say what the model is; names the layer.
        CheckpointError, ArtifactError, VerificationError, DataError, TokenizerError: as `export.pipeline.export`.
        MissingExtraError: a package is missing that the format needs.
    """
    report = progress or (lambda _: None)
    assert options.format != "artifact"
    check_format_destination(options.format, out, force=force)
    gguf_type = options.gguf_type or "q8_0"
    report("reading")
    read = read_source(source, adapters)
    tokenizer = read.checkpoint.tokenizer
    check_format(options.format, compact_config(read), tokenizer, gguf_type=gguf_type)
    probe = make_probe(tokenizer, read.checkpoint.config.n_tokens, options.data)
    exact = exact_export(read, probe, texts_for(read, options), options, report)
    report(f"verifying in float32 on {probe.tokens} tokens")
    proof = Proof(exact.parity, {}).joined(verify_float32(exact.checkpoint, exact.expected, probe))
    write_format(options.format, out, exact.checkpoint, gguf_type=gguf_type, force=force, report=report)
    return proof
