"""Code generation: a model completes functions, and their tests decide in a sandbox (pass@k)."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from research.metrics.pass_at_k import score_passes
from research.models.model import Progress, TextModel, no_progress
from research.sandbox.runner import Sandbox, Verdict
from research.tasks.generation import choose, unescape
from research.tasks.problem import Problem, human_eval_problems, read_problems, read_samples, write_samples
from research.tasks.stdlib_functions import stdlib_problems
from yunmin.corpus import read_documents, split_documents
from yunmin.errors import DataError, RequestError

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # where a completed function is over (Chen et al. 2021)
_KS = (1, 10, 100)
_MAX_NEW_TOKENS = 512
_EMPTY = "    pass\n"

Verdicts = dict[tuple[Problem, str], Verdict]


def run(
    open_model: Callable[[], TextModel] | None, options: argparse.Namespace, *, progress: Progress = no_progress
) -> dict[str, Any]:
    """Lets a model write programs, and judges them where the user allows it.

    Args:
        open_model: gives the model that writes, once all else is found to be in order; None to judge what is in the
            file `score_samples`.
        options: of the command line: `data`, `held_out`, `limit`, `seed`, `programs`, `temperature`, `top_p`, `stop`,
            `max_new_tokens`, `samples`, `score_samples`, `run_model_code`.
        progress: told how many programs are judged.

    Returns:
        Without `run_model_code` only counts, and the command to go on with. With it pass@k, `problems`, `programs` and
        `intervals`. Both say how the programs were written, or in which file they were found. Of the problems that
        Python's library gives, `unsolvable` ones do not count: what cannot be judged here.

    Raises:
        SandboxError: the programs shall run, and this system cannot confine them. Nothing is generated then.
        RequestError: the options contradict each other.
        DataError: problems or samples are missing or malformed.
    """
    if not options.run_model_code and (open_model is None or options.samples is None):
        needed = "--score-samples" if open_model is None else "a score"
        raise RequestError(
            "--run-model-code",
            f"{needed} needs it, since programs that a model wrote are run only if you say so; "
            "--samples FILE writes them without running any",
        )
    if options.programs > 1 and options.temperature == 0:
        raise RequestError("--temperature", f"expected one above 0, so that {options.programs} programs differ")
    sandbox = Sandbox() if options.run_model_code else None
    _, problems = choose(_problems(options.data, options.held_out), limit=options.limit, seed=options.seed)
    if open_model is None:
        completions = read_samples(Path(options.score_samples), problems)
        written: dict[str, Any] = {"score_samples": options.score_samples}
    else:
        written = {
            "programs_per_problem": options.programs,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_new_tokens": options.max_new_tokens or _MAX_NEW_TOKENS,
            "stop": list(STOP if options.stop is None else map(unescape, options.stop)),
        }
        completions = generate(open_model(), problems, seed=options.seed, **written)
    written |= {"limit": options.limit, "seed": options.seed}
    if options.samples is not None:  # before anything of it runs
        write_samples(Path(options.samples), problems, completions)
    if sandbox is None:
        counts = {"problems": len(problems), "programs": sum(map(len, completions))}
        return {**counts, **written, "not_scored": _command(options)}
    result, verdicts = score(problems, completions, sandbox, progress=progress)
    if options.samples is not None:
        write_samples(Path(options.samples), problems, completions, verdicts)
    return {**result, **written}


def _command(options: argparse.Namespace) -> str:
    """What scores the same problems' programs later."""
    names = ("task", "data", "held_out", "limit", "seed")
    asked = [(f"--{name.replace('_', '-')}", str(getattr(options, name))) for name in names if getattr(options, name)]
    pairs = [*asked, ("--score-samples", options.samples)]
    return shlex.join(["yunmin", "eval", *(word for pair in pairs for word in pair), "--run-model-code"])


