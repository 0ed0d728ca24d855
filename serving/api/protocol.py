"""What all requests share: how a body becomes one, how tokens are chosen, where to go on from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.api.failures import ApiError
from yunmin.errors import RequestError
from yunmin.sampling import CHOICE_FIELDS, SamplingParams, sampling_params_from

MAX_PRIORITY = 10

_EXPECTED = {
    "prompt": "must be a string, a list of token ids, or a list of either",
    "token_ids": "must be a list of integers",
    "stop": "must be a string or a list of strings",
    "input": "must be a string or a list of messages",
}
_TOO_MANY = 1000
_NESTED = frozenset({"messages", "response_format", "text"})  # errors in these say where within

T = TypeVar("T")
# the first wrong item is told, and the others, of which there may be hundreds of thousands, are not looked at
ListOf = Annotated[list[T], Field(fail_fast=True)]


def _within(low: float, high: float | None = None) -> dict[str, Any]:
    """Bounds that `SamplingParams` checks, for the OpenAPI document."""
    return {"minimum": low} | ({} if high is None else {"maximum": high})


class Body(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchemaFormat(Body):
    """OpenAI's wrapping of a JSON schema."""

    name: str | None = Field(None, description="accepted and not used")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] = Field(alias="schema", description="a JSON schema that the text must match")
    strict: bool | None = Field(None, description="accepted; the schema is always kept to")


class ResponseFormat(Body):
    """What the text must be, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StreamOptions(Body):
    """What a stream adds."""

    include_usage: bool = Field(False, description="end with a chunk that has the usage and no choices")
    continuous_usage_stats: bool = Field(False, description="give the usage so far in every chunk")


class GenerationBody(Body):
    """Fields of every request that generates."""

    temperature: float | None = Field(
        None, json_schema_extra=_within(0, 100), description="0 is greedy; else the logits are divided by it (1)"
    )
    top_k: int | None = Field(None, json_schema_extra=_within(0), description="keep the k best tokens; 0 keeps all (0)")
    top_p: float | None = Field(
        None,
        json_schema_extra={"exclusiveMinimum": 0, "maximum": 1},
        description="keep the best tokens that reach this probability (1)",
    )
    min_p: float | None = Field(
        None, json_schema_extra=_within(0, 1), description="drop tokens less probable than this times the best (0)"
    )
    repetition_penalty: float | None = Field(
        None, json_schema_extra=_within(0.01, 100), description="above 1 makes tokens seen before less likely (1)"
    )
    presence_penalty: float | None = Field(
        None, json_schema_extra=_within(-2, 2), description="subtracted once from generated tokens' logits (0)"
    )
    frequency_penalty: float | None = Field(
        None, json_schema_extra=_within(-2, 2), description="subtracted each time they were generated (0)"
    )
    logit_bias: dict[str, float] | None = Field(None, description="-100..100 by token id, added to logits")
    seed: int | None = Field(
        None,
        json_schema_extra=_within(0, 2**63 - 1),
        description="makes sampling repeatable; the i-th of n choices uses seed + i",
    )
    stop: str | ListOf[str] | None = Field(None, description="strings that end generation; not part of the text")
    stop_token_ids: ListOf[int] | None = Field(None, description="token ids that end generation; not part of the text")
    ignore_eos: bool | None = Field(None, description="go on after the model's end of text (false)")
    response_format: ResponseFormat | None = Field(None, description="text, any JSON object, or a JSON schema")
    regex: str | None = Field(None, description="a regular expression that the whole text must match")
    grammar: str | None = Field(None, description="a Lark or GBNF grammar that the whole text must match")
    choice: ListOf[str] | None = Field(None, description="the text must be one of these")
    session_id: str | None = Field(None, description="go on from this session, and save it where this request ends")
    session_position: int | None = Field(None, description="refuse unless the session has read so many tokens")
    state: str | None = Field(None, description="go on from this named state, see /v1/states")
    priority: int | None = Field(
        None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="higher is served first; one is worth 10 s of waiting (0)"
    )
    timeout_s: float | None = Field(None, description="end after this many seconds; at most the server's own limit")

    def deadline_s(self, limit_s: float) -> float:
        """Seconds that the request may take.

        Args:
            limit_s: of the server.

        Raises:
            RequestError: `timeout_s` is impossible, or more than that.
        """
        if self.timeout_s is None:
            return limit_s
        if not 0 < self.timeout_s <= limit_s:  # NaN fails this, too
            raise RequestError("timeout_s", f"must be above 0 and at most {limit_s:g}, got {self.timeout_s!r}")
        return self.timeout_s

    def sampling(
        self,
        max_tokens: int | None,
        limit: int,
        *,
        default: int | None = None,
        field: str = "max_tokens",
        **more: Any,
    ) -> SamplingParams:
        """The fields as sampling parameters.

        Args:
            max_tokens: of the request.
            limit: most tokens the server allows.
            default: tokens where the request names none; None takes the library's.
            field: what the request calls `max_tokens`.
            **more: further parameters, as `SamplingParams` names them.

        Raises:
            RequestError: a value is impossible; names the field.
        """
        values = {name: getattr(self, name) for name in CHOICE_FIELDS}
        tokens = max_tokens
        if tokens is None:
            tokens = min(SamplingParams.max_tokens if default is None else default, limit)
        try:
            params = sampling_params_from(values | more | {"max_tokens": tokens})
        except RequestError as error:
            if error.field != "max_tokens":
                raise
            raise RequestError(field, str(error).removeprefix("max_tokens: ")) from None
        if params.max_tokens > limit:
            raise RequestError(field, f"must be at most {limit} on this server, got {params.max_tokens}")
        return params


R = TypeVar("R", bound=BaseModel)


def parse_request(kind: type[R], body: bytes) -> R:
    """A request from a JSON body.

    Raises:
        ApiError: the body is no UTF-8, no JSON, or no such request; names the field.
    """
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"the body must be UTF-8, byte {error.start} is not"
        raise ApiError(400, message, code="invalid_encoding") from None
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    if (found := error.error_count()) > _TOO_MANY:  # to list them would take long
        return ApiError(400, f"the body has {found} errors", code="invalid_type")
    first = error.errors(include_url=False, include_input=False)[0]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body must be JSON: {first['ctx']['error']}", code="invalid_json")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    field = str(first["loc"][0])
    name = ".".join(str(part) for part in first["loc"])
    if kind == "missing":
        return ApiError(400, f"{name}: is missing", param=name, code="missing_field")
    if kind == "extra_forbidden":
        return ApiError(400, f"{name}: unknown parameter", param=name, code="unknown_parameter")
    message = first["msg"][:1].lower() + first["msg"][1:]
    where = name if field in _NESTED else field
    return ApiError(400, f"{where}: {_EXPECTED.get(field, message)}", param=field, code="invalid_type")
