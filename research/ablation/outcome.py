"""One experiment of the ablation as its report reads it: which pillars, which settings, how good, at what cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PILLARS = ("scan", "masking", "peft")
COMBINATIONS = ("baseline", "scan", "masking", "peft", "scan+masking", "scan+peft", "masking+peft", "all")
GRID_KEYS = {
    "rank": "rank of LoRA",
    "tau": "final temperature of the gates",
    "sparsity": "target share of channels cut",
    "share": "share of projections adapted",
}
PHASES = ("dense", "gates", "recover", "adapters")  # of training, in order
MEASURES = ("float32", "int4")  # the precisions in which an artifact's perplexity is measured


@dataclass(frozen=True)
class Quantity:
    """What an experiment costs, and how it is printed.

    Attributes:
        label: with the unit after a comma.
        divisor: takes the stored number to that unit.
        digits: after the point, at least; a small value has as many as show three that count.
    """

    label: str
    divisor: float
    digits: int

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        shown = value / self.divisor
        digits = self.digits if not 0 < shown < 1 else max(self.digits, 2 - math.floor(math.log10(shown)))
        return f"{shown:,.{digits}f}"


COSTS = {
    "flops_per_token": Quantity("FLOPs per token, MFLOP", 1e6, 2),
    "weight_bytes": Quantity("weights, MB", 1e6, 2),
    "state_bytes": Quantity("state of a sequence, kB", 1e3, 1),
    "decode_ms": Quantity("decode of a token, ms", 1, 3),
}
TRAINABLE = Quantity("trainable parameters, thousands", 1e3, 1)


@dataclass(frozen=True)
class Outcome:
    """A finished experiment.

    Attributes:
        combination: one of `COMBINATIONS`.
        point: the grid keys that this combination depends on.
        seed: of the experiment.
        perplexity: per token of the test text, by precision; what was not measured is missing.
        validation: perplexity on the validation text after the last phase, or None.
        costs: by key of `COSTS`; what was not measured is missing.
        trainable: the most parameters that any phase trained.
        adapted: the parameters that the last phase trained.
        memory_bytes: that training took at its peak, or None.
        result: all that was recorded.
    """

    combination: str
    point: Mapping[str, float]
    seed: int
    perplexity: Mapping[str, float]
    validation: float | None
    costs: Mapping[str, float]
    trainable: int | None
    adapted: int | None
    memory_bytes: int | None
    result: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The combination and its settings, for people."""
        return name_of(self.combination, self.point)

    def log_perplexity(self, measure: str) -> float | None:
        """Mean negative log-likelihood in nats per token, or None where it was not measured."""
        found = self.perplexity.get(measure)
        return None if found is None else math.log(found)


def name_of(combination: str, point: Mapping[str, float]) -> str:
    """A combination with its settings: `all (rank 8, sparsity 0.5)`."""
    settings = ", ".join(f"{key} {value:g}" for key, value in point.items())
    return f"{combination} ({settings})" if settings else combination


def has_pillar(combination: str, pillar: str) -> bool:
    """Whether a combination uses a pillar."""
    return combination == "all" or pillar in combination.split("+")


def combination_with(pillars: Sequence[str]) -> str:
    """The name of the combination that uses these pillars and no others."""
    names = [pillar for pillar in PILLARS if pillar in pillars]
    return "all" if len(names) == len(PILLARS) else "+".join(names) or "baseline"


def read_outcomes(results: Sequence[Mapping[str, Any]]) -> tuple[list[Outcome], list[tuple[str, str]]]:
    """Sorts results into those that can be compared and those that cannot.

    Args:
        results: as an ablation records them. The same configuration twice (a search may draw it again) counts once.

    Returns:
        The outcomes, by combination, point and seed; and (name, reason) of each result that has none: it failed, or
        its perplexity is not a number above 0.
    """
    outcomes: dict[Any, Outcome] = {}
    failed = []
    for result in results:
        point = {key: float(result["point"][key]) for key in GRID_KEYS if key in result.get("point", {})}
        combination, seed = result["combination"], int(result["seed"])
        name = f"{name_of(combination, point)}, seed {seed}"
        perplexity = _perplexities(result)
        if result.get("error"):
            failed.append((name, " ".join(str(result["error"]).split())))
        elif combination not in COMBINATIONS:
            failed.append((name, f"no combination of {', '.join(PILLARS)}: not compared"))
        elif "float32" not in perplexity:
            failed.append((name, "no finite perplexity on the test text"))
        else:
            outcomes[combination, tuple(point.items()), seed] = _outcome(result, combination, point, seed, perplexity)
    order = {name: index for index, name in enumerate(COMBINATIONS)}
    return sorted(outcomes.values(), key=lambda o: (order[o.combination], tuple(o.point.values()), o.seed)), failed


def _perplexities(result: Mapping[str, Any]) -> dict[str, float]:
    found = {"float32": result.get("test"), "int4": result.get("int4")}
    values = {measure: _finite((quality or {}).get("token_perplexity")) for measure, quality in found.items()}
    return {measure: value for measure, value in values.items() if value is not None}


def _finite(perplexity: Any) -> float | None:
    return float(perplexity) if perplexity is not None and 0 < perplexity < math.inf else None


def _outcome(
    result: Mapping[str, Any], combination: str, point: dict[str, float], seed: int, perplexity: dict[str, float]
) -> Outcome:
    costs = {**(result.get("latency") or {}), **(result.get("cost") or {})}
    by_phase = result.get("trainable_parameters") or {}
    validations = list((result.get("validation_perplexity") or {}).values())
    return Outcome(
        combination=combination,
        point=point,
        seed=seed,
        perplexity=perplexity,
        validation=_finite(validations[-1]) if validations else None,
        costs={key: float(costs[key]) for key in COSTS if costs.get(key) is not None},
        trainable=max(by_phase.values(), default=result.get("adapted_parameters")),
        adapted=result.get("adapted_parameters"),
        memory_bytes=result.get("training_memory_bytes"),
        result=result,
    )
