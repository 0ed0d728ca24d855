"""Writing a model folder in another format: aside, read back strictly, renamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import yunmin
from export.formats.destination import MARKER_FILE
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.errors import VerificationError
from yunmin.files import atomic_folder, sha256_file, write_json
from yunmin.tokenizer import copy_tokenizer

# what the mathematics and the choice of tokens read from a config; the rest concerns training from scratch
_COMPUTED = (
    "vocab_size n_tokens d_model d_inner d_state dt_rank d_conv norm_eps use_bias use_conv_bias tie_word_embeddings "
    "eos_token_ids"
).split()


def write_folder(
    kind: str,
    write: Callable[[Path, Checkpoint], None],
    out: Path,
    checkpoint: Checkpoint,
    *,
    force: bool,
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes a folder whole and proven, or not at all.

    Args:
        kind: of the format, for the marker.
        write: fills the folder with config and weights.
        out: the folder's name.
        checkpoint: what it is made from.
        force: whether an existing folder gives way.
        report: called with the name of each stage as it begins.

    Raises:
        VerificationError: what was read back is not the checkpoint.
        OSError: the folder cannot be written.
    """
    say = report or (lambda _: None)
    with atomic_folder(out, replace=force) as aside:
        say(f"writing {kind}")
        write(aside, checkpoint)
        copy_tokenizer(checkpoint.folder, aside)
        say("verifying what was written")
        require_same(aside, checkpoint, out)
        hashes = {path.name: sha256_file(path) for path in sorted(aside.iterdir())}
        write_json(aside / MARKER_FILE, {"format": kind, "yunmin": yunmin.__version__, "sha256": hashes})


def require_same(folder: Path, checkpoint: Checkpoint, out: Path) -> None:
    """Reads a folder strictly and compares it with what it was made from.

    Every tensor has to be the same bit for bit, and every value of the config that the network reads: two such models
    are one function, so that no logits need to be compared.

    Raises:
        VerificationError: names the value or the tensor that differs.
    """
    found = load_checkpoint(folder)
    for name in _COMPUTED:
        ours, theirs = getattr(checkpoint.config, name), getattr(found.config, name)
        if ours != theirs:
            raise VerificationError(f"{out}: read back, {name} is {theirs}, expected {ours}; nothing was written")
    if found.tensors.keys() != checkpoint.tensors.keys():
        odd = min(found.tensors.keys() ^ checkpoint.tensors.keys())
        raise VerificationError(f"{out}: read back, tensor {odd!r} is there only once; nothing was written")
    for name, tensor in checkpoint.tensors.items():
        if not torch.equal(found.tensors[name], tensor):
            raise VerificationError(f"{out}: read back, tensor {name!r} differs; nothing was written")
