"""Writing the artifact folder: whole and proven, or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.card import model_card
from yunmin.artifact import Manifest, Parity, PerplexityRecord, is_artifact, write_manifest
from yunmin.checkpoint import Checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ArtifactError
from yunmin.files import atomic_folder
from yunmin.pillars import write_scan_order
from yunmin.tokenizer import copy_tokenizer


@dataclass(frozen=True)
class Proof:
    """What an artifact was shown to be.

    Attributes:
        parity: how far logits lie from those they must equal, by claim.
        perplexity: "before" and "after", where measured.
    """

    parity: Mapping[str, Parity]
    perplexity: Mapping[str, PerplexityRecord]

    def joined(
        self, parity: Mapping[str, Parity] | None = None, measured: Mapping[str, PerplexityRecord] | None = None
    ) -> Proof:
        """This one with further claims and figures."""
        return Proof({**self.parity, **(parity or {})}, {**self.perplexity, **(measured or {})})


def check_destination(out: Path, *, force: bool) -> None:
    """Looks before any work whether an artifact may be put there.

    Raises:
        ArtifactError: something is there and `force` is off, or it is no artifact, which `force` never replaces.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out}: expected a folder to write, found a file or a link")
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise ArtifactError(f"{out}: cannot be created, {parent} is a file")
            break
    if not out.exists():
        return
    if not force:
        raise ArtifactError(f"{out}: exists already; --force replaces an artifact")
    if not is_artifact(out) and any(out.iterdir()):
        raise ArtifactError(f"{out}: holds other files and no artifact; --force replaces only an artifact")


@contextlib.contextmanager
def artifact_folder(out: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes the artifact when the block ends without an error.

    Raises:
        ArtifactError: it cannot be written.
    """
    try:
        with atomic_folder(out, replace=force) as folder:
            yield folder
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written: {error.strerror or error}") from None


def write_weights(
    folder: Path, source: Checkpoint, artifact: Checkpoint, channels: Sequence[Tensor], residual: Tensor
) -> None:
    """Writes what an artifact computes with.

    Args:
        folder: of the artifact, not yet under its final name.
        source: the checkpoint it was made of; its tokenizer is copied and its widths are what was there before.
        artifact: what is written: config, tensors, quantization.
        channels: per layer, the starting inner channel at each position, int64.
        residual: the starting channel of the residual stream at each position, int64 (d,); written where it changed.
    """
    write_checkpoint(folder, artifact.config, artifact.tensors, artifact.quantization)
    copy_tokenizer(source.folder, folder)
    write_scan_order(folder, channels, starting_widths=source.config.d_inner)
    if not torch.equal(residual, torch.arange(artifact.config.d_model)):
        np.save(folder / "residual_order.npy", residual.numpy())


def finish_artifact(
    folder: Path, name: str, *, before: MambaConfig, written: Checkpoint, provenance: Mapping[str, Any], proof: Proof
) -> Manifest:
    """Writes the model card and the manifest, which vouches for every other file in the folder.

    Args:
        folder: of the artifact, not yet under its final name.
        name: that it is to have.
        before: config of the checkpoint it was made of.
        written: what was read back.
        provenance: for the manifest.
        proof: what was shown of it.
    """
    config, quantization = written.config, written.quantization
    costs = {"before": cost_of(before), "after": cost_of(config, quantization)}
    card = model_card(
        name,
        config=config,
        is_untied=before.tie_word_embeddings and not config.tie_word_embeddings,
        quantization=quantization.format,
        parity=proof.parity,
        perplexity=proof.perplexity,
        provenance=provenance,
        has_tokenizer=written.tokenizer is not None,
        **costs,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    return write_manifest(
        folder,
        provenance=provenance,
        cuts=_cuts(before, config),
        parity=proof.parity,
        quantization=quantization.format,
        perplexity=proof.perplexity,
        **costs,
    )


def _cuts(before: MambaConfig, after: MambaConfig) -> list[dict[str, int]]:
    return [
        {
            "d_inner_before": before.d_inner[layer],
            "d_inner_after": after.d_inner[layer],
            "d_state_before": before.d_state[layer],
            "d_state_after": after.d_state[layer],
        }
        for layer in range(before.n_layers)
    ]
