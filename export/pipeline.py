"""Checkpoint in, proven artifact out: the stages in their order, and nothing in place before the proof."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from export.adapter import Adapter, read_adapter, refuse_other_base, refuse_overlaps
from export.fold import fold_gates, surviving_channels, surviving_states, take_survivors
from export.merge import apply_masks, merge_adapter
from export.provenance import provenance_of
from export.verify import Probe, logits_as_batch, logits_by_steps, logits_one_by_one, make_probe, require_parity
from export.write import check_destination, write_artifact
from yunmin.artifact import Manifest, Parity, is_artifact, read_manifest
from yunmin.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.pillars import Pillars, adapter_folders, load_pillars
from yunmin.trained import build_trained


@dataclass(frozen=True)
class Source:
    """Everything an export reads.

    Attributes:
        name: as the user named it.
        checkpoint: weights in their starting order and shape.
        pillars: gates, masks and order beside them.
        adapters: to merge, by the name under which the trained model holds them.
    """

    name: str
    checkpoint: Checkpoint
    pillars: Pillars
    adapters: Mapping[str, Adapter]


@dataclass(frozen=True)
class Compact:
    """What an export makes of it.

    Attributes:
        config: with the widths that are left.
        tensors: merged, folded, cut and ordered.
        channels: per layer, the starting inner channel at each position.
    """

    config: MambaConfig
    tensors: dict[str, Tensor]
    channels: tuple[Tensor, ...]

    def cast(self, dtype: torch.dtype) -> Compact:
        return replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def export(
    source: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path] = (),
    data: str | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Manifest:
    """Merges, folds, cuts, orders and verifies a model, and writes it as an artifact.

    Args:
        source: run folder, a checkpoint of it, an artifact, a plain Mamba checkpoint, or a Hub id when online.
        out: folder to write; appears whole or not at all.
        adapters: PEFT folders to merge besides those of the checkpoint.
        data: text to verify on, as `yunmin.corpus.read_documents` reads it; None takes the standard library's.
        force: whether an existing artifact at `out` is replaced.
        progress: called with the name of each stage as it begins.

    Returns:
        The manifest that was written.

    Raises:
        CheckpointError: the source or an adapter is damaged or cannot be merged exactly, or a layer would vanish.
        ArtifactError: the source is an artifact that does not match its manifest, or `out` cannot be written.
        VerificationError: the result does not compute what the trained model computes; nothing is left at `out`.
    """
    out = Path(out)

    def report(stage: str) -> None:
        if progress is not None:
            progress(stage)

    check_destination(out, force=force)
    report("reading")
    read = read_source(source, adapters)
    probe = make_probe(read.checkpoint.tokenizer, read.checkpoint.config.n_tokens, data)
    report("merging, folding, cutting")
    compact = compact_model(read)
    report(f"verifying in float64 on {probe.tokens} tokens")
    trained, parity = _verify_float64(read, compact, probe)
    compact = compact.cast(torch.float32)  # the one rounding

    def verify_written(folder: Path) -> dict[str, Parity]:
        report(f"verifying what was written in float32 on {probe.tokens} tokens")
        return {"float64": parity, **_verify_float32(read, folder, probe, trained)}

    report("writing")
    return write_artifact(
        out,
        source=read.checkpoint,
        config=compact.config,
        tensors=compact.tensors,
        channels=compact.channels,
        provenance=provenance_of(read.name, read.checkpoint, read.pillars, read.adapters, probe.origin),
        verify=verify_written,
        force=force,
    )


def read_source(source: str | Path, adapters: Sequence[str | Path] = ()) -> Source:
    """Reads a checkpoint with its pillars, its adapters and further ones.

    Raises:
        CheckpointError: something is missing, damaged, does not fit, or cannot be merged exactly.
        ArtifactError: it is an artifact that does not match its manifest.
    """
    folder = find_checkpoint(source)
    if is_artifact(folder):
        read_manifest(folder)
    checkpoint = load_checkpoint(folder)
    config = checkpoint.config
    pillars = load_pillars(folder, config)
    folders = {
        **adapter_folders(folder),
        **{f"adapter{number}": Path(path) for number, path in enumerate(adapters)},
    }
    read = {name: read_adapter(path, config) for name, path in folders.items()}
    refuse_overlaps(read.values(), pillars.weight_masks)
    for adapter in read.values():
        refuse_other_base(adapter, checkpoint.tensors)
    return Source(str(source), checkpoint, pillars, read)


def compact_model(source: Source, dtype: torch.dtype = torch.float64) -> Compact:
    """Runs every stage on a source's tensors.

    Args:
        source: not modified.
        dtype: to compute in; the result has it, too.

    Raises:
        CheckpointError: a layer would lose every channel or state, or a gate is not finite.
    """
    config = source.checkpoint.config
    channels, states = surviving_channels(source.pillars), surviving_states(source.pillars)
    tensors = {name: tensor.to(dtype) for name, tensor in source.checkpoint.tensors.items()}
    config, tensors = apply_masks(config, tensors, source.pillars.weight_masks)
    for adapter in source.adapters.values():
        config, tensors = merge_adapter(config, tensors, adapter)
    config, tensors = fold_gates(config, tensors, source.pillars)
    config, tensors = take_survivors(config, tensors, channels, states)
    return Compact(config, tensors, channels)


def _trained(source: Source) -> MambaLM:
    folders = {name: adapter.folder for name, adapter in source.adapters.items()}
    return build_trained(source.checkpoint, source.pillars, folders)


def _verify_float64(source: Source, compact: Compact, probe: Probe) -> tuple[Tensor, Parity]:
    """The export's mathematics: both models in float64, without any rounding to float32 between.

    Returns:
        The trained model's logits (tokens, V), and how far the export's lie from them.
    """
    trained = logits_one_by_one(_trained(source).double(), probe)  # the model is released before the next is built
    exported = logits_as_batch(MambaLM.from_tensors(compact.config, compact.tensors), probe)
    return trained, require_parity("float64", exported, trained)


def _verify_float32(source: Source, folder: Path, probe: Probe, trained_float64: Tensor) -> dict[str, Parity]:
    """The artifact as it was written, read back from its files."""
    trained = logits_one_by_one(_trained(source), probe)
    rounding = float((trained - trained_float64).abs().max())
    hint = f" (in float64 both agree, and the trained model's own float32 logits are off by {rounding:.3g})"
    written = load_checkpoint(folder)
    model = MambaLM.from_tensors(written.config, written.tensors)
    return {
        "float32": require_parity("float32", logits_as_batch(model, probe), trained, hint=hint),
        "stepwise": require_parity("stepwise", *logits_by_steps(model, probe)),
    }
