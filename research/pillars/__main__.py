"""Compare a pillar with its honest baselines, over several seeds: `python -m research.pillars COMPARISON`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from yunmin.cli import parser, print_json, run
from yunmin.errors import ConfigError

COMPARISONS = {"scan-order": "scan_orders", "masking": "masking", "adapters": "adapters", "pipeline": "pipeline"}
_SHIFT = ("stdlib:code", "stdlib:reference")  # from code to English
_TEXTS = {
    "scan-order": ("stdlib", "stdlib"),
    "masking": ("stdlib", "stdlib"),
    "adapters": _SHIFT,
    "pipeline": _SHIFT,
}  # base models learn the first, what starts from them the second
_SIZES = ("tiny", "2m", "10m")


def main(argv: list[str]) -> int:
    """Runs a comparison, or goes on with it."""
    options = _arguments().parse_args(argv)
    for option in ("seeds", "workers", "steps", "base_steps", "test_tokens"):
        value = getattr(options, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} must be at least 1, got {value}")

    from research.pillars.report import check_section, update_section, write_report
    from research.pillars.runner import run_comparison
    from research.pillars.study import Study
    from research.studies.experiments import write_result
    from research.studies.progress import Progress
    from research.studies.workers import terminated_as_interrupted

    base, text = _TEXTS[options.comparison]
    study = Study(
        folder=Path(options.output),
        base_source=options.base or base,
        source=options.text or options.base or text,
        size=options.size,
        seeds=tuple(range(options.seeds)),
        test_tokens=options.test_tokens,
    )
    given = {"steps": options.steps, "base_steps": options.base_steps}
    study = replace(study, budget=replace(study.budget, **{k: v for k, v in given.items() if v is not None}))
    module = COMPARISONS[options.comparison]
    stem = options.comparison if options.size == "2m" else f"{options.comparison}-{options.size}"
    if options.docs is not None:
        check_section(Path(options.docs), stem)
    with Progress() as progress, terminated_as_interrupted():
        found = run_comparison(module, replace(study, report=progress.line), options.workers, progress)
    write_result(study.folder / f"{stem}.json", found)
    page = write_report(module, found, study.folder, stem)
    if options.docs is not None:
        update_section(Path(options.docs), module, found, stem)
    if options.json:
        print_json(found)
    else:
        print(page)
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "pillars",
        "Trains small models on real text and compares a pillar with its baselines at equal budget, over several "
        "seeds. Stopped at any time, it goes on when it is started again.",
        [
            "python -m research.pillars scan-order",
            "python -m research.pillars masking --seeds 5 --workers 4",
            "python -m research.pillars adapters --base wikitext.txt --text shakespeare.txt",
            "python -m research.pillars pipeline",
            "python -m research.pillars masking --size tiny --seeds 2 --steps 40 --base-steps 40",
        ],
    )
    arguments.prog = "python -m research.pillars"
    arguments.add_argument("comparison", choices=list(COMPARISONS), help="what to compare")
    arguments.add_argument("--base", metavar="SOURCE", help="text of base models (of the standard library)")
    arguments.add_argument("--text", metavar="SOURCE", help="what is learned after it (the same as --base, if given)")
    arguments.add_argument("--size", choices=_SIZES, default="2m", help="parameters of the models (%(default)s)")
    arguments.add_argument("--seeds", type=int, default=3, metavar="N", help="models of each kind (%(default)s)")
    arguments.add_argument("--steps", type=int, metavar="N", help="of what starts from a base model (300)")
    arguments.add_argument("--base-steps", type=int, metavar="N", help="of a base model (600)")
    arguments.add_argument("--test-tokens", type=int, default=32768, metavar="N", help="to score at most (%(default)s)")
    arguments.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes of one thread (%(default)s)"
    )
    arguments.add_argument("--output", default="pillar_outputs", metavar="DIR", help="folder (%(default)s)")
    arguments.add_argument("--docs", metavar="FILE", help="Markdown file whose section of that name is renewed")
    arguments.add_argument("--json", action="store_true", help="print what was found as one JSON object")
    return arguments


if __name__ == "__main__":
    sys.exit(run(main))
