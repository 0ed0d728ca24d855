"""Snapshots as bytes and as files: safetensors that carry the fingerprint of the one model they belong to."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import StateError
from yunmin.files import atomic_file
from yunmin.state import MambaState, Snapshot

_FORMAT = "yunmin-state-1"
_ALIGNMENT = 64  # of the data's begin
_HEADER_BYTES = 256  # the most that one tensor's entry takes
_METADATA_BYTES = 8192
_SAMPLER_BYTES = 16_384  # torch's own generator takes 5,056
_DTYPES = {torch.int64: "I64", torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8"}
_DAMAGES = (SafetensorError, ValueError, TypeError, KeyError, AssertionError, RuntimeError, RecursionError, MemoryError)


def snapshot_to_bytes(snapshot: Snapshot, fingerprint: str, *, name: str | None = None) -> bytes:
    """A snapshot as a safetensors file.

    The same snapshot gives the same bytes. Floats narrower than 32 bits become float32, which is exact.

    Args:
        snapshot: of one sequence.
        fingerprint: of the model it belongs to.
        name: to keep in it, for states that are asked for by name.

    Raises:
        StateError: it holds several sequences, or numbers that are not finite: such a state can never be read again.
    """
    if snapshot.state.batch_size != 1:
        raise StateError(f"a snapshot holds one sequence, got {snapshot.state.batch_size}")
    tensors = {
        "token_ids": torch.from_numpy(np.array(snapshot.token_ids, np.int64)),
        "logits": _wide(snapshot.logits),
        **{f"conv.{layer}": _wide(t) for layer, t in enumerate(snapshot.state.conv)},
        **{f"ssm.{layer}": _wide(t) for layer, t in enumerate(snapshot.state.ssm)},
    }
    if snapshot.sampler_state is not None:
        tensors["sampler_state"] = snapshot.sampler_state
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "tokens": str(len(snapshot.token_ids))}
    return _packed(tensors, metadata if name is None else metadata | {"name": name})


def snapshot_from_bytes(where: str | Path, data: bytes, config: MambaConfig, fingerprint: str) -> Snapshot:
    """Reads what `snapshot_to_bytes` gives, and trusts nothing in it.

    Args:
        where: names the source in errors.
        data: a whole file; the caller bounds its size, see `max_snapshot_bytes`.
        config, fingerprint: of the model that shall go on.

    Raises:
        StateError: it is damaged, belongs to another model, or holds numbers that are not finite (which would spoil no
            sequence but this one, and every token of it).
    """
    try:
        tensors = safetensors.torch.load(data)
    except _DAMAGES as error:
        raise StateError(f"{where}: expected a saved state, the file is damaged ({error})") from None
    metadata = snapshot_metadata(where, data)
    if metadata.get("format") != _FORMAT:
        raise StateError(f"{where}: expected format {_FORMAT!r}, found {metadata.get('format')!r:.60}")
    if metadata.get("fingerprint") != fingerprint:
        found = metadata.get("fingerprint", "none")[:12]
        raise StateError(f"{where}: belongs to another model: expected {fingerprint[:12]}, found {found}")
    _check_tensors(where, config, tensors)
    layers = range(config.n_layers)
    return Snapshot(
        MambaState(tuple(tensors[f"conv.{i}"] for i in layers), tuple(tensors[f"ssm.{i}"] for i in layers)),
        tensors["logits"],
        tuple(tensors["token_ids"].tolist()),
        tensors.get("sampler_state"),
    )


def snapshot_metadata(where: str | Path, data: bytes) -> dict[str, str]:
    """What a saved state says about itself: `format`, `fingerprint`, `tokens`, perhaps `name`.

    Raises:
        StateError: the header is damaged; names `where`.
    """
    try:
        (length,) = struct.unpack_from("<Q", data)
        metadata: Any = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (struct.error, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise StateError(f"{where}: expected a saved state, its header is damaged ({error})") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateError(f"{where}: expected a saved state, its metadata are no strings")
    return metadata


def max_snapshot_bytes(config: MambaConfig, tokens: int) -> int:
    """The largest file that a float32 snapshot of so many tokens can be."""
    numbers = config.vocab_size
    for inner, n in zip(config.d_inner, config.d_state, strict=True):
        numbers += inner * (n + config.d_conv - 1)
    header = _METADATA_BYTES + _HEADER_BYTES * (2 * config.n_layers + 3)
    return 4 * numbers + 8 * tokens + header + _SAMPLER_BYTES


def save_snapshot(path: str | Path, snapshot: Snapshot, fingerprint: str, *, name: str | None = None) -> None:
    """Writes a snapshot as one safetensors file, whole or not at all.

    Args:
        path: the file to write.
        snapshot, fingerprint, name: as in `snapshot_to_bytes`.

    Raises:
        StateError: as in `snapshot_to_bytes`; names the file.
    """
    try:
        data = snapshot_to_bytes(snapshot, fingerprint, name=name)
    except StateError as error:
        raise StateError(f"{path}: {error}") from None
    with atomic_file(path) as aside:
        aside.write_bytes(data)


def load_snapshot(path: str | Path, config: MambaConfig, fingerprint: str) -> Snapshot:
    """Reads a snapshot for the model it was made with.

    Raises:
        StateError: the file is missing or damaged, or belongs to another model.
    """
    return snapshot_from_bytes(path, read_state_file(path), config, fingerprint)


def read_state_file(path: str | Path) -> bytes:
    """The bytes of a saved state.

    Raises:
        StateError: there is no such file, or it cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise StateError(f"{path}: expected a saved state, found no such file") from None
    except OSError as error:
        raise StateError(f"{path}: expected a saved state, the file is damaged ({error})") from None