def generate(
    model: TextModel,
    problems: Sequence[Problem],
    *,
    programs_per_problem: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    stop: Sequence[str],
    seed: int,
) -> list[list[str]]:
    """Completions of each problem's prompt; nothing is run."""
    return model.complete(
        [problem.prompt for problem in problems],
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        seed=seed,
        n=programs_per_problem,
    )


def score(
    problems: Sequence[Problem],
    completions: Sequence[Sequence[str]],
    sandbox: Sandbox,
    *,
    progress: Progress = no_progress,
) -> tuple[dict[str, Any], Verdicts]:
    """Runs each problem's tests on each of its completed programs, equal ones once.

    Args:
        problems: those of a task.
        completions: for each problem its samples.
        sandbox: where they run.
        progress: told how many programs are judged.

    Returns:
        pass@1, @10 and @100, as far as all problems have so many samples, with `problems`, `programs`
        and `intervals`; and the verdicts.

    Raises:
        DataError: tests that cannot be run, or no problem that counts.
    """
    verdicts = _known(problems, sandbox, progress)
    scored = [
        (problem, samples)
        for problem, samples in zip(problems, completions, strict=True)
        if not problem.own_body_decides or _counts(problem, verdicts)
    ]
    if not scored:
        raise DataError("code: there is no problem whose own solution passes its tests here")
    programs = dict.fromkeys((problem, completion) for problem, samples in scored for completion in samples)
    new = [program for program in programs if program not in verdicts]
    verdicts |= judge_all(new, sandbox, "programs", progress)
    passes = [[verdicts[problem, completion].passed for completion in samples] for problem, samples in scored]
    fewest = min(map(len, passes))
    result = score_passes(passes, [k for k in _KS if k <= fewest])
    counts = {"programs": sum(map(len, passes)), "unsolvable": len(problems) - len(scored) or None}
    return {**result, **counts}, verdicts


def judge_all(
    programs: Sequence[tuple[Problem, str]], sandbox: Sandbox, what: str, progress: Progress = no_progress
) -> Verdicts:
    """Verdicts on completions of problems, as many at a time as there are processors."""

    def judge(program: tuple[Problem, str]) -> Verdict:
        problem, completion = program
        try:
            return sandbox.judge(problem.prompt + completion, problem.entry_point, problem.test, problem.setup)
        except DataError as error:
            if problem.own_body_decides:
                return Verdict(False, str(error))
            raise DataError(f"{problem.task_id}: {error}") from None

    verdicts: Verdicts = {}
    executor = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for program, verdict in zip(programs, executor.map(judge, programs), strict=True):
            verdicts[program] = verdict
            progress(what, len(verdicts), len(programs))
    finally:
        executor.shutdown(cancel_futures=True)
    return verdicts


def _problems(source: str, held_out: float | None) -> list[Problem]:
    if source in ("stdlib", "stdlib:code"):  # that the latter lacks the reference changes what training holds out
        if held_out is None:
            return stdlib_problems()
        _, documents = split_documents(read_documents(source), held_out)
        found = stdlib_problems({document.text for document in documents})
        if not found:
            raise DataError(f"--held-out: {held_out:g} of Python's library has no function with examples; take more")
        return found
    if held_out is not None:
        raise RequestError("--held-out", f"divides Python sources only (stdlib), got {source}")
    return human_eval_problems() if source == "humaneval" else read_problems(Path(source))


def _known(problems: Sequence[Problem], sandbox: Sandbox, progress: Progress) -> Verdicts:
    """Verdicts on the own and on an empty body, where they decide whether a problem counts."""
    uncertain = [problem for problem in problems if problem.own_body_decides]
    programs = [(problem, body) for problem in uncertain for body in (problem.canonical_solution or "", _EMPTY)]
    return judge_all(programs, sandbox, "known solutions", progress)


def _counts(problem: Problem, known: Verdicts) -> bool:
    return known[problem, problem.canonical_solution or ""].passed and not known[problem, _EMPTY].passed
