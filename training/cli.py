"""Train or fine-tune a Mamba with scan order, learned masking and adapters."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from yunmin.cli import parser, print_json
from yunmin.errors import MissingExtraError

if TYPE_CHECKING:
    from training.trainer import TrainingResult


def main(argv: list[str]) -> int:
    """`yunmin train [key=value ...]`."""
    arguments = parser(
        "train",
        "Trains or fine-tunes a Mamba language model through its phases: dense, gates, recovery, adapters. Writes a "
        "run folder with checkpoints, each of which can be loaded, exported and resumed from.",
        [
            "yunmin train                                              synthetic data, to see that it works",
            "yunmin train data=stdlib run_name=python max_steps=600",
            "yunmin train checkpoint=path/to/mamba-130m-hf data=mine.jsonl learning_rate=3e-5",
            "yunmin train --config run.yaml target_sparsity=0.4 'data=[a.txt, b/]'",
            "yunmin train --resume training_outputs/python",
            "torchrun --nproc-per-node 8 -m training data=corpus/ batch_size=256",
            "accelerate launch --use_fsdp --fsdp_version 2 -m training data=corpus/ batch_size=256",
        ],
    )
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="of the keys below; values are YAML")
    arguments.add_argument("--config", metavar="FILE", help="YAML with any of the keys below")
    arguments.add_argument("--resume", metavar="DIR", help="run folder, or its newest checkpoint, to continue")
    arguments.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object")
    if "-h" in argv or "--help" in argv:
        _add_keys(arguments)
    options = arguments.parse_intermixed_args(argv)
    if options.resume and options.config:
        arguments.error("--resume continues with the run's own configuration, expected no --config")
    if options.resume and options.print_config:
        arguments.error("--print-config shows a new run's configuration, expected no --resume")

    try:
        from training.config_file import load_config
        from training.run import resume, to_yaml, train
        from training.team import is_first_process
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "train", "yunmin train") from None

    if options.print_config:
        print(to_yaml(load_config(options.config, options.overrides)), end="")
        return 0
    if options.resume:
        result = resume(options.resume, options.overrides)
    else:
        result = train(load_config(options.config, options.overrides))
    if is_first_process():
        _report(result, as_json=options.json)
    return 130 if result.interrupted else 0


def _report(result: TrainingResult, *, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(result))
    if result.interrupted:
        command = f"yunmin train --resume {shlex.quote(str(result.run))}"
        print(f"stopped after step {result.steps} of {result.total_steps}; continue with\n  {command}", file=sys.stderr)
    elif not as_json:
        _show(result)


def _as_json(result: TrainingResult) -> dict[str, Any]:
    return {
        "run": str(result.run),
        "checkpoint": str(result.checkpoint),
        "steps": result.steps,
        "total_steps": result.total_steps,
        "interrupted": result.interrupted,
        "validation_perplexity": result.validations,
        "trainable_parameters": result.trainable_parameters,
        "parameters": result.parameters,
    }


def _show(result: TrainingResult) -> None:
    print(f"{result.run}: {result.steps} steps, {result.parameters:,} parameters")
    for name, value in result.validations.items():
        print(f"  validation perplexity, {name.replace('_', ' '):<11} {value:.3f}")
    for name, count in result.trainable_parameters.items():
        print(f"  trainable parameters, {name:<12} {count:,}")
    run = shlex.quote(str(result.run))
    print(f"\nnext:\n  yunmin export {run} artifact/\n  yunmin generate {run} --prompt ... --max-tokens 64")


def _add_keys(arguments: argparse.ArgumentParser) -> None:
    """Puts every key, its default and meaning into the help."""
    from training.config import TrainingConfig
    from training.config_file import describe_keys

    lines = describe_keys(TrainingConfig)
    arguments.epilog = "\n".join(["configuration keys:", *(f"  {line}" for line in lines), "", arguments.epilog or ""])
