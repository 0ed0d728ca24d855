"""The model that all contestants read: one Hugging Face folder in fp32."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.progress import say
from benchmarks.shapes import random_checkpoint
from yunmin.artifact import is_artifact, load_artifact
from yunmin.checkpoint import Checkpoint, load_checkpoint, refuse_quantized, write_checkpoint
from yunmin.cost import cost_of
from yunmin.errors import RequestError
from yunmin.files import atomic_folder
from yunmin.pillars import PILLARS_FILE


def plain_checkpoint(model: str | None, shape: str | None, out: Path) -> Checkpoint:
    """The model in fp32, as a Hugging Face folder below `out` that every peer reads.

    Args:
        model: artifact, plain checkpoint, or Hub id; None for random weights of `shape`.
        shape: name of a known size; None for `model`.
        out: the folder is written below it, or found again.

    Raises:
        RequestError: the weights alone are not the model.
        CheckpointError: missing or damaged files, or weights that are quantized.
    """
    if shape is not None:
        say(f"random weights of the shape {shape}")
        return load_checkpoint(random_checkpoint(shape, out / "models" / shape / "fp32"))
    assert model is not None
    if is_artifact(model):
        checkpoint, _ = load_artifact(model)
        refuse_quantized(model, checkpoint.quantization)
    else:
        checkpoint = load_checkpoint(model)
        for part, what in ((PILLARS_FILE, "gates"), ("adapters", "adapters")):
            if (checkpoint.folder / part).exists():
                raise RequestError(
                    "MODEL", f"{checkpoint.folder} has {what}: export it first, then compare the artifact"
                )
    folder = out / "models" / f"{checkpoint.folder.resolve().name}-{_digest(checkpoint)}" / "fp32"
    if not (folder / "config.json").is_file():
        with atomic_folder(folder) as aside:
            write_checkpoint(aside, checkpoint.config, checkpoint.tensors)
    return load_checkpoint(folder)


def _digest(checkpoint: Checkpoint) -> str:
    """Tells models of one name apart, so that files made for another are not taken for this one's."""
    digest = hashlib.sha256(json.dumps(asdict(checkpoint.config), sort_keys=True).encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:10]


def describe(plain: Checkpoint, model: str | None, shape: str | None) -> dict[str, Any]:
    """Name, source and size, for a report."""
    config = plain.config
    return {
        "name": shape if model is None else Path(model).name,
        "source": model or f"random weights of the shape {shape}",
        "d_model": config.d_model,
        "d_inner": list(config.d_inner),
        "d_state": list(config.d_state),
        "vocab_size": config.vocab_size,
        **cost_of(config).to_dict(),
    }
