"""A model on a team of processes: copies that average their gradients (DDP), or shards (FSDP2); on one, the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from training.gating import mixers_of
from training.team import Team
from yunmin.model import MambaLM


class Parallel:
    """Forward passes whose gradients are averages over the team.

    Building one shards the model where the team shards. It lasts for a phase, whose modules must be in place.

    Args:
        model: on its device; the same on all processes.
        team: the processes.
    """

    def __init__(self, model: MambaLM, team: Team) -> None:
        self.model = model
        self.team = team
        self._copy: DistributedDataParallel | None = None
        if team.is_sharded:
            _shard(model, set(_gate_logits(model)))
        elif team.size > 1:
            ids = [model.device.index] if model.device.type == "cuda" else None
            self._copy = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Logits (B, L, V) of ids (B, L), to learn from."""
        logits: Tensor = (self.model if self._copy is None else self._copy)(input_ids)
        return logits

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of each part of a batch; copies average with the last one only."""
        if self._copy is None or is_last:
            yield
        else:
            with self._copy.no_sync():
                yield

    def average_gates(self) -> None:
        """Averages the gradients of gates, which are never sharded: they act outside of their mixer, too."""
        if self.team.is_sharded:
            for logits in _gate_logits(self.model):
                if logits.grad is not None:
                    logits.grad = self.team.total(logits.grad) / self.team.size


def whole(tensor: Tensor) -> Tensor:
    """A tensor in one piece; where it is sharded, on the CPU, and all processes must call this together."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def shared_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, on the device and sharded as another one."""
    moved = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return moved
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def own_piece(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, which may be empty."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def without_gradients(model: MambaLM) -> Callable[[Tensor], Tensor]:
    """The model's forward pass for measuring, also within `inference_mode`, whose tensors FSDP2 cannot take back."""

    def forward(input_ids: Tensor) -> Tensor:
        with torch.inference_mode(mode=False), torch.no_grad():
            logits: Tensor = model(input_ids)
        return logits

    return forward


def _shard(model: MambaLM, ignored: set[nn.Parameter]) -> None:
    # outputs of a projection are views; ours are never changed in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(model.device.type, (distributed.get_world_size(),))
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True, "ignored_params": ignored}
    for mixer in mixers_of(model):
        fully_shard(mixer, **options)
    fully_shard(model, **options)


def _gate_logits(model: MambaLM) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if name.endswith(".logits")]
