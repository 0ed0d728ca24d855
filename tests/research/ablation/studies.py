"""Results of an ablation, made up: what each pillar does is planted, the rest is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from research.ablation.outcome import COMBINATIONS, has_pillar

GRID = {"rank": (4, 8, 16), "tau": (0.3, 0.8), "sparsity": (0.3, 0.5, 0.7), "share": (0.2, 0.6)}
_LAYERS = 4
_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
_WEIGHTS = 2_000_000


def made_up(
    *,
    seeds: int = 5,
    effects: Mapping[str, float] | None = None,
    noise: float = 0.01,
    grid: Mapping[str, Sequence[float]] = GRID,
    draw: int = 0,
) -> list[dict[str, Any]]:
    """All combinations at all points for some seeds.

    Args:
        seeds: how many.
        effects: log-ratios of perplexity by name: of a pillar, of a combination (added to those of its pillars), or
            `int4 scan` (on int4 perplexity alone).
        noise: standard deviation of log-perplexity by experiment. Seeds differ by 0.1 from each other.
        grid: values of the settings.
        draw: seed of the drawn numbers.
    """
    rng = np.random.default_rng(draw)
    effects = {"masking": 0.12, "peft": 0.03, "int4 scan": -0.02} if effects is None else effects
    results = []
    for seed in range(seeds):
        base = math.log(35) + rng.normal(0, 0.1)
        for combination in COMBINATIONS:
            keys = [k for k in grid if has_pillar(combination, "masking" if k in ("tau", "sparsity") else "peft")]
            for values in product(*(grid[key] for key in keys)):
                point = dict(zip(keys, values, strict=True))
                results.append(_result(combination, point, seed, base, effects, noise, rng))
    return results


def _result(
    combination: str,
    point: dict[str, float],
    seed: int,
    base: float,
    effects: Mapping[str, float],
    noise: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    is_masked, has_adapters, is_scanned = (has_pillar(combination, p) for p in ("masking", "peft", "scan"))
    kept = 1 - point.get("sparsity", 0.0) if is_masked else 1.0
    nll = base + sum(effects.get(p, 0.0) for p in ("masking", "peft", "scan") if has_pillar(combination, p))
    nll += effects.get(combination, 0.0) if combination not in ("masking", "peft", "scan") else 0.0
    if is_masked and effects.get("masking"):
        nll += 0.3 * (point["sparsity"] - 0.5)
    if has_adapters and effects.get("peft"):
        nll -= 0.01 * math.log2(point["rank"] / 8)
    nll += rng.normal(0, noise)
    int4 = nll + 0.04 + (effects.get("int4 scan", 0.0) if is_scanned else 0.0) + rng.normal(0, noise / 3)
    adapted = int(2500 * point.get("rank", 0) * point.get("share", 0) * _LAYERS / 2) + 3000
    parameters = int(_WEIGHTS * (0.2 + 0.8 * kept))
    phases = {"gates": _WEIGHTS + 2048, "recover": _WEIGHTS} if is_masked else {}
    phases |= {"adapters": adapted} if has_adapters else ({} if is_masked else {"dense": _WEIGHTS})
    last = list(phases)[-1]
    names = [f"{layer}.{projection}" for layer in range(_LAYERS) for projection in _PROJECTIONS]
    ranked = sorted(names, key=lambda name: -_importance(name, rng))
    n_lora = int(point.get("share", 0) * len(names) / 2)
    before = [0.07 + 0.01 * layer for layer in range(_LAYERS)]
    return {
        "format": 1,
        "key": f"{abs(hash((combination, tuple(point.items()), seed))):016x}"[:16],
        "label": f"{combination} {seed}",
        "combination": combination,
        "point": point,
        "seed": seed,
        "training": {"data": ["train.txt"], "validation_data": ["validation.txt"], "seed": seed, "max_steps": 60},
        "start": None,
        "quantize": "none",
        "validation_perplexity": {phase: math.exp(nll - 0.02 + rng.normal(0, noise / 3)) for phase in phases},
        "test": {
            "token_perplexity": math.exp(nll), "bits_per_byte": nll / 2, "word_perplexity": math.exp(3 * nll),
            "tokens": 16384, "bytes": 50_000, "words": 9000, "window": 256, "stride": 256, "source": "test.txt",
        },
        "int4": {"token_perplexity": math.exp(int4), "source": "test.txt"},
        "cost": {
            "parameters": parameters, "weight_bytes": 4 * parameters, "flops_per_token": 2 * parameters + 40_000,
            "state_bytes": int(4 * _LAYERS * 512 * 19 * kept),
        },
        "dense_cost": {
            "parameters": _WEIGHTS, "weight_bytes": 4 * _WEIGHTS, "flops_per_token": 2 * _WEIGHTS + 40_000,
            "state_bytes": 4 * _LAYERS * 512 * 19,
        },
        "latency": {
            "prefill_ms": 20 * (0.3 + 0.7 * kept) * rng.lognormal(0, 0.02),
            "decode_ms": 0.5 * (0.4 + 0.6 * kept) * rng.lognormal(0, 0.02),
            "prompt_tokens": 128, "new_tokens": 32, "repeats": 5,
        },
        "trainable_parameters": phases,
        "adapted_parameters": phases[last],
        "training_memory_bytes": int((2e8 if has_adapters and not is_masked else 3e8) * rng.lognormal(0, 0.01)),
        "layers": {
            "channel_sparsity": [1 - kept + (0.04 * (layer - 1.5) if is_masked else 0) for layer in range(_LAYERS)],
            "state_sparsity": [0.0] * _LAYERS,
            "weight_sparsity": None,
            "allocation": {
                "lora": ranked[:n_lora], "ia3": ranked[n_lora : 2 * n_lora], "frozen": ranked[2 * n_lora :],
            } if has_adapters else None,
            "scan_correlation": {
                "before": before,
                "after": [b + (0.2 + rng.normal(0, 0.01) if is_scanned else 0.0) for b in before],
            },
        },
        "seconds": {"train": 20.0, "export": 1.0, "measure": 2.0},
        "machine": {"cpu": "A CPU", "cores_usable": 2, "torch": "2.9", "python": "3.11"},
        "versions": {"yunmin": "0.5", "torch": "2.9"},
    }  # fmt: skip


def _importance(name: str, rng: np.random.Generator) -> float:
    layer, projection = name.split(".")
    return float(-_PROJECTIONS.index(projection) + 0.2 * int(layer) + rng.normal(0, 0.8))
