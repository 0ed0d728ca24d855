"""Structured output: what a request says of the text's form, as a constraint for the sampler."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from serving.api.backend import Backend
from serving.api.protocol import GenerationBody, ResponseFormat
from serving.engine.job import DeadlineError
from yunmin.constraints import Constraint, compile_constraint, is_compiled
from yunmin.errors import RequestError

# a constraint may take seconds that nothing can cut short: whoever sends those waits for others of the kind, and nobody
# else does
_COMPILING = ThreadPoolExecutor(1, "yunmin-constraints")


async def constraint_of(asked: GenerationBody, backend: Backend) -> Constraint | None:
    """The one form that a request asks for, compiled beforehand so that the event loop need not wait for that.

    Raises:
        RequestError: it asks for several, or for one that cannot be; names the field.
        DeadlineError: compiling it takes longer than a request may.
        MissingExtraError: llguidance is not installed.
    """
    found = _constraint(asked)
    if found is None:
        return None
    field, constraint = found
    tokenizer, n_tokens = backend.model.tokenizer, backend.model.config.n_tokens
    if is_compiled(constraint, tokenizer, n_tokens):
        return constraint
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(backend.settings.deadline_s):
            await loop.run_in_executor(_COMPILING, compile_constraint, constraint, tokenizer, n_tokens)
    except TimeoutError:
        raise DeadlineError(f"{field}: compiling it took longer than {backend.settings.deadline_s:g} s") from None
    except RequestError as error:
        raise RequestError(field, str(error).removeprefix(f"{error.field}: ")) from None
    return constraint


def _constraint(asked: GenerationBody) -> tuple[str, Constraint] | None:
    named = [name for name in ("regex", "grammar", "choice") if getattr(asked, name) is not None]
    if asked.response_format is not None and asked.response_format.type != "text":
        named.append("response_format")
    if not named:
        return None
    if len(named) > 1:
        raise RequestError(named[1], f"give only one of {' and '.join(named)}")
    try:
        match named[0]:
            case "regex":
                return "regex", Constraint("regex", asked.regex or "")
            case "grammar":
                return "grammar", Constraint("grammar", asked.grammar or "")
            case "choice":
                return "choice", Constraint.choice(asked.choice or ())
            case _:
                assert asked.response_format is not None
                return "response_format", _from_format(asked.response_format)
    except RequestError as error:
        raise RequestError(named[0], str(error).removeprefix(f"{error.field}: ")) from None


def _from_format(asked: ResponseFormat) -> Constraint:
    if asked.type == "json_object":
        return Constraint("json_object")
    if asked.json_schema is None:
        raise RequestError("response_format", "type json_schema needs a json_schema with a schema")
    return Constraint.json_schema(asked.json_schema.schema_)
