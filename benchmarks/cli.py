"""Measure latency, memory and size of models."""

from __future__ import annotations

import importlib
import sys

from yunmin.cli import parser

# subcommand -> (module with `main(argv) -> int`, summary)
_BENCHMARKS = {
    "latency": ("benchmarks.latency", "one request at a time: prefill, decode, time to first token, memory, size"),
    "compare": ("benchmarks.compare", "ours against transformers, mambapy, llama.cpp, OpenVINO, ..., in one run"),
    "serve": (
        "benchmarks.serve",
        "serving over HTTP: against the engine alone, llama.cpp's servers, restarts, long prompts",
    ),
    "train": ("benchmarks.train", "one training step, forward and backward, against transformers and mambapy"),
}


def main(argv: list[str]) -> int:
    """`yunmin bench NAME ...`."""
    width = max(map(len, _BENCHMARKS))
    listed = "\n".join(f"  {name:<{width}}  {summary}" for name, (_, summary) in _BENCHMARKS.items())
    arguments = parser(
        "bench",
        f"Measures models on this machine.\n\nbenchmarks:\n{listed}",
        ["yunmin bench latency artifact/ --against dense/", "yunmin bench latency --help"],
    )
    arguments.add_argument("benchmark", choices=sorted(_BENCHMARKS), help="what to measure")
    if not argv:
        arguments.print_usage(sys.stderr)
        return 2
    name = arguments.parse_args(argv[:1]).benchmark
    module = importlib.import_module(_BENCHMARKS[name][0])
    status: int = module.main(argv[1:])
    return status
