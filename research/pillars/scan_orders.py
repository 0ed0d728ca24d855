"""Pillar 1: orders of the channels, by what groups of neighbours lose under them.

The order changes no function. It decides which weights share an int4 scale, which four compete in a 2:4 mask, and
which channels a block mask cuts together. Each base model is put into every order and then rounded, masked or cut.
Which order is best is decided on the tuning text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.compact import Compact, compact_model, read_source
from export.cut import channel_importance, cut_and_fit, cut_channels, kept_channels, observed
from export.order import permuted, reordered
from export.quantize import quantize_checkpoint
from export.statistics import input_statistics
from export.texts import CALIBRATION_TOKENS, Text
from research.pillars.study import Study
from research.pillars.summary import TABLE_HEADER, Line, compared, mean, said, table_row
from research.reports.document import Block, Bullets, Table
from research.studies.experiments import Experiment, Laboratory
from research.studies.measures import quality
from training.masks import n_of_m_mask
from yunmin.artifact import load_artifact
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.corpus import read_documents, texts_of
from yunmin.model import MambaLM
from yunmin.n_of_m_order import n_of_m_order, retained_magnitude
from yunmin.perplexity import token_stream
from yunmin.quantization.layout import Quantization

TITLE = "Variable-aware scan"
QUESTION = "Which order of the channels loses least under int4, 2:4 masks and block masks?"
KEEPS = True  # whether artifacts are needed to measure further
ADAPTS = False  # whether anything is trained after the base models
REFERENCE = "identity"
_TEXTS = ("tuning", "test")
_NAMES = {
    "identity": "as trained",
    "random": "random",
    "correlation": "correlation",
    "quantization": "quantization-aware",
    "n:m": "N:M-aware",
    "n:m by activations": "N:M-aware, by activations",
    "saliency": "saliency",
}
ORDERS = tuple(_NAMES)
_BLOCK = 16
_N, _M = 2, 4
_MASKED = ("in_proj", "out_proj")
_BLOCK_CUTS = {"blocks, 25 % cut": 0.25, "blocks, 50 % cut": 0.5}
_MASKS = {"2:4 by magnitude": False, "2:4 by activations": True}
EFFECTS = ("int4, to nearest", "int4, calibrated", *_MASKS, *_BLOCK_CUTS)


def experiments(study: Study, _: Laboratory) -> list[Experiment]:
    """Only base models are trained."""
    return [study.base(seed) for seed in study.seeds]


def collect(study: Study, laboratory: Laboratory) -> dict[str, Any]:
    """What was found.

    Returns:
        `exact`: test perplexity of the base models, one for each seed; by order `retained` (the share of magnitude that
        2:4 masks by magnitude keep) and, by effect, perplexities on the `tuning` text and on the `test` text; by effect
        the test perplexity of cuts of as many `single` channels as blocks have, and with what reads the rest `fitted`.
    """
    found: dict[str, Any] = {"exact": [], "single": {}, "fitted": {}, "retained": {}}
    found |= {text: {effect: {} for effect in EFFECTS} for text in _TEXTS}
    for seed in study.seeds:
        base = study.base(seed)
        result = laboratory.run(base, keep=True)
        found["exact"].append(result["test"]["token_perplexity"])
        for order in ORDERS:
            facts = {
                "what": "scan order",
                "base": result["key"],
                "measures": laboratory.result_file,
                "order": order,
                "effects": EFFECTS,
            }
            measured = laboratory.remember(facts, partial(_measured, study, laboratory, seed, order))
            found["retained"].setdefault(order, []).append(measured["retained"])
            for text, effect in product(_TEXTS, EFFECTS):
                found[text][effect].setdefault(order, []).append(measured[text][effect])
        facts = {"what": "single channels, plain and fitted", "base": result["key"], "measures": laboratory.result_file}
        single = laboratory.remember({**facts, "cuts": _BLOCK_CUTS}, partial(_single, study, laboratory, base))
        for kind, effect in product(("single", "fitted"), _BLOCK_CUTS):
            found[kind].setdefault(effect, []).append(single[kind][effect])
    return found


def lines(found: Mapping[str, Any]) -> dict[str, list[Line]]:
    """By effect, every order against the one the model was trained in."""
    return compared(found["test"], REFERENCE)


def blocks(found: Mapping[str, Any]) -> list[Block]:
    """What the comparison says."""
    by_effect = lines(found)
    exact = mean(found["exact"])
    single, fitted = (
        ", ".join(f"{mean(values):.2f} ({effect})" for effect, values in found[kind].items())
        for kind in ("single", "fitted")
    )
    sentences = []
    for effect, of_effect in by_effect.items():
        tuned = {order: mean(found["tuning"][effect][order]) for order in ORDERS}
        chosen = min(tuned, key=tuned.__getitem__)
        told = {line.name: line for line in of_effect if line.name in ("correlation", chosen) and line.found}
        clauses = [said(line, f"{_NAMES[name]} order", "the order as trained") for name, line in told.items()]
        sentences.append(f"{effect}: lowest on the tuning text is {_NAMES[chosen]}; {'; '.join(clauses)}")
    rows = [
        (effect, _NAMES[line.name], *table_row(line)) for effect, of_effect in by_effect.items() for line in of_effect
    ]
    kept = [
        (_NAMES[order], f"{np.mean(values):.4f}", f"{min(values):.4f} – {max(values):.4f}")
        for order, values in found["retained"].items()
    ]
    return [
        Bullets([f"{sentence}." for sentence in sentences]),
        Table(
            ("effect", "order", *TABLE_HEADER),
            rows,
            labels=2,
            note=f"Test perplexity; without rounding, masks or cuts it is {exact:.2f} in every order. Changes are "
            f"against the order as trained. Cutting single channels instead of blocks gives {single}, and {fitted} "
            "where x_proj and out_proj are fitted to make up for them, as exports do; blocks of channels in order of "
            "saliency are to be read beside that.",
        ),
        Table(
            ("order", "magnitude kept by 2:4 masks", "least and most of the seeds"),
            kept,
            note="The share of the magnitude of W_in and W_out, a mean over both and over layers and seeds.",
        ),
    ]


def plot(found: Mapping[str, Any], axes: Any) -> None:
    """Change of perplexity against the order as trained, by effect; the ends of lines are the extreme seeds."""
    shown = [order for order in ORDERS if order != REFERENCE]
    width = 0.8 / len(shown)
    for number, order in enumerate(shown):
        logs = np.array(
            [np.log(np.array(by[order]) / np.array(by[REFERENCE])) for by in found["test"].values()]
        )  # (effects, seeds)
        change = 100 * np.expm1(logs)
        middle = change.mean(1)
        ends = np.stack([middle - change.min(1), change.max(1) - middle])
        places = np.arange(len(EFFECTS)) + (number - (len(shown) - 1) / 2) * width
        axes.bar(places, middle, width, yerr=ends, capsize=2, label=_NAMES[order])
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_xticks(range(len(EFFECTS)), EFFECTS, fontsize="small")
    axes.set_ylabel("change of perplexity, % (symlog)")
    axes.legend()


def _measured(study: Study, laboratory: Laboratory, seed: int, order: str) -> dict[str, Any]:
    base = study.base(seed)
    source = read_source(laboratory.artifact(base))
    study.report(f"{base.label}: order {order}")
    calibration = _tuning_text(study, source.checkpoint)
    compact = _ordered(compact_model(source), order, calibration, seed)
    checkpoint = replace(source.checkpoint, config=compact.config, tensors=compact.cast(torch.float32).tensors)

    changed: dict[str, Checkpoint] = {}
    for effect, text in (("int4, to nearest", None), ("int4, calibrated", calibration)):
        changed[effect] = quantize_checkpoint(checkpoint, Quantization("int4"), text, lambda _: None)
    plain, weighted = (_scores(checkpoint, text) for text in (None, calibration))
    for effect, by_activations in _MASKS.items():
        changed[effect] = _masked(checkpoint, weighted if by_activations else plain)
    importance = channel_importance(checkpoint, observed(checkpoint, calibration))
    for effect, share in _BLOCK_CUTS.items():
        changed[effect] = cut_channels(checkpoint, [kept_in_blocks(values, share) for values in importance])
    tuning = replace(laboratory.measures, test=str(study.base_text.tune))
    return {
        "retained": sum(retained_magnitude(score, _N, _M) for score in plain.values()) / len(plain),
        "tuning": {effect: quality(model, tuning)["token_perplexity"] for effect, model in changed.items()},
        "test": {effect: quality(model, laboratory.measures)["token_perplexity"] for effect, model in changed.items()},
    }


def _single(study: Study, laboratory: Laboratory, base: Experiment) -> dict[str, Any]:
    """Test perplexity, by effect, where the same number of single channels is cut, and what reads the rest fitted."""
    checkpoint, _ = load_artifact(laboratory.artifact(base))
    statistics = observed(checkpoint, _tuning_text(study, checkpoint), for_fit=True)
    importance = channel_importance(checkpoint, statistics)
    found: dict[str, dict[str, float]] = {"single": {}, "fitted": {}}
    for effect, share in _BLOCK_CUTS.items():
        kept = kept_channels(importance, round(checkpoint.config.d_inner[0] * (1 - share)))
        cuts = {"single": cut_channels(checkpoint, kept), "fitted": cut_and_fit(checkpoint, kept, statistics)}
        for kind, cut in cuts.items():
            found[kind][effect] = quality(cut, laboratory.measures)["token_perplexity"]
    return found


def _tuning_text(study: Study, checkpoint: Checkpoint) -> Text:
    assert checkpoint.tokenizer is not None
    texts = texts_of(read_documents(str(study.base_text.tune)))
    ids, _ = token_stream(checkpoint.tokenizer, texts, CALIBRATION_TOKENS)
    return Text(torch.tensor(ids), study.base_text.tune.name)


def _ordered(compact: Compact, order: str, text: Text, seed: int) -> Compact:
    config, layers = compact.config, range(compact.config.n_layers)
    match order:
        case "identity":
            return compact
        case "random":
            rng = torch.Generator().manual_seed(seed)
            inner = [torch.randperm(width, generator=rng) for width in config.d_inner]
            return permuted(compact, inner, torch.randperm(config.d_model, generator=rng))
        case "correlation" | "quantization":
            return reordered(compact, order, text, lambda _: None)
    checkpoint = Checkpoint(config, compact.cast(torch.float32).tensors, None, Path())
    if order == "saliency":
        importance = channel_importance(checkpoint, observed(checkpoint, text))
        inner = [torch.argsort(values, descending=True) for values in importance]
        return permuted(compact, inner, torch.arange(config.d_model))
    scores = _scores(checkpoint, text if order == "n:m by activations" else None)
    inner = [n_of_m_order([scores[_weight(i, "out_proj")]], _N, _M) for i in layers]
    return permuted(compact, inner, n_of_m_order([scores[_weight(i, "in_proj")] for i in layers], _N, _M))


def _scores(checkpoint: Checkpoint, text: Text | None) -> dict[str, Tensor]:
    """What masks go by, by the weight's name: magnitudes, times the inputs' root mean squares (Sun et al. 2023)."""
    names = [_weight(i, projection) for i in range(checkpoint.config.n_layers) for projection in _MASKED]
    magnitudes = {name: checkpoint.tensors[name].abs() for name in names}
    if text is None:
        return magnitudes
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    found = input_statistics(model, text.sequences())
    return {n: w * found[n.removesuffix(".weight")].mean_squares.sqrt().float() for n, w in magnitudes.items()}


def _masked(checkpoint: Checkpoint, scores: Mapping[str, Tensor]) -> Checkpoint:
    """2:4 masks on the projections that are masked by default."""
    tensors = dict(checkpoint.tensors)
    for name, score in scores.items():
        rows, columns = (torch.arange(size) for size in score.shape)
        tensors[name] = tensors[name] * n_of_m_mask(score, _N, _M, rows, columns)
    return replace(checkpoint, tensors=tensors)


def kept_in_blocks(importance: Tensor, cut: float) -> Tensor:
    """The channels of the most important blocks of neighbours, int64, when a share of all blocks is cut.

    Args:
        importance: of each channel, in their order (D,).
        cut: share of blocks to cut.
    """
    by_block = importance.view(-1, _BLOCK).sum(1)
    kept = by_block.topk(round(by_block.numel() * (1 - cut))).indices.sort().values
    return (kept[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()


def _weight(layer: int, projection: str) -> str:
    return f"{layer_prefix(layer)}mixer.{projection}.weight"
