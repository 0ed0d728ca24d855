"""Writing the artifact folder: whole and proven, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def write_artifact(
    out: Path,
    *,
    source: Checkpoint,
    artifact: Checkpoint,
    channels: Sequence[Tensor],
    residual: Tensor,
    provenance: Mapping[str, Any],
    verify: Callable[[Path], Proof],
    force: bool = False,
) -> Manifest:
    """Writes an artifact aside, has it verified there, and gives it its name.

    Args:
        out: the artifact's final folder.
        source: the checkpoint it was made of; its tokenizer is copied and its widths are what was there before.
        artifact: what is written: config, tensors, quantization.
        channels: per layer, the starting inner channel at each position, int64.
        residual: the starting channel of the residual stream at each position, int64 (d,); written where it changed.
        provenance: for the manifest.
        verify: given the folder without its manifest; raises unless the model in it may be published.
        force: whether an existing folder gives way.

    Returns:
        The manifest that was written.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    config, quantization = artifact.config, artifact.quantization
    before, after = cost_of(source.config), cost_of(config, quantization)
    try:
        with atomic_folder(out, replace=force) as folder:
            write_checkpoint(folder, config, artifact.tensors, quantization)
            copy_tokenizer(source.folder, folder)
            write_scan_order(folder, channels, starting_widths=source.config.d_inner)
            if not torch.equal(residual, torch.arange(config.d_model)):
                np.save(folder / "residual_order.npy", residual.numpy())
            proof = verify(folder)
            card = model_card(
                out.absolute().name,
                config=config,
                is_untied=source.config.tie_word_embeddings and not config.tie_word_embeddings,
                quantization=quantization.format,
                before=before,
                after=after,
                parity=proof.parity,
                perplexity=proof.perplexity,
                provenance=provenance,
                has_tokenizer=source.tokenizer is not None,
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
            return write_manifest(
                folder,
                provenance=provenance,
                before=before,
                after=after,
                cuts=_cuts(source.config, config),
                parity=proof.parity,
                quantization=quantization.format,
                perplexity=proof.perplexity,
            )
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written: {error.strerror or error}") from None


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
