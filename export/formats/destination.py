"""What an export in another format may replace: only what such an export has written."""

from __future__ import annotations

from pathlib import Path

from yunmin.errors import ArtifactError

MARKER_FILE = "yunmin_export.json"
_GGUF_MAGIC = b"GGUF"


def require_free_folder(out: Path, *, force: bool) -> None:
    """Checks that a folder of that name may be written.

    Raises:
        ArtifactError: see `export.formats.check_format_destination`.
    """
    _require_parent(out)
    if out.name in ("", ".."):
        raise ArtifactError(f"{out}: expected the name of a folder to write")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ArtifactError(f"{out}: expected a folder to write, found a file or a link")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ArtifactError(f"{out}: exists already; --force replaces what an export with --format wrote")
    if not (out / MARKER_FILE).is_file():
        raise ArtifactError(f"{out}: holds no {MARKER_FILE}; --force replaces only what an export with --format wrote")


def require_free_file(out: Path, *, force: bool) -> None:
    """Checks that a GGUF file of that name may be written.

    Raises:
        ArtifactError: see `export.formats.check_format_destination`.
    """
    _require_parent(out)
    if out.is_symlink() or (out.exists() and not out.is_file()):
        raise ArtifactError(f"{out}: expected a GGUF file to write, found a folder or a link")
    if not out.exists():
        return
    if not force:
        raise ArtifactError(f"{out}: exists already; --force replaces a GGUF file")
    with out.open("rb") as file:
        if file.read(len(_GGUF_MAGIC)) != _GGUF_MAGIC:
            raise ArtifactError(f"{out}: is no GGUF file; --force replaces only a GGUF file")


def _require_parent(out: Path) -> None:
    for parent in out.absolute().parents:
        if parent.exists():
            if not parent.is_dir():
                raise ArtifactError(f"{out}: cannot be created, {parent} is a file")
            return
