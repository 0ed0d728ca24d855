"""Answer a file of requests offline, and go on where a killed run stopped."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yunmin.cli import parser, print_json
from yunmin.errors import MissingExtraError, RequestError

if TYPE_CHECKING:
    from serving.batch_files import Answers, Requests
    from serving.settings import Settings
    from yunmin.language_model import LanguageModel

_PASSED_ON = {
    "device": "torch device",
    "runtime": "auto, native, torch or onnx",
    "threads": "of the CPU",
    "slots": "of states",
}
_LONGEST_S = "86400"
_KEYS = frozenset({"API_KEYS", "API_KEY_FILE", "ADMIN_KEY"})  # nobody calls from outside

JSON = dict[str, Any]


def main(argv: list[str]) -> int:
    """`yunmin batch ARTIFACT IN.jsonl OUT.jsonl`."""
    arguments = parser(
        "batch",
        "Answers a file of requests, many at once, as the server would: OpenAI's batch lines in (custom_id, method, "
        "url, body), its answer lines out, in the same order. The same command goes on with a run that was killed. "
        "Every variable of yunmin serve counts here, too.",
        [
            "yunmin batch artifact/ requests.jsonl answers.jsonl",
            "yunmin batch artifact/ requests.jsonl answers.jsonl --slots 32 --json",
            "yunmin batch artifact/ requests.jsonl answers.jsonl --force    # begin anew",
        ],
    )
    arguments.add_argument("artifact", help="artifact, run folder or checkpoint folder")
    arguments.add_argument("requests", type=Path, metavar="IN.jsonl", help="requests, one JSON object a line")
    arguments.add_argument("answers", type=Path, metavar="OUT.jsonl", help="answers; gone on with where it is there")
    arguments.add_argument("--limit", type=int, metavar="N", help="requests under way at once (twice the slots)")
    for name, text in _PASSED_ON.items():
        arguments.add_argument(f"--{name}", metavar="X", help=f"{text}; as of yunmin serve")
    arguments.add_argument("--force", action="store_true", help="throw away what OUT.jsonl holds")
    arguments.add_argument("--json", action="store_true", help="print the summary as one JSON object on stdout")
    options = arguments.parse_args(argv)

    try:
        import prometheus_client  # noqa: F401 (the engine counts with it)
        import starlette  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "yunmin batch") from None
    from serving.batch_files import Answers, Requests
    from serving.launch import load_served

    settings = _settings(options)
    most = settings.slots + settings.queue
    limit = min(2 * settings.slots, most) if options.limit is None else options.limit
    if not 1 <= limit <= most:
        raise RequestError("--limit", f"must be in 1..{most}, which slots and queue have room for, got {limit}")
    requests = Requests(options.requests)
    model = load_served(settings)
    begin = time.monotonic()
    with Answers(options.answers, requests, model.fingerprint, force=options.force) as answers:
        resumed = answers.tally.total
        if resumed:
            print(f"yunmin: {resumed:,} of {len(requests):,} answers were there", file=sys.stderr)
        generated = answers.tally.generated_tokens
        if resumed < len(requests):
            asyncio.run(_answer_all(model, settings, requests, answers, limit))
    seconds = time.monotonic() - begin
    summary = {
        "requests": str(options.requests),
        "answers": str(options.answers),
        **answers.tally.to_dict(),
        "resumed": resumed,
        "seconds": round(seconds, 3),
        "generated_tokens_per_s": round((answers.tally.generated_tokens - generated) / seconds, 1),
    }
    if options.json:
        print_json(summary)
    else:
        print(_summary(summary))
    return 1 if answers.tally.failed else 0


def _settings(options: argparse.Namespace) -> Settings:
    """A server's settings, with what the command line says, and time enough for who waits in a long queue."""
    from serving.settings import PREFIX, read_settings

    environ = {name: value for name, value in os.environ.items() if name.removeprefix(PREFIX) not in _KEYS}
    environ = {f"{PREFIX}DEADLINE_S": _LONGEST_S, **environ, f"{PREFIX}ARTIFACT": options.artifact}
    given = {f"{PREFIX}{name.upper()}": getattr(options, name) for name in _PASSED_ON}
    return read_settings(environ | {name: value for name, value in given.items() if value is not None})


async def _answer_all(
    model: LanguageModel, settings: Settings, requests: Requests, answers: Answers, limit: int
) -> None:
    """Answers every request that has no answer yet, through the server's own application."""
    from prometheus_client import CollectorRegistry

    from serving.api.app import create_app
    from serving.batch_caller import Caller, Progress
    from serving.launch import make_backend
    from serving.start import start_engine

    engine = start_engine(model, settings, CollectorRegistry())
    try:
        app = create_app()
        app.state.backend = make_backend(model, engine, settings)
        caller = Caller(app, requests.sha256, limit)
        with Progress(len(requests), answers.tally) as progress:
            async for answer in caller.answer_in_order(requests.read(answers.tally.total)):
                answers.append(answer)
                progress.show()
    finally:
        await asyncio.to_thread(engine.stop)


def _summary(found: JSON) -> str:
    counts = [f"{found['answered']:,} answered"]
    counts += [f"{found[kind]:,} {kind}" for kind in ("refused", "failed") if found[kind]]
    pace = f"{found['generated_tokens']:,} tokens in {found['seconds']:.1f} s"
    return f"{found['answers']}: {', '.join(counts)}; {pace}"
