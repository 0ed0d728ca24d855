"""Ours against every peer: the same weights, threads and token counts, one process each, repeats in turns."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.progress import say
from yunmin.cli import parser, print_json, run
from yunmin.errors import RequestError
from yunmin.machine import machine_facts

if TYPE_CHECKING:
    from benchmarks.contest import Contest, Plan
    from benchmarks.contestants import Contestant, Field
    from benchmarks.limits import Limits
    from yunmin.checkpoint import Checkpoint

RESULT_FILE = "compare.json"
PLOT_FILE = "compare.png"
_ALL_PEERS = "transformers,mambapy,llama.cpp,openvino,onnxruntime"
_PRODUCTS = {"fp32": "fp32", "int8": "int8", "int4": "int8"}  # int4 weights are multiplied as int8
_QUICK = {"prefill": "512", "decode": "1,16", "depths": "", "repeats": 2, "budget": 6.0}  # defaults with --quick


def main(argv: list[str]) -> int:
    """`yunmin bench compare MODEL [--peers LIST]`."""
    arguments = _arguments()
    options = arguments.parse_args(argv)
    if options.quick:
        arguments.set_defaults(**_QUICK)
        options = arguments.parse_args(argv)  # what was named stays
    if options.report:
        return _print_report(Path(options.report))
    if bool(options.model) == bool(options.shape):
        raise RequestError("MODEL", "give a folder, or --shape for random weights of a known size; one of the two")
    plan = _plan(options)

    from benchmarks.compare_plots import plot_compare
    from benchmarks.compare_tables import compare_tables
    from benchmarks.contestants import expand, interpreters
    from yunmin.files import write_json

    wanted = expand(_words(options.contestants) or ["ours", *_words(options.peers)])
    pythons = interpreters(options.python)
    out = Path(options.out)
    result = compare(
        plan, out, model=options.model, shape=options.shape, wanted=wanted, pythons=pythons, limits=options.limits
    )
    write_json(out / RESULT_FILE, result)
    plot_compare(result, out / PLOT_FILE)
    if options.json:
        print_json(result)
    else:
        print("\n\n".join(table.text() for table in compare_tables(result)))
    print(f"\nwritten to {out / RESULT_FILE} and {out / PLOT_FILE}", file=sys.stderr)
    return 0


def compare(
    plan: Plan,
    out: Path,
    *,
    model: str | None,
    shape: str | None,
    wanted: Sequence[tuple[str, str]],
    pythons: Mapping[str, str],
    limits: bool = True,
) -> dict[str, Any]:
    """Prepares, measures and sums up.

    Args:
        plan: what to measure.
        out: the files that contestants read go below it, and are found again.
        model: folder or Hub id; None for random weights of `shape`.
        shape: name of a known size; None for `model`.
        wanted: engines and formats, as `benchmarks.contestants.expand` gives them.
        pythons: interpreters by engine.
        limits: whether to measure the machine, too.

    Returns:
        Everything that the tables and plots show, and every sample.
    """
    from benchmarks.contest import Contest
    from benchmarks.contestants import gather
    from benchmarks.limits import measure_limits
    from benchmarks.models import describe, plain_checkpoint

    facts = machine_facts()
    out.mkdir(parents=True, exist_ok=True)
    plain = plain_checkpoint(model, shape, out)
    field = gather(wanted, plain, plain.folder.parent, pythons=pythons, say=say)
    if not field.contestants:
        missing = "; ".join(f"{name}: {why}" for name, why in field.absent.items())
        raise RequestError("contestants", f"none can take part: {missing}")
    found_limits: Limits | None = None
    if limits:
        say("limits of this machine")
        found_limits = measure_limits(plan.threads)
    contest = Contest(field.contestants, plan, plain.config.n_tokens, say)
    contest.run()
    if not any(record.samples for record in contest.records.values()):
        reasons = {name: next(iter(record.notes.values()), "no figure") for name, record in contest.records.items()}
        missing = "; ".join(f"{name}: {why}" for name, why in (field.absent | reasons).items())
        raise RequestError("contestants", f"none gave a figure: {missing}")
    if found_limits is not None:
        found_limits = found_limits.best_of(measure_limits(plan.threads))
    return {
        "benchmark": "compare",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "load_average_after": round(os.getloadavg()[0], 2),
        "settings": asdict(plan),
        "model": describe(plain, model, shape),
        "limits": None if found_limits is None else asdict(found_limits),
        **_summed_up(contest, field, plain, found_limits),
    }


def _summed_up(contest: Contest, field: Field, plain: Checkpoint, limits: Limits | None) -> dict[str, Any]:
    reference = next((name for name in contest.logits if name == "ours fp32"), next(iter(contest.logits), None))
    contestants = []
    absent = dict(field.absent)
    for contestant in field.contestants:
        record = contest.records[contestant.name]
        if not record.samples:
            absent[contestant.name] = next(iter(record.notes.values()), "no figure")
            continue
        summary = {quantity: record.median(quantity) for quantity in record.samples}
        contestants.append(
            {
                "name": contestant.name,
                "engine": contestant.engine,
                "precision": contestant.precision,
                "is_ours": contestant.is_ours,
                "model": str(contestant.model),
                "versions": record.facts.get("versions", {}),
                "summary": summary,
                "limits": {} if limits is None else _limits_of(contestant, contest.plan, plain, limits),
                "samples": record.samples,
                "notes": record.notes,
                "warm_up_only": [quantity for quantity in summary if quantity in record.warmed],
            }
        )
    differences = {}
    if reference is not None:
        expected = contest.logits[reference]
        largest = max(map(abs, expected)) or 1.0
        for name, logits in contest.logits.items():
            differences[name] = max(abs(a - b) for a, b in zip(expected, logits, strict=True)) / largest
    return {"reference": reference, "disagreement": differences, "contestants": contestants, "absent": absent}


def _limits_of(contestant: Contestant, plan: Plan, plain: Checkpoint, limits: Limits) -> dict[str, float]:
    """Quantity -> what the machine allows; only for ours, whose weights are known by the byte."""
    from benchmarks.limits import Traffic, decode_limit, prefill_limit

    if not contestant.is_ours:
        return {}
    traffic, product = Traffic.of(contestant.config or plain.config), _PRODUCTS[contestant.precision]
    size = contestant.weight_bytes
    found = {f"prefill {n}": prefill_limit(limits, traffic, n, product=product) for n in plan.prefill}
    for batch_size in plan.decode:
        limit = decode_limit(limits, traffic, batch_size, weight_bytes=size, product=product)
        found[f"decode {batch_size}"] = limit
    single = decode_limit(limits, traffic, 1, weight_bytes=size, product=product)
    return found | {f"depth {depth}": single for depth in plan.depths}


def _arguments() -> argparse.ArgumentParser:
    arguments = parser(
        "bench compare",
        "Measures ours and every peer on the same weights, threads and token counts; names who is missing and why.",
        [
            "yunmin bench compare --shape 130m",
            "yunmin bench compare artifact/ --peers llama.cpp,transformers --threads 2",
            "yunmin bench compare --shape 130m --contestants ours:int8,llama.cpp:Q8_0 --quick",
            "yunmin bench compare --shape 130m --contestants ours,ours:mine=my-artifact/,llama.cpp",
            "yunmin bench compare --shape 130m --python openvino=.venv-peers/openvino/bin/python",
            "yunmin bench compare --report benchmark_outputs/compare.json",
        ],
    )
    arguments.add_argument("model", nargs="?", help="artifact, plain checkpoint folder, or Hub id when online")
    arguments.add_argument("--shape", metavar="NAME", help="instead of MODEL: random weights; tiny, 130m, 370m, ...")
    arguments.add_argument("--peers", default=_ALL_PEERS, metavar="LIST", help=f"whom to compare with ({_ALL_PEERS})")
    arguments.add_argument("--contestants", default="", metavar="LIST", help="exactly these, as ENGINE[:FORMAT]")
    arguments.add_argument(
        "--python", action="append", default=[], metavar="ENGINE=PATH", help="interpreter of a peer; repeatable"
    )
    arguments.add_argument("--threads", type=int, metavar="N", help="of every contestant (the usable cores)")
    arguments.add_argument("--prefill", default="128,512,2048", metavar="LIST", help="lengths of texts (%(default)s)")
    arguments.add_argument("--decode", default="1,4,16,64", metavar="LIST", help="batch sizes (%(default)s)")
    arguments.add_argument(
        "--depths", default="0,4096,16384,32768", metavar="LIST", help="tokens read before (%(default)s)"
    )
    arguments.add_argument("--repeats", type=int, default=5, metavar="N", help="samples of each quantity (5)")
    arguments.add_argument("--budget", type=float, default=20.0, metavar="S", help="seconds for one quantity each (20)")
    arguments.add_argument("--quick", action="store_true", help="unless named: 512; 1,16; no depths; 2 repeats; 6 s")
    arguments.add_argument("--no-limits", dest="limits", action="store_false", help="do not measure the machine")
    arguments.add_argument("--out", default="benchmark_outputs", metavar="DIR", help="folder for results (%(default)s)")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    arguments.add_argument("--report", metavar="FILE", help="print an earlier result as Markdown; measures nothing")
    return arguments


def _plan(options: argparse.Namespace) -> Plan:
    from benchmarks.contest import Plan

    threads = machine_facts()["cores_usable"] if options.threads is None else options.threads
    for name, low in (("threads", 1), ("repeats", 1), ("budget", 0)):
        value = threads if name == "threads" else getattr(options, name)
        if not value >= low:  # NaN neither
            raise RequestError(f"--{name}", f"must be >= {low}, got {value}")
    return Plan(
        threads,
        prefill=_sizes("--prefill", options.prefill, 1),
        decode=_sizes("--decode", options.decode, 1),
        depths=_sizes("--depths", options.depths, 0),
        repeats=options.repeats,
        budget_s=options.budget,
    )


def _sizes(name: str, text: str, low: int) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in _words(text))
    except ValueError:
        raise RequestError(name, f"must be integers separated by commas, got {text!r}") from None
    if any(size < low for size in sizes) or list(sizes) != sorted(set(sizes)):
        raise RequestError(name, f"must rise and be >= {low}, got {text!r}")
    return sizes


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _print_report(path: Path) -> int:
    from benchmarks.compare_tables import compare_tables
    from benchmarks.report import read_result

    result = read_result(path, "compare")
    print("\n\n".join(table.markdown() for table in compare_tables(result)))
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
