"""The state of running sequences: constant in size, explicit, and movable.

A `MambaState` is what the network carries; a `Snapshot` is what is needed to go on with one sequence elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from yunmin.config import MambaConfig
from yunmin.errors import StateError
from yunmin.files import write_safetensors

_FORMAT = "yunmin-state-1"


@dataclass(frozen=True)
class MambaState:
    """The carried state of a batch of sequences, per layer.

    Attributes:
        conv: last K-1 inputs of the convolution, each (B, D, K-1).
        ssm: state of the scan, each (B, D, N).
    """

    conv: tuple[Tensor, ...]
    ssm: tuple[Tensor, ...]

    @classmethod
    def zeros(
        cls,
        config: MambaConfig,
        batch_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> MambaState:
        """The state before the first token."""
        taps = config.d_conv - 1
        return cls(
            tuple(torch.zeros(batch_size, inner, taps, dtype=dtype, device=device) for inner in config.d_inner),
            tuple(
                torch.zeros(batch_size, inner, n, dtype=dtype, device=device)
                for inner, n in zip(config.d_inner, config.d_state, strict=True)
            ),
        )

    @property
    def batch_size(self) -> int:
        return self.ssm[0].shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.conv + self.ssm)

    def copy(self) -> MambaState:
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> MambaState:
        """This state on a device."""
        return self._map(lambda t: t.to(device))

    def gather(self, rows: Sequence[int]) -> MambaState:
        """Copies rows of the batch, in the order given; a row may repeat (a fork)."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.ssm[0].device)
        return self._map(lambda t: t.index_select(0, index))

    def first_rows(self, count: int) -> MambaState:
        """The first rows of the batch, in the same memory."""
        return self._map(lambda t: t[:count])

    def scatter_(self, rows: Sequence[int], source: MambaState) -> None:
        """Writes `source`'s rows over rows of this state, in place."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.ssm[0].device)
        for mine, theirs in zip(self.conv + self.ssm, source.conv + source.ssm, strict=True):
            mine.index_copy_(0, index, theirs)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MambaState:
        return MambaState(tuple(map(function, self.conv)), tuple(map(function, self.ssm)))


@dataclass(frozen=True)
class Snapshot:
    """One sequence, frozen after its last token.

    Attributes:
        state: of batch size 1.
        logits: after the last token, float32 (V,).
        token_ids: every token so far; penalties, stop strings and detokenization need them.
        sampler_state: of the sampling generator, uint8, or None before any sampling.
    """

    state: MambaState
    logits: Tensor
    token_ids: tuple[int, ...]
    sampler_state: Tensor | None = None


def save_snapshot(path: str | Path, snapshot: Snapshot, fingerprint: str) -> None:
    """Writes a snapshot as one safetensors file, whole or not at all.

    Args:
        path: the file to write.
        snapshot: of one sequence.
        fingerprint: of the model it belongs to.
    """
    if snapshot.state.batch_size != 1:
        raise StateError(f"{path}: a snapshot holds one sequence, got {snapshot.state.batch_size}")
    tensors = {
        "logits": snapshot.logits,
        "token_ids": torch.tensor(snapshot.token_ids, dtype=torch.int64),
        **{f"conv.{layer}": t for layer, t in enumerate(snapshot.state.conv)},
        **{f"ssm.{layer}": t for layer, t in enumerate(snapshot.state.ssm)},
    }
    if snapshot.sampler_state is not None:
        tensors["sampler_state"] = snapshot.sampler_state
    metadata = {"format": _FORMAT, "fingerprint": fingerprint, "tokens": str(len(snapshot.token_ids))}
    write_safetensors(path, tensors, metadata)


def load_snapshot(path: str | Path, config: MambaConfig, fingerprint: str) -> Snapshot:
    """Reads a snapshot for the model it was made with.

    Raises:
        StateError: the file is missing or damaged, or belongs to another model.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise StateError(f"{path}: expected a saved state, found no such file") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"{path}: expected a saved state, the file is damaged ({error})") from None
    if metadata.get("format") != _FORMAT:
        raise StateError(f"{path}: expected format {_FORMAT!r}, found {metadata.get('format')!r}")
    if metadata.get("fingerprint") != fingerprint:
        found = str(metadata.get("fingerprint"))[:12]
        raise StateError(f"{path}: belongs to another model: expected {fingerprint[:12]}, found {found}")
    _check_snapshot(path, config, tensors)
    layers = range(config.n_layers)
    return Snapshot(
        MambaState(tuple(tensors[f"conv.{i}"] for i in layers), tuple(tensors[f"ssm.{i}"] for i in layers)),
        tensors["logits"],
        tuple(tensors["token_ids"].tolist()),
        tensors.get("sampler_state"),
    )


def _check_snapshot(path: str | Path, config: MambaConfig, tensors: Mapping[str, Tensor]) -> None:
    empty = MambaState.zeros(config, 1, device="meta")
    expected = {f"conv.{i}": t.shape for i, t in enumerate(empty.conv)}
    expected |= {f"ssm.{i}": t.shape for i, t in enumerate(empty.ssm)}
    expected["logits"] = torch.Size([config.vocab_size])
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            found = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise StateError(f"{path}: tensor {name!r}: expected floats of shape {tuple(shape)}, found {found}")
    token_ids = tensors.get("token_ids")
    if token_ids is None or token_ids.dtype != torch.int64 or token_ids.dim() != 1:
        raise StateError(f"{path}: tensor 'token_ids': expected int64 ids")
    if any(not 0 <= token_id < config.n_tokens for token_id in token_ids.tolist()):
        raise StateError(f"{path}: tensor 'token_ids': ids must lie in 0..{config.n_tokens - 1}")
    if "sampler_state" in tensors:
        try:
            torch.Generator().set_state(tensors["sampler_state"])
        except (RuntimeError, TypeError):
            raise StateError(f"{path}: tensor 'sampler_state' is no state of a torch generator") from None
