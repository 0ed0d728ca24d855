"""Latency of one request at a time: prefill, decode, time to first token, memory and size.

Each model lives in a process of its own; the repeats of two models alternate, so that a change of the machine's mood
meets both. The prompts are random ids, which cost what any others cost. Medians are over repeats.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yunmin.cli import parser, print_json, run
from yunmin.errors import RequestError, YunminError
from yunmin.machine import machine_facts

RESULT_FILE = "latency.json"
PLOT_FILE = "latency.png"
_WARM_UP_TOKENS = 8


class Worker:
    """The process that measures one model; see `benchmarks.worker` for the protocol.

    Attributes:
        model: its description: sizes and settings.
    """

    def __init__(self, source: str, *, threads: int | None, device: str) -> None:
        self.source = source
        command = [sys.executable, "-m", "benchmarks.worker", source, "--device", device]
        command += [] if threads is None else ["--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.model = self._read()
        except BaseException:
            self.kill()
            raise

    def measure(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """One request, as `benchmarks.worker.Measurement`."""
        assert self._process.stdin is not None
        request = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        with contextlib.suppress(BrokenPipeError):  # `_read` finds the process dead and says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._read()

    def finish(self) -> dict[str, int]:
        """Ends the process; returns the memory it used, in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        memory = self._read()
        self._process.wait()
        return memory

    def kill(self) -> None:
        """Ends the process whatever it does; harmless once it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # what was still to be written to a dead process
                pipe.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise YunminError(f"{self.source}: the measuring process ended with status {status}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise YunminError(message["error"])
        return message


def measure_models(
    sources: Sequence[str],
    *,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    repeats: int,
    threads: int | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Measures models side by side.

    Args:
        sources: anything `yunmin.load` reads.
        prompt_tokens: prompt lengths.
        new_tokens: tokens to generate after each prompt, >= 2.
        repeats: measurements of each model and length; one more before them is thrown away.
        threads: of torch; None leaves its default.
        device: as in `yunmin.load`.

    Returns:
        `machine`, `settings`, and one entry in `models` for each source, with `samples` and `summary` by prompt length.

    Raises:
        YunminError: a model does not load, or its process dies.
    """
    facts = machine_facts()  # before the workers load it
    workers: list[Worker] = []
    try:
        workers.extend(Worker(source, threads=threads, device=device) for source in sources)
        samples: list[dict[str, list[dict[str, Any]]]] = [{str(n): [] for n in prompt_tokens} for _ in workers]
        for length in prompt_tokens:
            for worker in workers:
                worker.measure(length, _WARM_UP_TOKENS)
        for repeat in range(repeats):
            print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
            for length in prompt_tokens:
                for index, worker in enumerate(workers):
                    samples[index][str(length)].append(worker.measure(length, new_tokens))
        models = [
            worker.model
            | worker.finish()
            | {"summary": {n: summarize(int(n), runs) for n, runs in taken.items()}, "samples": taken}
            for worker, taken in zip(workers, samples, strict=True)
        ]
    finally:
        for worker in workers:
            worker.kill()
    return {
        "benchmark": "latency",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "settings": {
            "prompt_tokens": list(prompt_tokens),
            "new_tokens": new_tokens,
            "repeats": repeats,
            "batch_size": 1,
        },
        "models": models,
    }


def summarize(prompt_tokens: int, runs: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Medians over repeats; percentiles of the single decode steps of all repeats.

    Args:
        prompt_tokens: length of the prompt.
        runs: measurements as dictionaries, times in seconds.
    """
    steps = sorted(step for run in runs for step in run["step_s"])
    return {
        "prefill_tokens_per_s": prompt_tokens / statistics.median(run["prefill_s"] for run in runs),
        "time_to_first_token_ms": 1e3 * statistics.median(run["first_token_s"] for run in runs),
        "decode_tokens_per_s": statistics.median(len(run["step_s"]) / sum(run["step_s"]) for run in runs),
        "per_token_p50_ms": 1e3 * percentile(steps, 0.50),
        "per_token_p95_ms": 1e3 * percentile(steps, 0.95),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of an ordered sequence lies, interpolated between neighbours."""
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def main(argv: list[str]) -> int:
    """`yunmin bench latency MODEL [--against OTHER]`."""
    arguments = parser(
        "bench latency",
        "Measures a model, or two side by side with their ratios, one request at a time.",
        [
            "yunmin bench latency artifact/",
            "yunmin bench latency artifact/ --against dense/ --threads 2 --out results/",
            "yunmin bench latency artifact/ --prompt-tokens 128,512,2048 --json",
        ],
    )
    arguments.add_argument("model", help="artifact, run folder, checkpoint folder, or Hub id when online")
    arguments.add_argument("--against", metavar="OTHER", help="another one to compare with: ratios are MODEL / OTHER")
    arguments.add_argument("--threads", type=int, metavar="N", help="threads of torch (its default)")
    arguments.add_argument("--device", default="auto", help="torch device (auto)")
    arguments.add_argument("--prompt-tokens", default="128,512", metavar="LIST", help="prompt lengths (128,512)")
    arguments.add_argument("--new-tokens", type=int, default=64, metavar="N", help="tokens to generate (64)")
    arguments.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements, of which medians (5)")
    arguments.add_argument(
        "--out",
        default="benchmark_outputs",
        metavar="DIR",
        help=f"folder for {RESULT_FILE} and {PLOT_FILE} (%(default)s)",
    )
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    options = arguments.parse_args(argv)
    lengths = _lengths(options.prompt_tokens)
    _check(options)

    from benchmarks.report import latency_table, plot_latency
    from yunmin.files import write_json

    sources = [options.model] + ([options.against] if options.against else [])
    result = measure_models(
        sources,
        prompt_tokens=lengths,
        new_tokens=options.new_tokens,
        repeats=options.repeats,
        threads=options.threads,
        device=options.device,
    )
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RESULT_FILE, result)
    plot_latency(result, out / PLOT_FILE)
    if options.json:
        print_json(result)
    else:
        print(latency_table(result))
    print(f"\nwritten to {out / RESULT_FILE} and {out / PLOT_FILE}", file=sys.stderr)
    return 0


def _lengths(text: str) -> list[int]:
    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError("--prompt-tokens", f"must be integers separated by commas, got {text!r}") from None
    if min(lengths) < 1 or len(set(lengths)) != len(lengths):
        raise RequestError("--prompt-tokens", f"must be positive and distinct, got {text!r}")
    return lengths


def _check(options: argparse.Namespace) -> None:
    for name, low in (("new_tokens", 2), ("repeats", 1), ("threads", 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise RequestError(f"--{name.replace('_', '-')}", f"must be >= {low}, got {value}")


if __name__ == "__main__":
    raise SystemExit(run(main))
