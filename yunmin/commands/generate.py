"""Generate text from a model on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from yunmin.cli import parser, print_json
from yunmin.commands.prompt import add_prompt_arguments, read_prompt

if TYPE_CHECKING:  # `--help` is instant
    from yunmin.constraints import Constraint
    from yunmin.generate import Completion
    from yunmin.tokenizer import Tokenizer


def main(argv: list[str]) -> int:
    """`yunmin generate MODEL --prompt TEXT`."""
    arguments = parser(
        "generate",
        "Generates text from an artifact, a run folder or a checkpoint, and streams it to stdout.",
        [
            "yunmin generate artifact/ --prompt 'def main(' --max-tokens 64",
            "yunmin generate artifact/ --prompt-file prompt.txt --temperature 0 --json",
            "yunmin generate artifact/ --token-ids 1,2,3 --json    # a model without tokenizer",
            "yunmin generate artifact/ --prompt 'Born in ' --regex '[0-9]{4}'",
            "yunmin generate artifact/ --prompt-file letter.txt --json-schema address.json",
        ],
    )
    arguments.add_argument("model", help="artifact, run folder, checkpoint folder, or Hub id when online")
    add_prompt_arguments(arguments)
    arguments.add_argument("--max-tokens", type=int, default=128, metavar="N", help="limit of new tokens (128)")
    arguments.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (1.0)")
    arguments.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K best tokens (0: all)")
    arguments.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling (1.0)")
    arguments.add_argument("--min-p", type=float, default=0.0, metavar="P", help="relative cut-off (0.0)")
    arguments.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="> 1 repeats less (1.0)")
    arguments.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    arguments.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    arguments.add_argument("--stop-id", type=int, action="append", metavar="ID", help="end at this token id; likewise")
    arguments.add_argument("--ignore-eos", action="store_true", help="go on at the end of text")
    arguments.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: log-probabilities, and N alternatives"
    )
    constraint = arguments.add_mutually_exclusive_group()
    constraint.add_argument("--json-schema", metavar="FILE", help="the text is JSON that this schema accepts")
    constraint.add_argument("--regex", metavar="REGEX", help="the text, all of it, matches this regular expression")
    arguments.add_argument("--device", default="auto", help="torch device (auto)")
    arguments.add_argument("--runtime", choices=("auto", "native", "torch", "onnx"), default="auto", help="(auto)")
    arguments.add_argument("--threads", type=int, metavar="N", help="CPU threads (all)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    options = arguments.parse_args(argv)
    if options.logprobs is not None and not options.json:
        arguments.error("--logprobs: needs --json")

    from yunmin.language_model import load
    from yunmin.sampling import sampling_params_from
    from yunmin.threads import set_threads

    text_or_ids = read_prompt(options)
    names = "max_tokens temperature top_k top_p min_p repetition_penalty seed stop ignore_eos logprobs".split()
    params = {name: getattr(options, name) for name in names}
    params["stop_token_ids"] = options.stop_id
    params["constraint"] = _constraint(options.json_schema, options.regex)
    sampling_params_from(params)  # refuses what is impossible before a model is loaded
    if options.threads is not None:
        set_threads(options.threads)
    model = load(options.model, device=options.device, runtime=options.runtime)
    if options.json:
        completion = model.generate(text_or_ids, **params)
        result: dict[str, Any] = {
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": completion.prompt_tokens,
            "model": str(model.folder),
        }
        if completion.logprobs is not None:
            result["logprobs"] = _logprobs(completion, model.tokenizer)
        print_json(result)
        return 0
    for piece in model.stream(text_or_ids, **params):
        shown = piece.text if model.tokenizer or piece.token_id is None else f"{piece.token_id} "
        print(shown, end="", flush=True)
    print()
    return 0


def _constraint(schema_file: str | None, regex: str | None) -> Constraint | None:
    from yunmin.constraints import Constraint
    from yunmin.errors import RequestError

    if regex is not None:
        return Constraint("regex", regex)
    if schema_file is None:
        return None
    try:
        return Constraint("json_schema", Path(schema_file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("json-schema", f"{schema_file}: {error}") from None


def _logprobs(completion: Completion, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """One object for each token, with its text alone where there is a tokenizer."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = {} if tokenizer is None else {"token": tokenizer.decode([token_id])}
        return {"token_id": token_id, **text, "logprob": logprob}

    return [
        {**entry(token_id, logprob), "top": [entry(*alternative) for alternative in top]}
        for token_id, logprob, top in zip(
            completion.token_ids, completion.logprobs or (), completion.top_logprobs or (), strict=True
        )
    ]
