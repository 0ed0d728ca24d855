"""Ask a model that runs under Triton Inference Server for text."""

from __future__ import annotations

import json

from yunmin.cli import parser, print_json
from yunmin.commands.prompt import add_prompt_arguments, read_prompt


def main(argv: list[str]) -> int:
    """`yunmin client URL --prompt TEXT`."""
    arguments = parser(
        "client",
        "Generates text with a model of a repository that `yunmin export --triton` wrote, and streams it to stdout.",
        [
            "yunmin client grpc://localhost:8001 --prompt 'def main(' --max-tokens 64 --temperature 0",
            "yunmin client http://localhost:8000 --model mamba --prompt-file prompt.txt --json",
            "yunmin client grpc://localhost:8001 --token-ids 1,2,3 --json",
            """yunmin client http://localhost:8000 --prompt 'Once' --sampling '{"min_p": 0.1, "stop": ["\\n"]}'""",
        ],
    )
    arguments.add_argument("url", help="grpc://HOST:PORT, or http://HOST:PORT for the generate_stream endpoint")
    arguments.add_argument("--model", default="mamba", metavar="NAME", help="its name in the repository (mamba)")
    add_prompt_arguments(arguments)
    arguments.add_argument("--max-tokens", type=int, metavar="N", help="limit of new tokens (128)")
    arguments.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (1.0)")
    arguments.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable")
    arguments.add_argument("--sampling", metavar="JSON", help="further fields as one object: top_k, top_p, stop, ...")
    arguments.add_argument("--timeout-s", type=float, default=300.0, metavar="S", help="between two tokens (300)")
    arguments.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    options = arguments.parse_args(argv)

    from serving.triton.client import ask

    sampling = _sampling(options.sampling)
    given = {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}
    sampling |= {name: value for name, value in given.items() if value is not None}
    answers = ask(options.url, options.model, read_prompt(options), sampling, timeout_s=options.timeout_s)
    texts: list[str] = []
    token_ids: list[int] = []
    finish_reason: str | None = None
    for answer in answers:
        texts.append(answer.text)
        token_ids.extend(answer.token_ids)
        finish_reason = answer.finish_reason or finish_reason
        if not options.json:
            print(answer.text, end="", flush=True)
    if finish_reason is None:
        from serving.triton.client import TritonError

        raise TritonError(f"{options.url}: model {options.model!r}: the stream broke off after {len(token_ids)} tokens")
    if options.json:
        result = {"text": "".join(texts), "token_ids": token_ids, "finish_reason": finish_reason}
        print_json(result | {"model": options.model})
    else:
        print()
    return 0


def _sampling(text: str | None) -> dict[str, object]:
    from yunmin.errors import RequestError

    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RequestError("--sampling", f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("--sampling", f"expected a JSON object, got {text!r:.80}")
    return value
