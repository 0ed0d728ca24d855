"""The processes that train one model together, as `torchrun` or `accelerate launch` starts them; one alone, too."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from training.config import TrainingConfig
from yunmin.errors import ConfigError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """Who trains together.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        is_sharded: whether each keeps a part of the weights (FSDP2) instead of all of them (DDP).
    """

    rank: int = 0
    size: int = 1
    is_sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each; `values` is not modified."""
        if self.size == 1:
            return values
        summed = values.clone()
        distributed.all_reduce(summed)
        return summed

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return flag if self.size == 1 else bool(self.total(torch.tensor(float(flag))) > 0)

    def from_first(self, value: Value) -> Value:
        """What the first process has, on each of them."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]


ALONE = Team()


@contextmanager
def joined(config: TrainingConfig) -> Iterator[Team]:
    """Within it, this process is in the team that its launcher started it in; alone without a launcher.

    Raises:
        ConfigError: weights are to be sharded, and there is only one process.
    """
    # `accelerate launch --use_fsdp` says so
    launcher_shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    is_sharded = config.sharding == "full" or (config.sharding == "auto" and launcher_shards)
    if not is_launched():
        if config.sharding == "full":
            raise ConfigError("sharding: full needs several processes; start with torchrun or accelerate launch")
        yield ALONE
        return
    if not distributed.is_initialized():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", init_method="env://"
        )
        # not before: a second group would meet the first one's addresses in the launcher's store
        atexit.register(distributed.destroy_process_group)
    yield Team(distributed.get_rank(), distributed.get_world_size(), is_sharded)
    distributed.barrier()  # nobody leaves while the first one still writes


def is_launched() -> bool:
    """Whether a launcher started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_process() -> bool:
    """Whether this process is the one of its team that writes, or has none."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))
