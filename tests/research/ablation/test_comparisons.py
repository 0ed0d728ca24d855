"""Which experiments are compared with which."""

from __future__ import annotations

import math
import statistics
from itertools import product
from typing import Any

import pytest

from research.ablation.comparisons import Comparison, compare, setting_effects
from research.ablation.outcome import COMBINATIONS, read_outcomes
from tests.research.ablation.studies import made_up

SMALL = {"rank": (4, 8), "tau": (0.5,), "sparsity": (0.3, 0.5), "share": (0.4,)}


def _compared(results: list[dict[str, Any]]) -> dict[tuple[str, str], Comparison]:
    return {(c.name, c.measure): c for c in compare(read_outcomes(results)[0])}


def test_pairs_share_their_seed_and_the_settings_that_both_have() -> None:
    results = made_up(seeds=3, grid=SMALL)
    found = _compared(results)["all against masking", "float32"]
    for seed in range(3):
        named = [
            [(r["point"]["sparsity"], math.log(r["test"]["token_perplexity"])) for r in results if r["seed"] == seed
             and r["combination"] == name] for name in ("all", "masking")
        ]  # fmt: skip
        by_hand = [a - b for (own, a), (other, b) in product(*named) if own == other]
        assert found.differences[seed] == pytest.approx(statistics.fmean(by_hand))
    assert found.pairs == 3 * 2 * 2  # 2 ranks and 2 sparsities of all pillars, each with the masking of its sparsity


def test_points_of_the_grid_are_no_further_evidence() -> None:
    few, many = (_compared(made_up(seeds=4, grid=grid)) for grid in (SMALL, {**SMALL, "tau": (0.3, 0.5, 0.8)}))
    for found in (few, many):
        assert {c.found.n for c in found.values()} == {4}
    assert many["all against baseline", "float32"].pairs == 3 * few["all against baseline", "float32"].pairs


def test_a_small_effect_is_found_in_seeds_that_differ_much() -> None:
    results = made_up(seeds=6, effects={"peft": 0.02}, noise=0.002, grid=SMALL)
    assert _compared(results)["peft against baseline", "float32"].is_significant
    wrong = [{**r, "seed": (r["seed"] + 1) % 6} if r["combination"] == "peft" else r for r in results]
    assert not _compared(wrong)["peft against baseline", "float32"].is_significant


@pytest.mark.parametrize(
    ("effects", "name", "expected"),
    [
        ({"scan": 0.05}, "scan", 0.05),
        ({"masking+peft": 0.06, "all": 0.06}, "masking × peft", 0.06),
        ({"masking+peft": 0.06, "all": 0.06}, "masking", 0.03),
        ({"all": 0.08}, "scan × masking × peft", 0.08),
        ({"all": 0.08}, "scan × masking", 0.04),
    ],
)
def test_contrasts_find_what_was_planted(effects: dict[str, float], name: str, expected: float) -> None:
    found = _compared(made_up(seeds=2, effects=effects, noise=0.0, grid=SMALL))[name, "float32"]
    assert found.found.mean == pytest.approx(expected, abs=1e-9)


def test_nothing_is_significant_where_nothing_was_planted() -> None:
    for draw in range(3):
        assert not any(c.is_significant for c in _compared(made_up(effects={}, grid=SMALL, draw=draw)).values())


def test_a_seed_without_all_combinations_has_no_contrast() -> None:
    results = [r for r in made_up(seeds=3, grid=SMALL) if (r["combination"], r["seed"]) != ("scan", 1)]
    found = _compared(results)
    assert set(found["masking", "float32"].differences) == {0, 2}
    assert set(found["masking against baseline", "float32"].differences) == {0, 1, 2}


def test_p_values_are_corrected_for_all_tests_together() -> None:
    found = list(_compared(made_up(seeds=4, grid=SMALL)).values())
    p_values = sorted((c.found.p_t, c.p_holm) for c in found if c.found.p_t is not None)
    assert p_values[0][1] == pytest.approx(len(p_values) * p_values[0][0])
    assert all(corrected >= plain for plain, corrected in p_values if corrected is not None)


def test_settings_are_compared_where_all_else_is_equal() -> None:
    results = made_up(seeds=3, noise=0.0, grid=SMALL)
    found = _compared(results)["sparsity 0.5 against 0.3", "float32"]
    assert found.found.mean == pytest.approx(0.3 * 0.2)
    effects = setting_effects(read_outcomes(results)[0], "sparsity")
    assert {level: round(effect.mean, 9) for level, effect in effects.items()} == {0.3: -0.03, 0.5: 0.03}


def test_a_free_search_is_compared_where_it_can_be() -> None:
    results = [r for r in made_up(seeds=2, grid=SMALL) if r["combination"] in ("baseline", "masking")]
    for index, result in enumerate(results):
        result["point"] = {key: value + index / 1000 for key, value in result["point"].items()}
    assert {name for name, _ in _compared(results)} == {"masking against baseline"}


def test_outcomes_leave_out_what_cannot_be_compared() -> None:
    good, failed, diverged, base = made_up(seeds=1, grid=SMALL)[:4]
    failed["error"] = "TrainingError: loss is nan\nat step 3"
    diverged["test"] = {"token_perplexity": float("inf")}
    base["combination"] = "base model"
    outcomes, left_out = read_outcomes([good, failed, diverged, base, good])
    assert [outcome.combination for outcome in outcomes] == [COMBINATIONS[0]]
    assert [reason.split(":")[0] for _, reason in left_out] == [
        "TrainingError", "no finite perplexity on the test text", "no combination of scan, masking, peft",
    ]  # fmt: skip
