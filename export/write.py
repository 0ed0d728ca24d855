"""Writing the artifact folder: whole and proven, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from export.card import model_card
from yunmin.artifact import Manifest, Parity, is_artifact, write_manifest
from yunmin.checkpoint import Checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import ArtifactError
from yunmin.files import atomic_folder
from yunmin.pillars import write_scan_order
from yunmin.tokenizer import copy_tokenizer


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
    config: MambaConfig,
    tensors: Mapping[str, Tensor],
    channels: Sequence[Tensor],
    provenance: Mapping[str, Any],
    verify: Callable[[Path], Mapping[str, Parity]],
    force: bool = False,
) -> Manifest:
    """Writes an artifact aside, has it verified there, and gives it its name.

    Args:
        out: the artifact's final folder.
        source: the checkpoint it was made of; its tokenizer is copied and its widths are what was there before.
        config: of the artifact.
        tensors: of the artifact, float32.
        channels: per layer, the starting inner channel at each position, int64.
        provenance: for the manifest.
        verify: given the folder without its manifest; raises unless the model in it may be published.
        force: whether an existing folder gives way.

    Returns:
        The manifest that was written.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    before, after = cost_of(source.config), cost_of(config)
    try:
        with atomic_folder(out, replace=force) as folder:
            write_checkpoint(folder, config, tensors)
            copy_tokenizer(source.folder, folder)
            write_scan_order(folder, channels, starting_widths=source.config.d_inner)
            parity = verify(folder)
            card = model_card(
                out.absolute().name,
                config=config,
                is_untied=source.config.tie_word_embeddings and not config.tie_word_embeddings,
                before=before,
                after=after,
                parity=parity,
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
                parity=parity,
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
