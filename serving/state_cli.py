"""Build states that a server starts with: long prompts, read once."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from yunmin.cli import parser, print_json

_CHUNK = 512  # tokens between two looks at the progress


def main(argv: list[str]) -> int:
    """`yunmin state build ARTIFACT --prompt-file F OUT`."""
    build = parser(
        "state build",
        "Reads a prompt (a system prompt, examples, a document) as it stands in a file, its last newline included, and "
        "keeps the state after it as a file of constant size. A server that is started with --states FOLDER loads the "
        "files in it, and requests go on from one by its name, as if their prompt began with that text.",
        [
            "yunmin state build artifact/ --prompt-file system.txt states/support.safetensors",
            "yunmin state build artifact/ --prompt-file examples.txt states/v2.safetensors --name few-shot --json",
            "yunmin serve artifact/ --states states/    # then: {'state': 'support', 'prompt': ...}",
        ],
    )
    build.add_argument("artifact", help="artifact, run folder or checkpoint folder")
    build.add_argument("out", metavar="OUT", help="file to write; it must not exist")
    prompt = build.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to read (- for stdin)")
    prompt.add_argument("--token-ids", metavar="IDS", help="comma-separated token ids to read")
    build.add_argument("--name", help="by which requests refer to it (OUT's name without its ending)")
    build.add_argument("--force", action="store_true", help="write over OUT")
    build.add_argument("--device", default="auto", help="torch device (auto)")
    build.add_argument("--runtime", choices=("auto", "native", "torch", "onnx"), default="auto", help="(auto)")
    build.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    build.add_argument("--json", action="store_true", help="print the result as one JSON object")
    if not argv:
        build.print_help()
        return 2
    if argv[0] != "build" and argv[0] not in ("-h", "--help"):
        build.error(f"unknown command 'state {argv[0]}', expected 'state build'")
    return _build(build.parse_args(argv[1:] if argv[0] == "build" else argv))


def _build(options: argparse.Namespace) -> int:
    from serving.sessions.named import SUFFIX, require_state_name
    from yunmin.errors import ConfigError
    from yunmin.language_model import load
    from yunmin.snapshots import save_snapshot
    from yunmin.threads import set_threads

    out = Path(options.out)
    name = require_state_name(out.name.removesuffix(SUFFIX) if options.name is None else options.name)
    if out.suffix != SUFFIX:
        raise ConfigError(f"{out}: expected a name that ends in {SUFFIX}, as a server looks for")
    if out.exists() and not (options.force and out.is_file()):
        raise ConfigError(f"{out}: expected no such file (--force writes over one)")
    prompt = _read_prompt(options.prompt_file, options.token_ids)
    if options.threads is not None:
        set_threads(options.threads)
    model = load(options.artifact, device=options.device, runtime=options.runtime)
    token_ids = model.encode(prompt)
    begin = time.perf_counter()
    snapshot = None
    for first in range(0, len(token_ids), _CHUNK):
        snapshot = model.snapshot(token_ids[first : first + _CHUNK], snapshot)
        if len(token_ids) > _CHUNK:
            _show_progress(min(first + _CHUNK, len(token_ids)), len(token_ids), time.perf_counter() - begin)
    assert snapshot is not None
    save_snapshot(out, snapshot, model.fingerprint, name=name)
    seconds, size = time.perf_counter() - begin, out.stat().st_size
    if options.json:
        print_json(
            {
                "name": name,
                "path": str(out),
                "tokens": len(token_ids),
                "bytes": size,
                "seconds": round(seconds, 3),
                "fingerprint": model.fingerprint,
            }
        )
    else:
        print(f"{out}: state {name!r} after {len(token_ids)} tokens, {size} bytes, in {seconds:.1f} s")
    return 0


def _read_prompt(file: str | None, token_ids: str | None) -> str | list[int]:
    from yunmin.errors import RequestError

    if token_ids is not None:
        try:
            return [int(part) for part in token_ids.split(",")]
        except ValueError:
            raise RequestError("--token-ids", f"expected integers and commas, got {token_ids!r:.80}") from None
    assert file is not None
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError("--prompt-file", f"{file}: expected UTF-8 text, byte {error.start} is not") from None


def _show_progress(done: int, total: int, seconds: float) -> None:
    """One line that is written over on a terminal, and one line in ten elsewhere."""
    line = f"read {done} of {total} tokens, {done / seconds:.0f} per second"
    if sys.stderr.isatty():
        print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done * 10 // total != (done - _CHUNK) * 10 // total:
        print(line, file=sys.stderr, flush=True)
