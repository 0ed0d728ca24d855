"""Pillar 2: learned gates against cuts by magnitude, by activations and at random, before and after equal recovery.

Every way has the same base model and the same steps: half of them before the cut, in which gates are learned or the
weights simply train on, and half of them after it. The cuts have the same widths. Learned gates start in the order of
what their units carry, as by default, or all alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy as np

from research.pillars.study import Study
from research.pillars.summary import TABLE_HEADER, Line, compared, mean, said, table_row
from research.reports import words
from research.reports.document import Block, Bullets, Paragraph, Table
from research.studies.experiments import Experiment, Laboratory
from training.activations import FIRST_BATCHES

TITLE = "Learned masking"
QUESTION = "Does learning gates give a better cut model than training on and cutting by magnitude, activations or lot?"
KEEPS = False  # whether artifacts are needed to measure further
ADAPTS = True  # whether anything is trained after the base models
_ALIKE = "learned, started alike"
RANKINGS = {
    "learned": "learned gates",
    _ALIKE: "learned gates, started alike",
    "activation": "a cut by activations",
    "magnitude": "a cut by magnitude",
    "random": "a random cut",
}
REFERENCE = "learned"
CUTS: dict[str, dict[str, float]] = {
    "30 % of channels": {"target_sparsity": 0.3},
    "50 % of channels": {"target_sparsity": 0.5},
    "70 % of channels": {"target_sparsity": 0.7},
    "half the state": {"target_sparsity": 0.0, "target_state_sparsity": 0.5},
}
_CONFIRMED = ("50 % of channels",)  # with models that take five times as long
_MULTIPLE = 16
_DODGE = 0.12  # between marks of a cut
_OPTIONS: dict[str, Any] = {
    "scan_mode": "none",
    "enable_peft": False,
    "dense_share": 0.0,
    "gate_share": 0.5,
    "recover_share": 0.5,
    "channel_multiple": _MULTIPLE,
}


def experiments(study: Study, _: Laboratory) -> list[Experiment]:
    """Everything to be trained."""
    return [experiment for seed in study.seeds for _, _, experiment in _of_seed(study, seed)]


def collect(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    """What was found.

    Returns:
        `perplexity`: by cut and ranking, one for each seed, `before` recovery (on the tuning text) and `after` it (on
        the test text); `dense`: the same steps without a cut, on the test text; `cut`: by cut, the shares of channels
        and states that are gone.
    """
    found: dict[str, Any] = {"dense": [], "perplexity": {}, "cut": {}}
    for seed in study.seeds:
        for cut, ranking, experiment in _of_seed(study, seed):
            result = laboratory.run(experiment)
            after = result["test"]["token_perplexity"]
            if cut is None or ranking is None:
                found["dense"].append(after)
                continue
            values = found["perplexity"].setdefault(cut, {}).setdefault(ranking, {"before": [], "after": []})
            values["before"].append(result["validation_perplexity"]["hard_gates"])
            values["after"].append(after)
            layers = result["layers"]
            found["cut"][cut] = [fmean(layers[f"{what}_sparsity"]) for what in ("channel", "state")]
    return found


def lines(found: dict[str, Any], when: str) -> dict[str, list[Line]]:
    """By cut, every ranking against `REFERENCE`, `before` recovery or `after` it, which is what counts."""
    tables = {cut: {name: values[when] for name, values in by.items()} for cut, by in found["perplexity"].items()}
    return compared(tables, REFERENCE)


def blocks(found: dict[str, Any]) -> list[Block]:
    """What the comparison says."""
    after = lines(found, "after")
    dense = mean(found["dense"])
    sentences = [
        f"{cut}: {', '.join(said(line, RANKINGS[line.name], RANKINGS[REFERENCE]) for line in by[1:])}"
        for cut, by in after.items()
    ]
    real = [f"{words.percent(max(shares))} ({cut})" for cut, shares in found["cut"].items()]
    return [
        Paragraph("After recovery:"),
        Bullets([f"{sentence}." for sentence in sentences]),
        _table(
            after,
            f"After recovery, on the test text; without a cut {dense:.2f}. Cuts leave multiples of {_MULTIPLE} "
            f"channels: gone are {words.listed(real)}. Learned gates that do not start alike look at "
            f"{FIRST_BATCHES} batches before they train.",
        ),
        _table(lines(found, "before"), "Before recovery, on the tuning text."),
    ]


def _table(by_cut: dict[str, list[Line]], note: str) -> Table:
    rows = [(cut, RANKINGS[line.name], *table_row(line)) for cut, of_cut in by_cut.items() for line in of_cut]
    whole_note = f"{note} Changes are against {RANKINGS[REFERENCE]}."
    return Table(("cut", "chosen", *TABLE_HEADER), rows, labels=2, note=whole_note)


def plot(found: dict[str, Any], axes: Any) -> None:
    """Perplexity after recovery by cut, one mark for each ranking; the ends of lines are the extreme seeds."""
    shown = list(next(iter(found["perplexity"].values())))
    for number, ranking in enumerate(shown):
        values = np.array([by[ranking]["after"] for by in found["perplexity"].values()])  # (cuts, seeds)
        middle = values.mean(1)
        ends = np.stack([middle - values.min(1), values.max(1) - middle])
        places = np.arange(len(values)) + _DODGE * (number - (len(shown) - 1) / 2)
        axes.errorbar(places, middle, yerr=ends, fmt="o", capsize=3, label=RANKINGS[ranking])
    axes.axhline(np.mean(found["dense"]), color="gray", linestyle=":", label="no cut")
    axes.set_xticks(range(len(found["perplexity"])), list(found["perplexity"]))
    axes.set_ylabel("test perplexity after recovery")
    axes.legend()


def _of_seed(study: Study, seed: int) -> Iterator[tuple[str | None, str | None, Experiment]]:
    uncut = {**_OPTIONS, "enable_masking": False, "dense_share": 1.0}
    yield None, None, study.adapted(seed, uncut, "masking, no cut")
    confirms = study.size == "10m"
    for cut in _CONFIRMED if confirms else CUTS:
        for ranking in RANKINGS:
            if confirms and ranking == _ALIKE:
                continue
            kind = "learned" if ranking == _ALIKE else ranking
            start = "equal" if ranking == _ALIKE else "activation"
            options = {**_OPTIONS, **CUTS[cut], "gate_ranking": kind, "state_ranking": kind, "gate_start": start}
            yield cut, ranking, study.adapted(seed, options, f"masking, {cut}, {ranking}")
