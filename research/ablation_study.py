"""Run every combination of the three pillars over a grid, and report what each is worth."""

from __future__ import annotations

import argparse
from pathlib import Path

from yunmin.cli import parser, run

_MODES = ("pilot", "quick_research", "research")


def main(argv: list[str]) -> int:
    """`yunmin ablate --mode pilot|quick_research|research`."""
    options = _arguments().parse_args(argv)
    from research.ablation.command import dry_run, perform

    return dry_run(options) if options.dry_run else perform(options)


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "ablate",
        "Trains, exports and measures all eight combinations of the pillars (scan order, masking, adapters) over a "
        "grid, each from the same base model, on the same text, for the same number of steps; then compares them. A "
        "study can be stopped at any time and goes on where it was.",
        [
            "yunmin ablate --mode pilot                      minutes on two cores",
            "yunmin ablate --mode research --dry-run         what it would be, and how long it would take",
            "yunmin ablate --mode quick_research --data mine.jsonl --checkpoint path/to/mamba-130m-hf",
            "yunmin ablate --resume research_outputs_20260101-120000",
            "yunmin ablate --mode research --ray auto --wandb",
            "yunmin ablate --mode quick_research --search optuna --trials 60",
            "yunmin ablate --mode pilot --set channel_gates=block --grid sparsity=0.5",
        ],
    )
    add = arguments.add_argument
    add("--mode", choices=_MODES, help="size of models, texts and grid (pilot)")
    add("--epochs", type=int, metavar="N", help="passes over the text in each experiment (1, 2, 3 by mode)")
    add("--seeds", type=int, metavar="N", help="repetitions of everything, from the base model on (5, 3, 3 by mode)")
    add("--data", nargs="+", metavar="SOURCE", help="text of the task (the running Python's documentation)")
    add("--checkpoint", metavar="MODEL", help="where all start (a base model per seed, trained on the library's code)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="options of `yunmin train` for all experiments")
    add("--grid", nargs="+", default=[], metavar="KEY=V,V", help="other values of rank, tau, sparsity or share")
    add("--disable-grid-search", action="store_true", help="one point: rank 8, tau 0.5, sparsity 0.5, share 0.4")
    add("--search", choices=["optuna"], help="draw points by what they gave so far, instead of the whole grid")
    add("--trials", type=int, metavar="N", help="of the search (40)")
    add("--workers", type=int, metavar="N", help="processes, one thread each (one per core; 1 on a GPU)")
    add("--ray", metavar="ADDRESS", help="do it on a Ray cluster: its address, `auto`, or `local`")
    add("--output", type=Path, metavar="DIR", help="folder of the study (research_outputs_TIMESTAMP)")
    add("--resume", type=Path, metavar="DIR", help="folder of a study to go on with, or to extend")
    add("--project", metavar="NAME", help="name in the report and in Weights & Biases (yunmin-ablation)")
    add("--wandb", action="store_true", help="log to Weights & Biases; WANDB_MODE is respected")
    add("--tensorboard", action="store_true", help="write events for TensorBoard")
    add("--disable-visualization", action="store_true", help="no plots")
    add("--dry-run", action="store_true", help="print the plan and how long it will take, and stop")
    add("--json", action="store_true", help="print the outcome as one JSON object")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run(main))
