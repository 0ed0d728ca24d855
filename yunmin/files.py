"""Files that appear whole or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ALIGNMENT = 64  # bytes of a vector register, and of a cache line
_SAFETENSORS_DTYPES = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}


@contextlib.contextmanager
def atomic_folder(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its final name only when the block ends without an error.

    Args:
        target: the folder's final path.
        replace: whether an existing folder of that name gives way. Should the process be killed between the two
            renames, the old one survives beside it as `.NAME.*.old`.

    Yields:
        A temporary folder beside the target; removed if the block raises.

    Raises:
        OSError: something of that name is there and `replace` is false (an empty folder may be there).
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(target)
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.rglob("*"), reverse=True):
            _fsync(path)
        _fsync(aside)
        if replace and target.exists():
            retired = aside.with_suffix(".old")
            target.rename(retired)
            try:
                aside.rename(target)
            except BaseException:
                retired.rename(target)
                raise
            shutil.rmtree(retired)
        else:
            aside.rename(target)
        _fsync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """A file path to write that takes its final name only when the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = _beside(target)
    aside.touch(exist_ok=False)
    mode = aside.stat().st_mode  # as the umask wants it, whatever the block's writer makes of it
    try:
        yield aside
        aside.chmod(mode)
        _fsync(aside)
        aside.rename(target)
        _fsync(target.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Writes JSON with stable formatting; not atomic by itself."""
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as one safetensors file, whole or not at all."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as aside:
        save_file(contiguous, aside, metadata={"format": "pt", **(metadata or {})})


def write_aligned_safetensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file whose large tensors begin at multiples of 64 bytes, whole or not at all.

    The library itself aligns nothing, and the format allows no holes. So the data begins at a multiple of 64 bytes, and
    tensors come by how large a power of two divides their size: one whose size is a multiple of 64 begins at one.

    Args:
        path: of the file.
        tensors: uint8, float16 or float32, by name; those of one alignment keep their order.
    """

    def alignment(name: str) -> int:
        size = tensors[name].nbytes
        return min(ALIGNMENT, size & -size) if size else ALIGNMENT  # the lowest bit that is set

    names = sorted(tensors, key=alignment, reverse=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with atomic_file(path) as aside, aside.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(target: Path) -> Path:
    """A name nobody uses in the target's folder, so that a rename to the target is atomic."""
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
