"""What the report of an ablation says, as blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from research.ablation.comparisons import Comparison, Kind
from research.ablation.conclusions import KINDS, Conclusions
from research.ablation.efficiency import MAIN_COST, SCORE, Configuration, chosen_on, decisive
from research.ablation.method import again, method, what_was_run
from research.ablation.outcome import COMBINATIONS, COSTS, MEASURES, TRAINABLE
from research.ablation.plots import PLOTS
from research.reports.document import Block, Bullets, Heading, Image, Paragraph, Table
from research.reports.words import change, count, interval, listed, number, p_value

PLOT_FOLDER = "plots"
_MOST_ROWS = 30
_FRONT_NAMES = {"flops_per_token": "FLOPs", "weight_bytes": "bytes", "state_bytes": "state", "decode_ms": "decode"}
_TESTED_HEADER = (
    "comparison", "weights", "perplexity", "95 % interval", "effect size g_z", "its 95 % interval", "t-test p",
    "corrected p", "Wilcoxon p", "seeds", "pairs", "significant",
)  # fmt: skip


def report_blocks(
    conclusions: Conclusions,
    results: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
    not_drawn: Mapping[str, str] | None,
) -> list[Block]:
    """The whole report.

    Args:
        conclusions: of the results.
        results: all of them, as recorded.
        settings: of the study.
        not_drawn: why a plot was not drawn, by its name, or an empty text; None where plots were not asked for.
    """
    blocks: list[Block] = [
        Heading(1, f"Ablation of the three pillars: {settings.get('project', 'yunmin')}"),
        Paragraph(_summary(conclusions, settings)),
        Heading(2, "Conclusions"),
        Bullets(conclusions.sentences),
    ]
    if conclusions.outcomes:
        blocks += [
            *_efficiency(conclusions),
            *_plots(("pareto_fronts", "efficiency_surface"), not_drawn),
            Heading(2, "Effects on perplexity"),
            *_effects(conclusions),
            *_plots(("pillar_effects", "parameter_impacts"), not_drawn),
            Heading(2, "Classic claims"),
            Table(("claim", "verdict", "found"), [(c.text, c.verdict, c.found) for c in conclusions.claims], labels=3),
            Heading(2, "Layers"),
            *_plots(("sparsity_by_layer", "allocation_maps", "scan_correlation"), not_drawn),
        ]
    return [*blocks, *what_was_run(conclusions, results, settings), *method(conclusions), *again(settings)]


def _summary(conclusions: Conclusions, settings: Mapping[str, Any]) -> str:
    combinations = {outcome.combination for outcome in conclusions.outcomes}
    words = [
        count(len(conclusions.outcomes), "experiment") + " finished",
        f"{len(conclusions.failed)} could not be compared",
        f"{len(combinations)} of {len(COMBINATIONS)} combinations of the pillars",
        count(len(conclusions.found), "configuration"),
        count(len(conclusions.seeds), "seed"),
    ]
    mode = f"Mode {settings['mode']}: " if "mode" in settings else ""
    return f"{mode}{listed(words)}. Everything below is computed from these results."


def _efficiency(conclusions: Conclusions) -> list[Block]:
    found = conclusions.found
    lowest: dict[str, Configuration] = {}
    for configuration in sorted(found, key=lambda c: decisive(c, found)):
        lowest.setdefault(configuration.combination, configuration)
    on_front = [c for c in found if MAIN_COST in c.fronts]
    ranked = sorted(on_front, key=lambda c: -(c.score or 0.0))
    left_out = f" The first {_MOST_ROWS} of {len(ranked)}." if len(ranked) > _MOST_ROWS else ""
    return [
        Heading(2, "Efficiency: quality, cost, trainable parameters"),
        Paragraph(f"Pareto first: fronts hold what no other configuration beats. Then one number: {SCORE}"),
        Heading(3, "The front of perplexity, FLOPs and trainable parameters"),
        _configurations(ranked[:_MOST_ROWS], "By score." + left_out),
        Heading(3, "Each combination where its perplexity is lowest"),
        _configurations(
            [lowest[name] for name in COMBINATIONS if name in lowest], f"Chosen on the {chosen_on(found)}."
        ),
    ]


def _configurations(found: Sequence[Configuration], note: str) -> Table:
    header = ["configuration", "seeds", "perplexity", "of seeds", "int4 perplexity"]
    header += [quantity.label for quantity in (*COSTS.values(), TRAINABLE)]
    rows = [
        [
            c.name,
            str(len(c.seeds)),
            f"{c.perplexity[MEASURES[0]]:.3f}",
            f"{c.spread[0]:.2f}–{c.spread[1]:.2f}",
            f"{c.perplexity['int4']:.3f}" if "int4" in c.perplexity else "–",
            *(quantity.text(c.costs.get(key)) for key, quantity in COSTS.items()),
            TRAINABLE.text(c.trainable),
            number(c.score),
            "all" if len(c.fronts) == len(COSTS) else ", ".join(_FRONT_NAMES[key] for key in c.fronts) or "–",
        ]
        for c in found
    ]
    fronts = (
        "Fronts: with which cost no other configuration is as good in perplexity, that cost and trainable parameters, "
        "and better in one of them."
    )
    return Table((*header, "score", "fronts"), rows, note=f"{note} {fronts}")


def _effects(conclusions: Conclusions) -> list[Block]:
    blocks: list[Block] = []
    for kind, (title, _) in KINDS.items():
        rows = [_tested_row(comparison) for comparison in conclusions.comparisons if comparison.kind == kind]
        if rows:
            blocks += [Heading(3, title), Table(_TESTED_HEADER, rows, labels=2, note=_NOTES[kind])]
    return blocks


_NOTES: dict[Kind, str] = {
    "baseline": "Below 0 %, the combination is better than the baseline.",
    "all": "Below 0 %, all three pillars together are better than the combination in the row.",
    "pillar": "The mean over the four combinations with a pillar against that over the four without it.",
    "interaction": "Of two pillars: the effect of one in presence of the other against its effect without it, so 0 % "
    "where effects add up (in log-perplexity). Of three: how that differs with and without the third.",
    "setting": "The largest value against the smallest, all else being equal.",
}


def _tested_row(comparison: Comparison) -> tuple[str, ...]:
    found = comparison.found
    return (
        comparison.subject,
        comparison.measure,
        change(found.change),
        interval(found.change_interval),
        number(found.effect_size),
        interval(found.effect_interval, "number"),
        p_value(found.p_t),
        p_value(comparison.p_holm),
        p_value(found.p_wilcoxon),
        str(found.n),
        str(comparison.pairs),
        _verdict(comparison),
    )


def _verdict(comparison: Comparison) -> str:
    if comparison.p_holm is None:
        return "identical" if comparison.is_identical else "not tested"
    return "yes" if comparison.is_significant else "no"


def _plots(names: Sequence[str], not_drawn: Mapping[str, str] | None) -> list[Block]:
    blocks: list[Block] = []
    for plot in PLOTS:
        if plot.name in names:
            reason = "plots were not asked for" if not_drawn is None else not_drawn[plot.name]
            blocks.append(Heading(3, plot.title))
            image = Image(f"{PLOT_FOLDER}/{plot.file}", plot.title, plot.caption)
            blocks.append(Paragraph(f"Not drawn: {reason}.") if reason else image)
    return blocks