def _wide(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """One safetensors file, whatever the strides of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    parts: list[Any] = [struct.pack("<Q", len(encoded)), encoded]
    for name, tensor in tensors.items():
        dense = tensor.contiguous()
        _require_finite("snapshot", name, dense)
        parts.append(dense.numpy().data)
    return b"".join(parts)


def _check_tensors(where: str | Path, config: MambaConfig, tensors: Mapping[str, Tensor]) -> None:
    empty = MambaState.zeros(config, 1, device="meta")
    expected = {f"conv.{i}": t.shape for i, t in enumerate(empty.conv)}
    expected |= {f"ssm.{i}": t.shape for i, t in enumerate(empty.ssm)}
    expected["logits"] = torch.Size([config.vocab_size])
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype not in (torch.float32, torch.float64):
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise StateError(f"{where}: tensor {name!r}: expected floats of shape {tuple(shape)}, found {found}")
    token_ids = tensors.get("token_ids")
    if token_ids is None or token_ids.dtype != torch.int64 or token_ids.dim() != 1 or not len(token_ids):
        raise StateError(f"{where}: tensor 'token_ids': expected int64 ids, at least one")
    if int(token_ids.min()) < 0 or int(token_ids.max()) >= config.n_tokens:
        raise StateError(f"{where}: tensor 'token_ids': ids must lie in 0..{config.n_tokens - 1}")
    if "sampler_state" in tensors:
        try:
            torch.Generator().set_state(tensors["sampler_state"])
        except (RuntimeError, TypeError):
            raise StateError(f"{where}: tensor 'sampler_state' is no state of a torch generator") from None
    if unknown := sorted(tensors.keys() - expected.keys() - {"token_ids", "sampler_state"}):
        raise StateError(f"{where}: tensor {unknown[0]!r:.60} does not belong to a saved state")
    for name in expected:
        _require_finite(where, name, tensors[name])


def _require_finite(where: str | Path, name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity. A sum is quick, and finite only if all its terms are; if it overflows, each is seen."""
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        raise StateError(f"{where}: tensor {name!r}: expected finite numbers, found NaN or infinity")
