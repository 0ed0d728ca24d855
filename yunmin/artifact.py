"""Artifact folders: a compact checkpoint with a manifest that proves what it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.cost import Cost
from yunmin.errors import ArtifactError, CheckpointError, ConfigError
from yunmin.files import sha256_file, write_json
from yunmin.quantization.layout import Format
from yunmin.tokenizer import CHAT_TEMPLATE_FILE

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
_REQUIRED_FILES = ("config.json", "model.safetensors")
_READ_FILES = (
    *_REQUIRED_FILES,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    CHAT_TEMPLATE_FILE,
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    """A file of the artifact, by its hash."""

    sha256: str
    bytes: int


class Parity(_Record):
    """How far the artifact's logits lie from the trained model's, on real text.

    Attributes:
        max_abs_error: largest difference of any logit.
        largest_logit: largest magnitude among the trained model's logits.
        tolerance: limit on their ratio.
        tokens: positions compared.
    """

    max_abs_error: float
    largest_logit: float
    tolerance: float
    tokens: int

    @property
    def relative_error(self) -> float:
        largest = self.largest_logit
        return self.max_abs_error / largest if largest else (math.inf if self.max_abs_error else 0.0)

    @property
    def holds(self) -> bool:
        return self.relative_error <= self.tolerance  # false for NaN


class PerplexityRecord(_Record):
    """A perplexity on held-out text.

    Attributes:
        token_perplexity: exp of the mean negative log-likelihood per token.
        tokens: scored.
        window, stride: tokens read at once, and scored per window.
        source: of the text.
    """

    token_perplexity: float
    tokens: int
    window: int
    stride: int
    source: str


class Manifest(_Record):
    """What `manifest.json` records.

    Attributes:
        provenance: where the weights came from: source, its hashes, adapters, the yunmin version.
        files: every file but the manifest itself.
        before, after: parameters, weight bytes, FLOPs per token, state bytes.
        cuts: per layer, the inner channels and states kept.
        parity: "float32" (the artifact's own tensors) and "float64" (the mathematics) against the trained model, and
            "stepwise": the artifact's prefill and steps against its own whole sequences. Where more was done to the
            weights than is exact, the first two are about the weights before; "layers" (one at a time, the worst)
            and "quantized" (all of them) then compare the runtime that serves the stored integers with plain torch, and
            "cut" the artifact's tensors with the model that was cut further.
        quantization: how the weights are stored.
        perplexity: "before" (as trained) and "after" (the artifact), where they were measured.
    """

    format_version: int
    provenance: dict[str, Any]
    files: dict[str, FileRecord]
    before: dict[str, int]
    after: dict[str, int]
    cuts: list[dict[str, int]]
    parity: dict[str, Parity]
    quantization: Format = "none"
    perplexity: dict[str, PerplexityRecord] = {}


def write_manifest(
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    before: Cost,
    after: Cost,
    cuts: list[dict[str, int]],
    parity: Mapping[str, Parity],
    quantization: Format = "none",
    perplexity: Mapping[str, PerplexityRecord] | None = None,
) -> Manifest:
    """Hashes every file in the folder and writes `manifest.json` beside them."""
    files = {
        path.relative_to(folder).as_posix(): FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        provenance=dict(provenance),
        files=files,
        before=before.to_dict(),
        after=after.to_dict(),
        cuts=cuts,
        parity=dict(parity),
        quantization=quantization,
        perplexity=dict(perplexity or {}),
    )
    write_json(folder / MANIFEST_FILE, manifest.model_dump())
    return manifest


def is_artifact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST_FILE).is_file()


def read_manifest(folder: str | Path, *, verify_files: bool = True) -> Manifest:
    """Reads a manifest and checks every file against it.

    Args:
        folder: of the artifact.
        verify_files: whether to hash the files; else only their presence is checked.

    Raises:
        ArtifactError: no manifest, an unknown format version, a missing file or a wrong hash; names it.
    """
    folder = Path(folder)
    path = folder / MANIFEST_FILE
    if not path.is_file():
        raise ArtifactError(f"{folder}: expected an artifact with a {MANIFEST_FILE}, found none")
    try:
        text = path.read_text(encoding="utf-8")
        version = _VersionOnly.model_validate_json(text).format_version
        if version != FORMAT_VERSION:
            raise ArtifactError(f"{path}: expected format_version {FORMAT_VERSION}, found {version}")
        manifest = Manifest.model_validate_json(text)
    except (ValidationError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: {_first_line(error)}") from None
    _check_names(path, manifest)
    _check_pairs(path, manifest)
    for name, record in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise ArtifactError(f"{folder}: {name} is missing")
        if verify_files and sha256_file(file) != record.sha256:
            raise ArtifactError(f"{file}: wrong hash: expected sha256 {record.sha256[:12]}…, the file has changed")
    return manifest


def load_artifact(folder: str | Path) -> tuple[Checkpoint, Manifest]:
    """Reads an artifact, verified by hash, name and shape; `Checkpoint.quantization` says how its weights are stored.

    Raises:
        ArtifactError: anything is missing, changed, or does not fit.
    """
    manifest = read_manifest(folder)
    try:
        checkpoint = load_checkpoint(folder, quantized=True)
    except (CheckpointError, ConfigError) as error:
        raise ArtifactError(str(error)) from None
    if checkpoint.quantization.format != manifest.quantization:
        raise ArtifactError(
            f"{folder}: quantization is {manifest.quantization!r} in {MANIFEST_FILE} and "
            f"{checkpoint.quantization.format!r} in config.json; expected the same"
        )
    return checkpoint, manifest


def _check_names(path: Path, manifest: Manifest) -> None:
    """Refuses names that leave the folder, and files that would be read although nothing vouches for them."""
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts:
            raise ArtifactError(f"{path}: file name {name!r} leaves the folder")
    for name in _READ_FILES:
        if name not in manifest.files and (name in _REQUIRED_FILES or (path.parent / name).exists()):
            raise ArtifactError(f"{path}: expected a record of {name}, found none")


def _check_pairs(path: Path, manifest: Manifest) -> None:
    """Refuses figures of before without those of after."""
    if set(manifest.before) != set(manifest.after):
        raise ArtifactError(f"{path}: before has {sorted(manifest.before)}, after has {sorted(manifest.after)}")
    if manifest.perplexity and set(manifest.perplexity) != {"before", "after"}:
        raise ArtifactError(f"{path}: perplexity: expected before and after, found {sorted(manifest.perplexity)}")


class _VersionOnly(BaseModel):
    format_version: int


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        return f"{where}: {first['msg']}"
    return str(error).splitlines()[0]
