"""One training step, forward and backward, of ours against transformers and mambapy: time and peak memory."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from yunmin.cli import parser, print_json, run
from yunmin.errors import RequestError
from yunmin.machine import available_memory_bytes, machine_facts

if TYPE_CHECKING:
    from benchmarks.training_steps import Size, TrainPlan

RESULT_FILE = "train.json"
PLOT_FILE = "train.png"
_NAMES = "ours fp32,ours bf16,transformers,mambapy"


def main(argv: list[str]) -> int:
    """`yunmin bench train [MODEL]`."""
    options = _arguments().parse_args(argv)
    from benchmarks.report import read_result
    from benchmarks.train_report import plot_train, train_tables

    if options.report:
        result = read_result(Path(options.report), "train")
        print("\n\n".join(table.markdown() for table in train_tables(result)))
        return 0
    if bool(options.model) == bool(options.shape):
        raise RequestError("MODEL", "give a folder, or --shape for random weights of a known size; one of the two")
    from benchmarks.training_steps import CONTESTANTS

    plan = _plan(options)
    names = [name.strip() for name in options.contestants.split(",") if name.strip()]
    if not names:
        raise RequestError("--contestants", f"expected some of {_NAMES}, found none")
    unknown = [name for name in names if name not in CONTESTANTS]
    if unknown:
        raise RequestError("--contestants", f"expected some of {_NAMES}, found {unknown[0]!r}")

    from benchmarks.contestants import interpreters
    from benchmarks.training_steps import measure_training
    from yunmin.files import write_json

    out = Path(options.out)
    result = measure_training(
        plan, out, names, model=options.model, shape=options.shape, pythons=interpreters(options.python)
    )
    write_json(out / RESULT_FILE, result)
    plot_train(result, out / PLOT_FILE)
    if options.json:
        print_json(result)
    else:
        print("\n\n".join(table.text() for table in train_tables(result)))
    print(f"\nwritten to {out / RESULT_FILE} and {out / PLOT_FILE}", file=sys.stderr)
    return 0


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "bench train",
        "Measures one training step (forward, cross-entropy at all positions, backward) of ours and of peers.",
        [
            "yunmin bench train --shape 130m",
            "yunmin bench train --shape 130m --sizes 1x256 --contestants 'ours fp32,mambapy' --alone ''",
            "yunmin bench train checkpoint/ --sizes 2x256,1x1024 --threads 2",
            "yunmin bench train --report benchmark_outputs/train.json",
        ],
    )
    arguments.add_argument("model", nargs="?", help="artifact, plain checkpoint folder, or Hub id when online")
    arguments.add_argument("--shape", metavar="NAME", help="instead of MODEL: random weights; tiny, 130m, 370m, ...")
    arguments.add_argument("--contestants", default=_NAMES, metavar="LIST", help="of: %(default)s")
    arguments.add_argument("--sizes", default="2x256,1x1024,1x4096", metavar="LIST", help="BATCHxLENGTH (%(default)s)")
    arguments.add_argument("--alone", default="1x16384", metavar="LIST", help="for ours only (%(default)s)")
    arguments.add_argument(
        "--transformers-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest sequence for transformers, whose backward is quadratic (256)",
    )
    arguments.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter of a peer; repeatable"
    )
    arguments.add_argument("--threads", type=int, metavar="N", help="of every contestant (the usable cores)")
    arguments.add_argument("--repeats", type=int, default=5, metavar="N", help="samples of each size (5)")
    arguments.add_argument("--budget", type=float, default=60.0, metavar="S", help="seconds for one size each (60)")
    arguments.add_argument("--limit", type=float, default=900.0, metavar="S", help="seconds for one step (900)")
    arguments.add_argument("--memory-limit", type=float, metavar="GB", help="of one process (0.8 of what is available)")
    arguments.add_argument("--out", default="benchmark_outputs", metavar="DIR", help="folder for results (%(default)s)")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    arguments.add_argument("--report", metavar="FILE", help="print an earlier result as Markdown; measures nothing")
    return arguments


def _plan(options: argparse.Namespace) -> TrainPlan:
    from benchmarks.training_steps import TrainPlan

    threads = machine_facts()["cores_usable"] if options.threads is None else options.threads
    memory_gb = 0.8 * available_memory_bytes() / 1e9 if options.memory_limit is None else options.memory_limit
    if not memory_gb > 0:
        raise RequestError("--memory-limit", f"must be > 0, got {memory_gb:g}")
    for name, value, low in (
        ("threads", threads, 1),
        ("repeats", options.repeats, 0),
        ("budget", options.budget, 0),
        ("limit", options.limit, 1),
    ):
        if not value >= low:  # NaN neither
            raise RequestError(f"--{name}", f"must be >= {low}, got {value}")
    sizes, alone = _sizes("--sizes", options.sizes), _sizes("--alone", options.alone)
    if not sizes and not alone:
        raise RequestError("--sizes", "expected at least one size here or in --alone, found none")
    return TrainPlan(
        threads=threads,
        sizes=sizes,
        alone=tuple(size for size in alone if size not in sizes),
        transformers_tokens=options.transformers_tokens,
        repeats=options.repeats,
        budget_s=options.budget,
        limit_s=options.limit,
        memory_limit_bytes=int(memory_gb * 1e9),
    )


def _sizes(name: str, text: str) -> tuple[Size, ...]:
    from benchmarks.training_steps import Size

    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if match is None:
            raise RequestError(name, f"expected BATCHxLENGTH, as in 2x256, found {part!r}")
        found.append(Size(int(match[1]), int(match[2])))
    return tuple(found)


if __name__ == "__main__":
    raise SystemExit(run(main))
