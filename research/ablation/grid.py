"""Which experiments a study consists of: every combination of the pillars, at every point of a grid, for every seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from research.ablation.outcome import COMBINATIONS, GRID_KEYS, has_pillar, name_of
from yunmin.errors import ConfigError

_MATTERS = {"masking": ("tau", "sparsity"), "peft": ("rank", "share")}  # the order of channels has no such number


@dataclass(frozen=True)
class Grid:
    """The values of each grid key.

    Attributes:
        rank: of LoRA.
        tau: final temperature of the gates.
        sparsity: target share of channels cut.
        share: of the projections that are adapted, half of them with LoRA, half with IA3.
    """

    rank: tuple[int, ...]
    tau: tuple[float, ...]
    sparsity: tuple[float, ...]
    share: tuple[float, ...]

    def points(self) -> list[dict[str, float]]:
        """All points, the last key changing fastest."""
        values = [getattr(self, key) for key in GRID_KEYS]
        return [dict(zip(GRID_KEYS, point, strict=True)) for point in itertools.product(*values)]


@dataclass(frozen=True)
class Setting:
    """One experiment of a study.

    Attributes:
        combination: one of `COMBINATIONS`.
        values: the grid keys that this combination depends on, with their values.
        seed: of the experiment, and of the model it starts from.
    """

    combination: str
    values: tuple[tuple[str, float], ...]
    seed: int

    @property
    def point(self) -> dict[str, float]:
        return dict(self.values)

    @property
    def name(self) -> str:
        return f"{name_of(self.combination, self.point)}, seed {self.seed}"

    def uses(self, pillar: str) -> bool:
        return has_pillar(self.combination, pillar)


def setting(combination: str, point: Mapping[str, float], seed: int) -> Setting:
    """The experiment of a combination at a point, without the keys that change nothing in it.

    A dense baseline has no masking temperature: at all points it is the same experiment.
    """
    keys = [key for pillar, keys in _MATTERS.items() if has_pillar(combination, pillar) for key in keys]
    return Setting(combination, tuple((key, point[key]) for key in GRID_KEYS if key in keys), seed)


def planned(grid: Grid, seeds: Sequence[int]) -> Iterator[Setting]:
    """Every combination at every point; one seed after the other, so that early ones can be compared early."""
    for seed in seeds:
        for combination in COMBINATIONS:
            for point in grid.points():
                yield setting(combination, point, seed)


def distinct(settings: Iterator[Setting] | Sequence[Setting]) -> list[Setting]:
    """Each different one once, in order."""
    return list(dict.fromkeys(settings))


def grid_from(values: Mapping[str, Sequence[float]], default: Grid, where: str) -> Grid:
    """A grid with some keys' values replaced.

    Raises:
        ConfigError: an unknown key, no values, or one out of its range; names it.
    """
    for key, chosen in values.items():
        if key not in GRID_KEYS:
            raise ConfigError(f"{where}: unknown grid key {key!r}, expected one of {', '.join(GRID_KEYS)}")
        for value in chosen:
            if key == "rank" and (value < 1 or value != int(value)):
                raise ConfigError(f"{where}: rank must be a whole number from 1, got {value:g}")
            if key == "sparsity" and not 0 < value < 1:
                raise ConfigError(f"{where}: sparsity must be a share between 0 and 1, got {value:g}")
            if key == "share" and not 0 < value <= 1:
                raise ConfigError(f"{where}: share must be above 0 and at most 1, got {value:g}")
            if key == "tau" and value <= 0:
                raise ConfigError(f"{where}: tau must be above 0, got {value:g}")
        if not chosen or len(set(chosen)) != len(chosen):
            raise ConfigError(f"{where}: {key} needs values, each once, got {', '.join(f'{v:g}' for v in chosen)}")
    own = {field.name: tuple(values.get(field.name, getattr(default, field.name))) for field in fields(Grid)}
    own["rank"] = tuple(int(rank) for rank in own["rank"])
    return Grid(**own)
