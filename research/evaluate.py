"""Score a model on a task: perplexity, summaries, answers, programs, or tasks of lm-eval."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from research.evaluate_options import LM_EVAL, TASKS, parse_options
from yunmin.cli import print_json, run

if TYPE_CHECKING:
    from research.models.model import Progress, TextModel


def main(argv: list[str]) -> int:
    """`yunmin eval MODEL --task TASK --data SOURCE`, or `--lm-eval TASK`."""
    options = parse_options(argv)

    from research.progress import ProgressBar

    with ProgressBar() as progress:
        if options.task == "code":
            from research.tasks import code

            open_model = None if options.score_samples else partial(_open, options, progress)
            result = code.run(open_model, options, progress=progress)
        elif options.task == LM_EVAL:
            from research.models.lm_eval_model import run_lm_eval

            result = run_lm_eval(_open(options, progress), options)
        else:
            result = importlib.import_module(TASKS[options.task]).run(_open(options, progress), options)
    asked = {"model": options.model, "task": options.task, "data": options.data, "held_out": options.held_out}
    result = asked | result
    if options.json:
        print_json(result)
    else:
        print(show(result))
    return 0


def _open(options: argparse.Namespace, progress: Progress) -> TextModel:
    from research.models.model import open_model

    return open_model(
        options.model,
        device=options.device,
        runtime=options.runtime,
        batch_size=options.batch_size,
        api_key=os.environ.get(options.api_key_env, "").strip() or None,
        progress=progress,
    )


def show(result: dict[str, Any]) -> str:
    """A result for a terminal, with its intervals."""
    intervals = result.get("intervals") or {}
    lines = []
    for name, value in _flat(result):
        ends = intervals.get(name)
        between = "" if ends is None else f"  [{ends[0]:.4f}, {ends[1]:.4f}]"
        shown = f"{value:.4f}" if isinstance(value, float) else _line(value)
        lines.append(f"{name.replace('_', ' '):<24} {shown}{between}")
    if intervals:
        what = f"{intervals['units']:,} {intervals['resampled']}"
        lines.append(f"in brackets: {intervals['confidence']:.0%} by bootstrap over {what}")
    return "\n".join(lines)


def _line(value: Any) -> str:
    text = str(value)
    return text if text.isprintable() else repr(value)


def _flat(result: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, those of nested objects, too, but for intervals."""
    for name, value in result.items():
        if isinstance(value, dict):
            if name != "intervals":
                yield from _flat(value, f"{before}{name} ")
        elif value is not None:
            yield before + name, value


if __name__ == "__main__":
    raise SystemExit(run(main))
