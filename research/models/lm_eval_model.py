"""Tasks of EleutherAI's lm-eval harness on models of ours, through its Python API."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from research.models.model import TextModel
from yunmin.errors import DataError, MissingExtraError, RequestError, TokenizerError, YunminError
from yunmin.files import atomic_file

try:
    from lm_eval.api.model import TemplateLM
except ModuleNotFoundError as error:
    raise MissingExtraError(str(error.name), "lm-eval", "--lm-eval") from None

logger = logging.getLogger("yunmin.research")

_NEW_TOKENS = 256  # where a task names no limit, as the harness's own models have it
_BOOTSTRAP = 1000  # for the standard errors of metrics that are no means
_GENERATION = frozenset({"until", "max_gen_toks", "do_sample", "temperature", "top_p"})


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model as the harness asks it.

    Contexts of any length are read whole: a Mamba's state has one size whatever it has read, so nothing is cut off at
    the left, and a rolling log-likelihood is that of the whole text in one go. A server reads as many tokens at once as
    its `--max-prompt-tokens` says; what is longer is an error.

    Args:
        model: that answers.
        seed: of tasks that sample.

    Raises:
        TokenizerError: it has no end-of-text token, which the harness puts before texts.
    """

    def __init__(self, model: TextModel, seed: int = 0) -> None:
        super().__init__()
        if model.tokenizer.eos_id is None:
            raise TokenizerError(f"{model.name}: its tokenizer has no end-of-text token, which lm-eval needs")
        self._model = model
        self._seed = seed
        self._eos_id: int = model.tokenizer.eos_id
        self._known: dict[str, list[int]] = {}  # texts of the requests at hand

    @property
    def eot_token_id(self) -> int:
        return self._eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002 (the harness gives it)
        if string not in self._known:
            self._encode([string])
        return self._known[string]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: ARG002 (as above)
        self._known = {}
        texts = []
        for context, continuation in (request.args for request in requests):
            texts += [context.rstrip(), context + continuation]
        self._encode(texts)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        parts = [
            self._merged(*text, context) if text[1] and not continuation else (context or [self._eos_id], continuation)
            for text, context, continuation in requests
        ]
        asked = [index for index, (_, continuation) in enumerate(parts) if continuation]
        sequences = [[*parts[i][0], *parts[i][1]] for i in asked]
        scored = self._model.score(sequences, [len(parts[i][0]) for i in asked])
        found = [(0.0, True)] * len(requests)  # nothing at all is certain
        for index, one in zip(asked, scored, strict=True):
            found[index] = (float(one.logprobs.sum()), bool(one.greedy.all()))
        return found

    def _merged(self, context: str, continuation: str, context_ids: list[int]) -> tuple[list[int], list[int]]:
        """Ids of a continuation that lengthens its context's by none: all from where they differ, or the last."""
        ids = self.tok_encode(context + continuation)
        same = next((i for i, pair in enumerate(zip(context_ids, ids, strict=False)) if pair[0] != pair[1]), len(ids))
        begin = min(same, len(ids) - 1)
        return ids[:begin] or [self._eos_id], ids[begin:]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002 (as above)
        texts = [request.args[0] for request in requests]
        sequences = [[self._eos_id, *ids] for ids in self._model.tokenizer.encode_batch(texts)]
        asked = [index for index, ids in enumerate(sequences) if len(ids) > 1]
        found = [0.0] * len(sequences)
        for index, scored in zip(asked, self._model.score([sequences[i] for i in asked]), strict=True):
            found[index] = float(scored.logprobs.sum())
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002 (as above)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found = [""] * len(requests)
        for indices in groups.values():
            sampling = _sampling(requests[indices[0]].args[1])
            texts = self._model.complete([requests[i].args[0] for i in indices], seed=self._seed, **sampling)
            for index, (text,) in zip(indices, texts, strict=True):
                found[index] = text
        return found

    def _encode(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= zip(new, self._model.tokenizer.encode_batch(new), strict=True)


def _sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a task says about generation, in our words.

    Raises:
        RequestError: it says something that cannot be done.
    """
    if unknown := sorted(set(asked) - _GENERATION):
        raise RequestError(
            "generation_kwargs", f"{unknown[0]} is not supported, expected {', '.join(sorted(_GENERATION))}"
        )
    until = asked.get("until") or []
    temperature = asked.get("temperature")
    draws = asked.get("do_sample", bool(temperature))
    return {
        "max_tokens": int(asked.get("max_gen_toks", _NEW_TOKENS)),
        "temperature": float(1.0 if temperature is None else temperature) if draws else 0.0,
        "top_p": float(asked.get("top_p", 1.0)),
        "stop": [until] if isinstance(until, str) else [text for text in until if text],
    }


def run_lm_eval(model: TextModel, options: argparse.Namespace) -> dict[str, Any]:
    """Runs tasks of the harness.

    Args:
        model: that answers.
        options: of the command line: `lm_eval` (names, by commas), `lm_eval_include`, `limit`, `few_shot`, `seed`,
            `samples`.

    Returns:
        `tasks`: for each its figures as the harness names them, with its standard errors; and what they rest on.

    Raises:
        DataError: there is no such task, or its data cannot be had.
    """
    import lm_eval

    names = [name.strip() for name in options.lm_eval.split(",") if name.strip()]
    if not logger.isEnabledFor(logging.INFO):
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that a task relies on
    # its bars ask for no terminal
    without_bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with without_bars:
            found = lm_eval.simple_evaluate(
                model=HarnessModel(model, options.seed),
                tasks=names,
                task_manager=_task_manager(names, options.lm_eval_include),
                num_fewshot=options.few_shot,
                limit=options.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=options.samples is not None,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
    except YunminError:
        raise
    except Exception as error:
        logger.debug("lm-eval failed", exc_info=error)
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise DataError(f"lm-eval: {', '.join(names)}: {reason}") from None
    if options.samples is not None:
        with atomic_file(Path(options.samples)) as aside, aside.open("w", encoding="utf-8") as file:
            for task, records in found["samples"].items():
                for record in records:
                    file.write(json.dumps({"task": task, **record}, ensure_ascii=False, default=str) + "\n")
    return {
        "tasks": {task: _figures(figures) for task, figures in found["results"].items()},
        "examples": {task: counts["effective"] for task, counts in found["n-samples"].items()},
        "few_shot": found["n-shot"],
        "versions": {"lm_eval": lm_eval.__version__, **found["versions"]},
        "seed": options.seed,
    }


def _figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics without the name of the filter, where that is none; figures that there are not are None."""
    shown = {}
    for name, value in found.items():
        metric, _, kept = name.partition(",")
        if metric not in ("alias", "name", "sample_len", "sample_count"):
            is_number = isinstance(value, int | float)
            shown[metric if kept in ("", "none") else name] = value if is_number else None
    return shown


def _task_manager(names: list[str], include: str | None) -> Any:
    """Tasks of the folder alone where it has all of them: to list the harness's own takes half a minute."""
    from lm_eval.tasks import TaskManager

    if include is None:
        return TaskManager()
    if not Path(include).is_dir():
        raise DataError(f"--lm-eval-include: expected a folder, found no {include}")
    own = TaskManager(include_path=include, include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=include)
