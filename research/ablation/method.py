"""The end of an ablation's report: what was run, how it was compared, and how to run it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from research.ablation.conclusions import Conclusions
from research.ablation.efficiency import chosen_on
from research.ablation.outcome import PHASES, TRAINABLE
from research.reports.document import Block, Bullets, Code, Heading, Paragraph, Table
from research.reports.significance import LEVEL, ROUNDING, smallest_wilcoxon
from research.reports.words import p_value

_MOST_FAILED = 30
_SHOWN_OTHERWISE = ("base_models", "command")
_METHOD = """
Pairs: two experiments are compared within one seed, which gives them the same base model and the same data in the same
order, at the same values of those settings that both depend on. A combination that does not depend on a setting has
one result, which all values of that setting are paired with.

Units: the points of a grid in one seed share their base model and are no independent evidence. Each seed gives one
difference of log-perplexity, the mean over its pairs; tests and intervals count seeds.

Differences of at most {rounding:g} nats per token come from the order of sums, and are taken as 0.
Experiments that differ by no more in any seed are identical, and nothing is tested.

Tests: the paired t-test, two-sided, at {level:.0f} %, corrected after Holm for all {tests} tests of this report
together, which holds however they depend on each other. With few seeds its normal distribution is an assumption.
Wilcoxon's signed-rank test, uncorrected, assumes less and sees less.{fewest}

Effect size: g_z is Hedges' unbiased version of Cohen's d_z, the mean difference in standard deviations of the
differences between seeds; its interval inverts the noncentral t distribution. Where seeds agree well it is large for
small changes: read the change in percent first.

An order of channels changes no function: in float32 it shows only where gates or masks act on neighbours, in int4
where neighbours share a scale.

Choices (best point, lowest perplexity of a combination) are made on the {chosen}; all figures are of the test text.
Averages of perplexity are geometric.

Parameters, bytes, FLOPs and state are exact counts of the exported artifact. Times are medians on the machine named
above. Memory is the peak of resident memory while training, above that before.
"""


def method(conclusions: Conclusions) -> list[Block]:
    """How experiments were paired, tested and chosen."""
    n = max((c.found.n for c in conclusions.comparisons), default=0)
    text = _METHOD.format(
        rounding=ROUNDING,
        level=100 * LEVEL,
        tests=sum(c.p_holm is not None for c in conclusions.comparisons),
        fewest=f" With {n} seeds it cannot fall below {p_value(smallest_wilcoxon(n))}." if n > 1 else "",
        chosen=chosen_on(conclusions.found),
    )
    return [Heading(2, "Method"), Bullets([" ".join(note.split()) for note in text.strip().split("\n\n")])]


def what_was_run(
    conclusions: Conclusions, results: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[Block]:
    shown = {key: value for key, value in settings.items() if key not in _SHOWN_OTHERWISE}
    facts = [*_flat(shown), *_base_models(settings), *_texts(results), *_machines(results)]
    seconds = [sum((result.get("seconds") or {}).values()) for result in results]
    facts.append(("hours of work", f"{sum(seconds) / 3600:.2f}"))
    blocks: list[Block] = [Heading(2, "What was run"), Table(("setting", "value"), facts, labels=2)]
    blocks += _phases(conclusions)
    if conclusions.failed:
        rows = conclusions.failed[:_MOST_FAILED]
        left_out = f"The first {len(rows)} of {len(conclusions.failed)}." if len(rows) < len(conclusions.failed) else ""
        blocks += [
            Heading(3, "Not compared"),
            Table(("experiment", "reason"), rows, labels=2, note=left_out),
        ]
    return blocks


def _phases(conclusions: Conclusions) -> list[Block]:
    """How many parameters each phase trained, by combination."""
    found: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for outcome in conclusions.outcomes:
        for phase, trained in (outcome.result.get("trainable_parameters") or {}).items():
            found[outcome.combination][phase].append(trained)
    rows = [
        (name, *(TRAINABLE.text(fmean(phases[phase])) if phase in phases else "–" for phase in PHASES))
        for name, phases in found.items()
    ]
    note = "Thousands of parameters, means over experiments; a dash where a combination has no such phase."
    return [Heading(3, "What each phase trained"), Table(("combination", *PHASES), rows, note=note)] if rows else []


def _base_models(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [
        f"{base['test']['token_perplexity']:.2f} (seed {base['seed']})" for base in settings.get("base_models") or ()
    ]
    return [("perplexity of the test text before the task was learned", ", ".join(found))] if found else []


def _flat(values: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Nested settings as lines of text."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{above}{key}.")
        elif isinstance(value, list | tuple):
            lines.append((above + key, ", ".join(map(str, value)) or "–"))
        elif isinstance(value, float):
            lines.append((above + key, f"{value:.6g}"))
        else:
            lines.append((above + key, "–" if value is None else str(value)))
    return lines


def _texts(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which texts experiments learned from, which they were tuned on, which this report is about."""
    trainings = [result["training"] for result in results if "training" in result]
    tests = [result["test"] for result in results if result.get("test")]
    terms = {
        f"{test.get('source')}: {test.get('tokens'):,} tokens, window {test.get('window')}, stride {test.get('stride')}"
        for test in tests
        if test.get("tokens") is not None
    }
    texts = {
        "trained on": {_names(training.get("data", ())) for training in trainings},
        "tuned on": {_names(training.get("validation_data", ())) for training in trainings},
        "reported on": terms,
    }
    return [(label, "; ".join(sorted(found - {""}))) for label, found in texts.items() if found - {""}]


def _names(sources: Sequence[str]) -> str:
    """Sources without the folders of this machine."""
    return ", ".join(Path(source).name if Path(source).is_absolute() else source for source in sources)


def _machines(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    lines = []
    for label in ("machine", "versions"):
        found = {
            ", ".join(f"{k} {_shown(v)}" for k, v in (r.get(label) or {}).items() if k not in _PASSING) for r in results
        }
        lines += [(label, text) for text in sorted(found - {""})]
    return lines


_PASSING = ("load_average_1min",)  # differs from one experiment to the next


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def again(settings: Mapping[str, Any]) -> list[Block]:
    command = settings.get("command")
    if not command:
        return []
    text = command if isinstance(command, str) else " ".join(map(str, command))
    return [
        Heading(2, "Run it again"),
        Code(text),
        Paragraph("Finished experiments are read, not repeated; a new folder repeats all."),
    ]
