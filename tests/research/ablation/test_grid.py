"""Which experiments a study consists of."""

from __future__ import annotations

import pytest

from research.ablation.grid import Grid, distinct, grid_from, planned, setting
from research.ablation.outcome import COMBINATIONS
from research.ablation.settings import DEFAULT_POINT, default_settings, with_keys
from yunmin.errors import ConfigError

RESEARCH = default_settings("research").grid


def test_research_has_108_points_and_864_experiments_per_seed_of_which_260_differ() -> None:
    assert len(RESEARCH.points()) == 108
    everything = list(planned(RESEARCH, [0]))
    assert len(everything) == 864
    by_combination = {name: [s for s in distinct(everything) if s.combination == name] for name in COMBINATIONS}
    assert [len(by_combination[name]) for name in COMBINATIONS] == [1, 1, 9, 12, 9, 12, 108, 108]


def test_default_point_is_one_experiment_per_combination() -> None:
    assert len(DEFAULT_POINT.points()) == 1
    assert [s.combination for s in distinct(planned(DEFAULT_POINT, [0]))] == list(COMBINATIONS)


def test_what_matters_to_no_pillar_of_a_combination_is_no_part_of_its_setting() -> None:
    point = {"rank": 4, "tau": 0.3, "sparsity": 0.7, "share": 0.2}
    assert setting("baseline", point, 0).point == {} == setting("scan", point, 0).point
    assert setting("scan+masking", point, 0).point == {"tau": 0.3, "sparsity": 0.7}
    assert setting("peft", point, 0).point == {"rank": 4, "share": 0.2}
    assert setting("all", point, 3).name == "all (rank 4, tau 0.3, sparsity 0.7, share 0.2), seed 3"


def test_one_seed_comes_after_the_other() -> None:
    seeds = [s.seed for s in distinct(planned(DEFAULT_POINT, range(3)))]
    assert seeds == sorted(seeds)


def test_single_values_of_the_grid_can_be_replaced() -> None:
    assert grid_from({"sparsity": [0.2], "rank": [2.0]}, RESEARCH, "x") == Grid(
        (2,), RESEARCH.tau, (0.2,), RESEARCH.share
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": [1.0]}, "unknown grid key 'depth'"),
        ({"rank": [1.5]}, "rank must be a whole number"),
        ({"sparsity": [1.0]}, "sparsity must be a share between 0 and 1, got 1"),
        ({"share": [0.0]}, "share must be above 0"),
        ({"tau": [-1.0]}, "tau must be above 0"),
        ({"tau": [0.5, 0.5]}, "tau needs values, each once"),
    ],
)
def test_impossible_grids_are_refused(values: dict[str, list[float]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid_from(values, RESEARCH, "--grid")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("peft_r=4", "--set peft_r: the grid decides it"),
        ("seed=4", "--set seed: an option of its own decides it"),
        ("wandb=true", "--set wandb: the study decides it"),
        ("learning_rat=1", "unknown key 'learning_rat', did you mean 'learning_rate'"),
        ("learning_rate", "expected key=value"),
        ("batch_size=0", "batch_size"),
    ],
)
def test_options_of_all_experiments_are_checked(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_keys({}, [override])
    assert with_keys({"batch_size": 2}, ["batch_size=4", "channel_gates=block"]) == {
        "batch_size": 4,
        "channel_gates": "block",
    }
