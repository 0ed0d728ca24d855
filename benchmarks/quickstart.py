"""The whole path in one go: train, export, serve, stream, measure, compare; by the commands a user would type.

Trains the same model twice for the same number of steps on the same text: once through all phases, once dense
throughout. The table at the end compares the two artifacts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report import comparison_row, text_table
from yunmin.cli import run
from yunmin.errors import YunminError

_READY_LIMIT_S = 120.0
_PROMPT = "def read("
_EVALUATED_TOKENS = 16384


@dataclass(frozen=True)
class Variant:
    """One of the two models.

    Attributes:
        name: of its artifact's folder and of its run.
        overrides: what its training command adds to the common configuration.
    """

    name: str
    overrides: tuple[str, ...] = ()


COMPACT = Variant("compact")
DENSE = Variant("dense", ("enable_masking=false", "enable_peft=false", "scan_mode=none"))


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.quickstart [--out DIR] [--config FILE]`."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("quickstart_outputs"), help="folder (%(default)s)")
    default = Path(__file__).with_suffix(".yaml")
    arguments.add_argument("--config", type=Path, default=default, help="training configuration (%(default)s)")
    options = arguments.parse_args(argv)
    config = _shortest(options.config)
    out: Path = options.out
    begin = time.monotonic()

    _say("Training and exporting a Mamba through all phases: scan order, gates, recovery, adapters")
    _make_artifact(COMPACT, config, out)
    _say("Serving it, and streaming a completion over HTTP")
    _serve_and_stream(out / COMPACT.name)
    _say("Training and exporting its dense twin: the same steps, nothing cut")
    _make_artifact(DENSE, config, out)
    _say("Measuring both side by side")
    compact, dense = str(out / COMPACT.name), str(out / DENSE.name)
    speed = _json(
        "bench", "latency", compact, "--against", dense, "--repeats", "3", "--out", str(out / "latency"), "--json"
    )
    _say("Scoring both on text that training held out")
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    scores = [_evaluate(folder, settings) for folder in (compact, dense)]

    print(f"\n{comparison(speed, scores)}\n")
    print(f"  Done in {(time.monotonic() - begin) / 60:.1f} minutes. Both models read the same number of batches.")
    print(f"  Plot: {out / 'latency' / 'latency.png'}\n\nGo on with:")
    for command in next_commands(out, config):
        print(f"  {command}")
    return 0


def comparison(speed: dict[str, Any], scores: list[dict[str, Any]]) -> str:
    """The table of the dense model against the compact one.

    Args:
        speed: result of the latency benchmark, the compact model first.
        scores: results of `yunmin eval --json`, in the same order.
    """
    models = speed["models"]
    length = str(max(speed["settings"]["prompt_tokens"]))
    rows = [
        comparison_row(label, [model[key] for model in models], lambda v: f"{v:,}")
        for label, key in (
            ("parameters", "parameters"),
            ("artifact bytes", "artifact_bytes"),
            ("FLOPs per token", "flops_per_token"),
            ("state bytes per sequence", "state_bytes"),
        )
    ]
    perplexities = [score["token_perplexity"] for score in scores]
    rows.append(comparison_row("validation perplexity", perplexities, lambda v: f"{v:.2f}"))
    for label, key in (
        (f"prefill tokens/s ({length} tokens)", "prefill_tokens_per_s"),
        ("decode tokens/s", "decode_tokens_per_s"),
    ):
        rows.append(comparison_row(label, [model["summary"][length][key] for model in models], lambda v: f"{v:,.0f}"))
    # dense first, as one reads it; the ratio stays compact / dense
    ordered = [[row[0], row[2], row[1], row[3]] for row in rows]
    return text_table("Dense against compact", ["", "dense", "compact", "compact / dense"], ordered)


def next_commands(out: Path, config: Path) -> list[str]:
    """What a user may type next."""
    compact = shlex.quote(str(out / COMPACT.name))
    return [
        f"yunmin inspect {compact}",
        f"yunmin generate {compact} --prompt {shlex.quote(_PROMPT)} --max-tokens 100 --temperature 0.7",
        f"yunmin serve {compact} --port 3000",
        f"yunmin bench latency {compact} --against {shlex.quote(str(out / DENSE.name))}",
        f"yunmin train --config {shlex.quote(str(config))} data=your_text.txt max_steps=2000 run_name=mine",
    ]


def _make_artifact(variant: Variant, config: Path, out: Path) -> None:
    """Trains and exports, unless the artifact is there already; takes up a training that was interrupted."""
    artifact, folder = out / variant.name, out / "runs" / variant.name
    if artifact.is_dir():
        print(f"{artifact} is there from an earlier time and is used again; to start over: rm -r {out}")
        return
    if any(folder.glob("checkpoint-*")):
        _run("train", "--resume", str(folder))
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped before its first checkpoint
        common = ["--config", str(config), f"output_dir={out / 'runs'}", f"run_name={variant.name}"]
        _run("train", *common, *variant.overrides)
    _run("export", str(folder), str(artifact))


def _evaluate(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    held_out, window = str(settings["validation_share"]), str(settings["sequence_length"])
    source = ["--data", settings["data"], "--held-out", held_out]
    limits = ["--window", window, "--max-tokens", str(_EVALUATED_TOKENS)]
    return _json("eval", folder, "--task", "perplexity", *source, *limits, "--json")


def _serve_and_stream(artifact: Path) -> None:
    port = _free_port()
    with _server(artifact, port) as address:
        body = {"prompt": _PROMPT, "max_tokens": 96, "temperature": 0.7, "seed": 1}
        url = f"{address}/generate_stream"
        print(f"(as does: curl -N {url} -H 'content-type: application/json' -d '{json.dumps(body)}')\n")
        print(_PROMPT, end="", flush=True)
        begin, tokens = time.monotonic(), 0
        for event in _events(url, body):
            if "error" in event:
                raise YunminError(f"{url}: {event['error']}")
            print(event["text"], end="", flush=True)
            tokens += event["token_id"] is not None
        print(f"\n\n({tokens} tokens in {time.monotonic() - begin:.1f} s)")


@contextlib.contextmanager
def _server(artifact: Path, port: int) -> Iterator[str]:
    command = _command("serve", str(artifact), "--port", str(port))
    process = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + _READY_LIMIT_S
        while not _is_ready(address):
            if process.poll() is not None:
                raise YunminError(f"yunmin serve {artifact} ended with status {process.returncode}")
            if time.monotonic() > deadline:
                raise YunminError(f"yunmin serve {artifact} was not ready within {_READY_LIMIT_S:.0f} s")
            time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/readyz", timeout=5):  # noqa: S310 (always http)
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _events(url: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The JSON events of a stream, as they come."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})  # noqa: S310 (always http)
    with urllib.request.urlopen(request, timeout=_READY_LIMIT_S) as response:  # noqa: S310
        for raw in response:
            line = raw.decode("utf-8").strip()
            if line.startswith("data:") and line != "data: [DONE]":
                yield json.loads(line.removeprefix("data:"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _command(*arguments: str) -> list[str]:
    print(f"\n$ {shlex.join(['yunmin', *arguments])}", flush=True)
    return [str(Path(sysconfig.get_path("scripts")) / "yunmin"), *arguments]


def _run(*arguments: str) -> None:
    _finish(subprocess.Popen(_command(*arguments)), arguments[0])


def _json(*arguments: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(
        _finish(subprocess.Popen(_command(*arguments), stdout=subprocess.PIPE, text=True), arguments[0])
    )
    return result


def _finish(process: subprocess.Popen[Any], name: str) -> str:
    """Waits for a command and returns what it wrote to a pipe, if anything.

    Ctrl-C reaches the command, too; it gets the time to write its checkpoint, which `subprocess.run` would not give.
    """
    try:
        output, _ = process.communicate()
    except KeyboardInterrupt:
        process.wait()
        raise
    if process.returncode != 0:
        raise YunminError(f"yunmin {name} ended with status {process.returncode}")
    return output or ""


def _say(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _shortest(path: Path) -> Path:
    """A path as one would type it: relative where it lies below the working folder."""
    absolute = path.resolve()
    return absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else absolute


if __name__ == "__main__":
    raise SystemExit(run(main))
