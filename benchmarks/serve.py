"""Serving over HTTP: against the engine itself and against llama.cpp's servers, with stalls, sessions and prefixes."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.progress import say
from yunmin.cli import parser, print_json, run
from yunmin.errors import RequestError, YunminError
from yunmin.machine import machine_facts

if TYPE_CHECKING:
    from benchmarks.serve_models import Served
    from benchmarks.serve_parts import Part, Plan

RESULT_FILE = "serve.json"
PLOT_FILE = "serve.png"
PARTS = ("throughput", "stall", "prefix", "sessions", "peers")


def main(argv: list[str]) -> int:
    """`yunmin bench serve [ARTIFACT] [--shape 130m]`."""
    options = _arguments().parse_args(argv)
    if options.report:
        return _print_report(Path(options.report))
    if bool(options.artifact) == bool(options.shape):
        raise RequestError("ARTIFACT", "give a folder, or --shape for random weights of a known size; one of the two")
    if options.artifact and options.format:
        raise RequestError("--format", "an artifact is served as it is; only --shape comes in several formats")
    if not options.soak >= 0:  # NaN neither
        raise RequestError("--soak", f"must be >= 0 minutes, got {options.soak}")
    parts = _parts(options.only)

    from benchmarks.serve_models import served_artifact, served_shape
    from benchmarks.serve_parts import Plan
    from benchmarks.serve_tables import plot_serve, serve_tables
    from yunmin.files import write_json

    threads = machine_facts()["cores_usable"] if options.threads is None else options.threads
    if threads < 1:
        raise RequestError("--threads", f"must be >= 1, got {threads}")
    plan = Plan.quick(threads) if options.quick else Plan(threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    served = (
        served_artifact(options.artifact, out)
        if options.artifact
        else served_shape(options.shape, options.format or "int8", out)
    )
    result = measure(served, plan, parts, out, soak_minutes=options.soak)
    write_json(out / RESULT_FILE, result)
    plot_serve(result, out / PLOT_FILE)
    if options.json:
        print_json(result)
    else:
        print("\n\n".join(table.text() for table in serve_tables(result)))
    print(f"\nwritten to {out / RESULT_FILE} and {out / PLOT_FILE}", file=sys.stderr)
    return 1 if result["failed"] else 0


def measure(
    served: Served, plan: Plan, parts: Sequence[str], out: Path, *, soak_minutes: float = 0.0
) -> dict[str, Any]:
    """Measures parts one after the other, each on a server of its own.

    Args:
        served: the model.
        plan: how much.
        parts: of `PARTS`.
        out: logs and session stores go below it.
        soak_minutes: of mixed load at the end; 0 for none.

    Returns:
        What the tables show, and every sample; a part that failed is in `failed` with the reason.
    """
    from benchmarks.serve_bench import Bench

    facts = machine_facts()
    bench = Bench(served, plan, out / "serve")
    wanted: dict[str, Callable[[], Part]] = {name: getattr(bench, name) for name in parts}
    if soak_minutes:
        wanted["soak"] = lambda: bench.soak(soak_minutes)
    found: dict[str, Part] = {}
    failed: dict[str, str] = {}
    for name, take in wanted.items():
        say(name)
        try:
            found[name] = take()
        except YunminError as error:
            failed[name] = str(error)
            say(f"{name} failed: {error}")
    return {
        "benchmark": "serve",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "load_average_after": round(os.getloadavg()[0], 2),
        "settings": asdict(plan),
        "model": served.describe(),
        "parts": found,
        "failed": failed,
    }


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "bench serve",
        "Measures serving over HTTP, by a client on the same machine: throughput against the engine alone, the gaps "
        "of running streams while a long prompt is read, sessions on disk, the prefix cache, and llama.cpp's servers "
        "with the same weights.",
        [
            "yunmin bench serve --shape 130m",
            "yunmin bench serve --shape tiny --format fp32 --quick",
            "yunmin bench serve artifact/ --only throughput,stall",
            "yunmin bench serve --shape 130m --only none --soak 30",
            "yunmin bench serve --report benchmark_outputs/serve.json",
        ],
    )
    arguments.add_argument("artifact", nargs="?", help="artifact or plain checkpoint folder, or Hub id when online")
    arguments.add_argument("--shape", metavar="NAME", help="instead: random weights and a tokenizer; tiny, 130m, ...")
    arguments.add_argument("--format", metavar="NAME", help="of --shape: fp32, int8 or int4 (int8)")
    arguments.add_argument("--only", default="", metavar="LIST", help=f"of {', '.join(PARTS)}, or none (all)")
    arguments.add_argument("--soak", type=float, default=0.0, metavar="MINUTES", help="mixed load at the end (none)")
    arguments.add_argument("--threads", type=int, metavar="N", help="of every engine (the usable cores)")
    arguments.add_argument("--quick", action="store_true", help="a fraction of everything, to try the command out")
    arguments.add_argument("--out", default="benchmark_outputs", metavar="DIR", help="folder for results (%(default)s)")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    arguments.add_argument("--report", metavar="FILE", help="print an earlier result as Markdown; measures nothing")
    return arguments


def _parts(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return []
    for word in words:
        if word not in PARTS:
            raise RequestError("--only", f"expected some of {', '.join(PARTS)}, or none, found {word!r}")
    return [part for part in PARTS if part in words or not words]


def _print_report(path: Path) -> int:
    from benchmarks.report import read_result
    from benchmarks.serve_tables import serve_tables

    result = read_result(path, "serve")
    print("\n\n".join(table.markdown() for table in serve_tables(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
