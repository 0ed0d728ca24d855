"""Score a model on a task: perplexity, summaries, answers, programs, or tasks of lm-eval."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

from research.evaluate_options import LM_EVAL, TASKS, parse_options
from yunmin.cli import print_json, run


def main(argv: list[str]) -> int:
    """`yunmin eval MODEL --task TASK --data SOURCE`, or `--lm-eval TASK`."""
    options = parse_options(argv)

    from research.models import open_model
    from research.progress import ProgressBar

    with ProgressBar() as progress:
        model = open_model(
            options.model,
            device=options.device,
            runtime=options.runtime,
            batch_size=options.batch_size,
            api_key=os.environ.get(options.api_key_env) or None,
            progress=progress,
        )
        if options.task == LM_EVAL:
            from research.lm_eval_model import run_lm_eval

            result = run_lm_eval(model, options)
        else:
            result = importlib.import_module(TASKS[options.task]).run(model, options)
    asked = {"model": options.model, "task": options.task, "data": options.data, "held_out": options.held_out}
    result = asked | result
    if options.json:
        print_json(result)
    else:
        print(show(result))
    return 0


def show(result: dict[str, Any]) -> str:
    """A result for a terminal, with its intervals."""
    intervals = result.get("intervals") or {}
    lines = []
    for name, value in _flat(result):
        ends = intervals.get(name)
        between = "" if ends is None else f"  [{ends[0]:.4f}, {ends[1]:.4f}]"
        shown = f"{value:.4f}" if isinstance(value, float) else str(value)
        lines.append(f"{name.replace('_', ' '):<24} {shown}{between}")
    if intervals:
        what = f"{intervals['units']:,} {intervals['resampled']}"
        lines.append(f"in brackets: {intervals['confidence']:.0%} by bootstrap over {what}")
    return "\n".join(lines)


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
