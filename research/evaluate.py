"""Score a model on a task: perplexity on held-out text."""

from __future__ import annotations

import sys

from yunmin.cli import parser, print_json, run


def main(argv: list[str]) -> int:
    """`yunmin eval MODEL --task perplexity --data SOURCE`."""
    arguments = parser(
        "eval",
        "Scores an artifact, a run folder or a checkpoint on a task.",
        [
            "yunmin eval artifact/ --task perplexity --data held_out.txt",
            "yunmin eval training_outputs/run --task perplexity --data stdlib --held-out 0.05 --max-tokens 32768",
            "yunmin eval artifact/ --task perplexity --data held_out.jsonl --window 1024 --stride 512 --json",
        ],
    )
    arguments.add_argument("model", help="artifact, run folder, checkpoint folder, or Hub id when online")
    arguments.add_argument("--task", choices=["perplexity"], default="perplexity", help="what to score (perplexity)")
    arguments.add_argument(
        "--data", required=True, metavar="SOURCE", help="text file, .jsonl file, folder, stdlib, or Hub dataset"
    )
    arguments.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="score only what yunmin train holds out of SOURCE when its validation_share is SHARE",
    )
    arguments.add_argument("--window", type=int, default=512, metavar="N", help="tokens read at once (512)")
    arguments.add_argument("--stride", type=int, metavar="N", help="tokens scored per window (the whole window)")
    arguments.add_argument("--max-tokens", type=int, metavar="N", help="score only the first N tokens")
    arguments.add_argument("--batch-size", type=int, default=8, metavar="N", help="windows per forward pass (8)")
    arguments.add_argument("--device", default="auto", help="torch device (auto)")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object on stdout")
    options = arguments.parse_args(argv)

    from research.perplexity import evaluate_perplexity
    from yunmin.corpus import read_documents, split_documents, texts_of
    from yunmin.errors import RequestError
    from yunmin.language_model import load

    for name in ("window", "stride", "max_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RequestError(f"--{name.replace('_', '-')}", f"must be >= 1, got {value}")
    documents = read_documents(options.data)
    if options.held_out is not None:
        _, documents = split_documents(documents, options.held_out)
    result = evaluate_perplexity(
        load(options.model, device=options.device),
        texts_of(documents),
        window=options.window,
        stride=options.stride or options.window,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    asked = {"model": options.model, "task": options.task, "data": options.data, "held_out": options.held_out}
    result = asked | result
    if options.json:
        print_json(result)
    else:
        for name, value in result.items():
            if value is not None:
                print(f"{name.replace('_', ' '):<18} {f'{value:.4f}' if isinstance(value, float) else value}")
    return 0


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} windows", end="\n" if done == total else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(run(main))
