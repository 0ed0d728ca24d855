"""Quality against cost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.ablation.claims import check_claims
from research.ablation.conclusions import conclude
from research.ablation.efficiency import Configuration, best, cheapest, configurations, non_dominated, within
from research.ablation.outcome import read_outcomes
from tests.research.ablation.studies import made_up

SMALL = {"rank": (4, 8), "tau": (0.5,), "sparsity": (0.3, 0.5), "share": (0.4,)}


def _found(results: list[dict[str, Any]]) -> list[Configuration]:
    return configurations(read_outcomes(results)[0])


def _result(combination: str, perplexity: float, flops: int, trainable: int, **more: Any) -> dict[str, Any]:
    return {
        "combination": combination,
        "seed": 0,
        "test": {"token_perplexity": perplexity},
        "cost": {"flops_per_token": flops},
        "trainable_parameters": {"dense": trainable},
        **more,
    }


@settings(deadline=None)  # a busy machine is no error
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), max_size=30))
def test_front_equals_brute_force(points: list[tuple[int, int, int]]) -> None:
    def dominates(p: tuple[int, ...], q: tuple[int, ...]) -> bool:
        return all(a <= b for a, b in zip(p, q, strict=True)) and p != q

    expected = [i for i, point in enumerate(points) if not any(dominates(other, point) for other in points)]
    assert non_dominated(points) == expected


def test_what_only_rounding_tells_apart_is_on_the_front_together() -> None:
    results = [_result("baseline", 30.0, 100, 10), _result("scan", 30.0 + 1e-5, 100, 10), _result("all", 31, 100, 10)]
    assert [c.fronts for c in _found(results)] == [("flops_per_token",), ("flops_per_token",), ()]


def test_score_is_relative_to_the_baseline() -> None:
    results = [_result("baseline", 30.0, 100, 10), _result("masking", 40.0, 50, 5)]
    assert [c.score for c in _found(results)] == pytest.approx([1.0, 30 / 40 * 2 * 2])


def test_trainable_parameters_are_the_most_that_any_phase_trained() -> None:
    phases = {"gates": 1000, "adapters": 10}
    found = _found([_result("all", 30.0, 100, 0, trainable_parameters=phases, adapted_parameters=10)])
    assert found[0].trainable == 1000


def test_best_is_chosen_on_validation_text() -> None:
    results = [
        _result("baseline", 30.0, 100, 100, validation_perplexity={"dense": 30.0}),
        _result("masking", 20.0, 100, 100, validation_perplexity={"gates": 1.0, "recover": 50.0}),
        _result("peft", 40.0, 100, 100, validation_perplexity={"adapters": 25.0}),
    ]
    found = _found(results)
    chosen = best(found, found)
    assert chosen is not None
    assert (chosen.combination, chosen.perplexity["float32"]) == ("peft", 40.0)
    del results[0]["validation_perplexity"]
    found = _found(results)
    chosen = best(found, found)
    assert chosen is not None
    assert chosen.combination == "masking"


def test_cheapest_stays_within_the_limit() -> None:
    results = [_result("baseline", 30.0, 100, 10), _result("masking", 31.4, 60, 10), _result("all", 32.0, 50, 10)]
    found = _found(results)
    fitting = within(found, 0.05)
    assert [c.combination for c in fitting] == ["baseline", "masking"]
    chosen = cheapest(found, fitting)
    assert chosen is not None
    assert chosen.combination == "masking"


def test_the_best_point_stays_within_a_limit_of_quality() -> None:
    results = [_result("baseline", 30.0, 100, 100), _result("masking", 31.0, 60, 100), _result("peft", 90.0, 100, 1)]
    concluded = conclude(results)
    assert concluded.best is not None
    assert concluded.best.combination == "masking"
    limited, free = (s for s in concluded.sentences if s.startswith("The best Pareto point"))
    assert "within 5 % of the baseline's perplexity on the test text, is masking" in limited
    assert "at any perplexity is peft" in free
    assert conclude(results[2:]).best is not None  # nothing to be near to


def test_configurations_are_means_over_seeds() -> None:
    results = [_result("baseline", p, 100, 10) | {"seed": seed} for seed, p in enumerate((20.0, 45.0))]
    (found,) = _found(results)
    assert found.perplexity["float32"] == pytest.approx(30.0)
    assert (found.spread, found.seeds) == ((20.0, 45.0), (0, 1))


def test_nothing_measured_is_on_no_front() -> None:
    result = {"combination": "baseline", "seed": 0, "test": {"token_perplexity": 30.0}}
    found = _found([result])
    assert (found[0].fronts, found[0].score, best(found, found)) == ((), None, None)


def test_claims_are_reported_as_found() -> None:
    results = made_up(seeds=4, grid=SMALL)
    verdicts = {claim.text: claim.verdict for claim in check_claims(read_outcomes(results)[0])}
    assert verdicts == {
        "70–90 % fewer trainable parameters with adapters, in the last phase": "holds",
        "70–90 % fewer trainable parameters with adapters, in the phase that trains most": "holds in part",
        "30–70 % sparsity by layer": "holds in part",
        "less training memory: peft": "holds",
        "less training memory: masking+peft": "not shown",
        "less training memory: all": "not shown",
    }
    one_seed = {claim.text: claim.verdict for claim in check_claims(read_outcomes(made_up(seeds=1, grid=SMALL))[0])}
    assert one_seed["less training memory: peft"] == "not shown"
    assert {claim.verdict for claim in check_claims([])} == {"not measured"}
