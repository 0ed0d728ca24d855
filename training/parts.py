"""How a step's batch is divided: among the processes of a team, and there into parts computed one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data import IGNORED, PackedData
from training.team import Team


@dataclass(frozen=True)
class Place:
    """Where the sequences of a part lie in the batch.

    Attributes:
        first: the number of the first one.
        rows: how many there are; those beyond them in the tensors only keep company.
        total: sequences of the whole batch.
    """

    first: int
    rows: int
    total: int


@dataclass(frozen=True)
class Part:
    """Sequences that are computed at once.

    Attributes:
        inputs: int64 (B, L).
        labels: int64 (B, L), `IGNORED` where nothing is learned.
        place: in the batch.
        share: of all tokens that the batch teaches.
    """

    inputs: Tensor
    labels: Tensor
    place: Place
    share: float


def parts_of(data: PackedData, rows: Tensor, team: Team, accumulation: int, device: torch.device) -> list[Part]:
    """This process's parts of a batch.

    The batch's sequences go to the processes in order, as evenly as they can. A process that gets none computes one all
    the same, of which nothing is learned, since all of them must take part in every exchange.

    Args:
        data: all training sequences.
        rows: int64 (B,), the batch's.
        team: that shares it.
        accumulation: parts for each process.
        device: to compute on.
    """
    divided = torch.tensor_split(rows, team.size * accumulation)
    firsts = [0]
    for own in divided:
        firsts.append(firsts[-1] + own.numel())
    tokens = tokens_of(data, rows)
    parts = []
    for number in range(team.rank * accumulation, (team.rank + 1) * accumulation):
        own = divided[number]
        inputs, labels = (t.to(device) for t in data.batch(own if own.numel() else rows[:1]))
        if not own.numel():
            labels = torch.full_like(labels, IGNORED)
        place = Place(firsts[number], own.numel(), rows.numel())
        parts.append(Part(inputs, labels, place, int((labels != IGNORED).sum()) / tokens))
    return parts


def tokens_of(data: PackedData, rows: Tensor) -> int:
    """How many tokens some sequences teach."""
    return int(data.is_target[rows][:, 1:].sum())
