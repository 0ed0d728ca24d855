"""Requests and responses: their fields, and what is refused by name."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.api.failures import ApiError
from yunmin.errors import RequestError
from yunmin.sampling import SamplingParams, sampling_params_from

OPENAI_DEFAULT_MAX_TOKENS = 16

_SAMPLING_FIELDS = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
)
_EXPECTED = {
    "prompt": "must be a string or a list of token ids",
    "token_ids": "must be a list of integers",
    "stop": "must be a string or a list of strings",
}


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    max_tokens: int | None = Field(None, description="most tokens to generate, at least 1")
    temperature: float | None = Field(None, description="0 is greedy; else the logits are divided by it (1)")
    top_k: int | None = Field(None, description="keep the k best tokens; 0 keeps all (0)")
    top_p: float | None = Field(None, description="keep the best tokens that reach this probability (1)")
    min_p: float | None = Field(None, description="drop tokens less probable than this times the best (0)")
    repetition_penalty: float | None = Field(None, description="above 1 makes tokens seen before less likely (1)")
    seed: int | None = Field(None, description="makes sampling repeatable")
    stop: str | list[str] | None = Field(None, description="strings that end generation; not part of the text")

    def sampling(self, limit: int, default_max_tokens: int | None = None) -> SamplingParams:
        """The fields as sampling parameters.

        Args:
            limit: most tokens the server allows.
            default_max_tokens: where the request names none; None takes the library's.

        Raises:
            RequestError: a value is impossible; names the field.
        """
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS}
        if values["max_tokens"] is None and default_max_tokens is not None:
            values["max_tokens"] = default_max_tokens
        if values["max_tokens"] is None:
            values["max_tokens"] = min(SamplingParams.max_tokens, limit)
        params = sampling_params_from(values)
        if params.max_tokens > limit:
            raise RequestError("max_tokens", f"must be at most {limit} on this server, got {params.max_tokens}")
        return params


class GenerateRequest(_Request):
    """Body of `/generate` and `/generate_stream`; exactly one of `prompt` and `token_ids`."""

    prompt: str | None = Field(None, description="text to continue")
    token_ids: list[int] | None = Field(None, description="token ids to continue")
    timeout_s: float | None = Field(None, description="end after this many seconds; at most the server's own limit")

    def prompt_field(self) -> tuple[str, str | list[int]]:
        """The name and value of the prompt.

        Raises:
            RequestError: there is none, or there are two.
        """
        if self.prompt is not None and self.token_ids is not None:
            raise RequestError("token_ids", "give either prompt or token_ids, not both")
        if self.token_ids is not None:
            return "token_ids", self.token_ids
        if self.prompt is None:
            raise RequestError("prompt", "is missing: give a prompt or token_ids")
        return "prompt", self.prompt


class StreamOptions(BaseModel):
    """What a stream of completions adds."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = Field(False, description="end with a chunk that has the usage and no choices")


class CompletionRequest(_Request):
    """Body of `/v1/completions`; OpenAI's, and `top_k`, `min_p` and `repetition_penalty` beside it."""

    prompt: str | list[int] | list[str] = Field(description="text, a list with one text, or token ids")
    model: str | None = Field(None, description="the served model's name, as `/v1/models` lists it")
    stream: bool | None = Field(None, description="whether to answer with server-sent events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted and not used")
    n: int | None = Field(None, description="only 1")
    best_of: int | None = Field(None, description="only 1")
    echo: bool | None = Field(None, description="only false")
    logprobs: int | None = Field(None, description="only null")
    suffix: str | None = Field(None, description="only null or empty")
    presence_penalty: float | None = Field(None, description="only 0")
    frequency_penalty: float | None = Field(None, description="only 0")
    logit_bias: dict[str, float] | None = Field(None, description="only null or empty")

    def check_supported(self) -> None:
        """Refuses what would change the result and is not implemented.

        Raises:
            ApiError: names the field.
        """
        neutral: dict[str, tuple[Any, ...]] = {
            "n": (None, 1),
            "best_of": (None, 1),
            "echo": (None, False),
            "logprobs": (None,),
            "suffix": (None, ""),
            "presence_penalty": (None, 0),
            "frequency_penalty": (None, 0),
            "logit_bias": (None, {}),
        }
        for name, allowed in neutral.items():
            if (value := getattr(self, name)) not in allowed:
                message = f"{name}: {value!r} is not supported by this server"
                raise ApiError(400, message, param=name, code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is only allowed when stream is true")

    def prompt_field(self) -> tuple[str, str | list[int]]:
        """The name and value of the prompt.

        Raises:
            RequestError: it is a list of several texts.
        """
        ids: list[int] = []
        for item in () if isinstance(self.prompt, str) else self.prompt:
            if isinstance(item, str):
                if len(self.prompt) != 1:
                    raise RequestError("prompt", f"one text per request, got a list of {len(self.prompt)}")
                return "prompt", item
            ids.append(item)
        return "prompt", self.prompt if isinstance(self.prompt, str) else ids


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
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    if kind == "json_invalid":
        return ApiError(400, f"the body must be JSON: {first['ctx']['error']}", code="invalid_json")
    if not first["loc"]:
        return ApiError(400, "the body must be a JSON object", code="invalid_json")
    field = str(first["loc"][0])
    if kind == "missing":
        return ApiError(400, f"{field}: is missing", param=field, code="missing_field")
    if kind == "extra_forbidden":
        name = ".".join(str(part) for part in first["loc"])
        return ApiError(400, f"{name}: unknown parameter", param=name, code="unknown_parameter")
    message = _EXPECTED.get(field, first["msg"][:1].lower() + first["msg"][1:])
    return ApiError(400, f"{field}: {message}", param=field, code="invalid_type")
