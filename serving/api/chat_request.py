"""The body of OpenAI's chat completions."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from serving.api.completion_request import MAX_CHOICES
from serving.api.conversation import ChatMessage
from serving.api.failures import ApiError
from serving.api.protocol import GenerationBody, ListOf, StreamOptions
from yunmin.errors import RequestError
from yunmin.sampling import MAX_LOGPROBS

# what would ask for something else than text, and the values that do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "store": (None, False),
}


class ChatRequest(GenerationBody):
    """Body of `/v1/chat/completions`: OpenAI's fields, and those of `/generate` beside them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 16}]
        }
    )

    messages: ListOf[ChatMessage] = Field(
        min_length=1, description="the conversation; with a session, what is new of it"
    )
    model: str | None = Field(None, description="the served model's name, as `/v1/models` lists it")
    max_completion_tokens: int | None = Field(
        None, json_schema_extra={"minimum": 0}, description="most tokens to generate (the server's limit)"
    )
    max_tokens: int | None = Field(
        None, json_schema_extra={"minimum": 0}, description="the older name of max_completion_tokens"
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices (1)")
    logprobs: bool | None = Field(None, description="whether to give log-probabilities (false)")
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="so many alternatives per token (0)")
    stream: bool | None = Field(None, description="whether to answer with server-sent events")
    stream_options: StreamOptions | None = None
    tools: list[Any] | None = Field(None, description="only null or empty")
    tool_choice: str | dict[str, Any] | None = Field(None, description="only null, none or auto")
    parallel_tool_calls: bool | None = Field(None, description="accepted and not used")
    modalities: ListOf[str] | None = Field(None, description="only null or text")
    store: bool | None = Field(None, description="only null or false; sessions and /v1/responses keep conversations")
    metadata: dict[str, str] | None = Field(None, description="accepted and not used")
    user: str | None = Field(None, description="accepted and not used")
    safety_identifier: str | None = Field(None, description="accepted and not used")
    prompt_cache_key: str | None = Field(None, description="accepted and not used: every prefix is looked up")
    service_tier: str | None = Field(None, description="accepted and not used")

    @property
    def copies(self) -> int:
        return self.n or 1

    @property
    def limit_field(self) -> str:
        """What the request calls its limit of tokens."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        """Refuses what contradicts itself or cannot be done.

        Raises:
            ApiError: names the field.
        """
        refuse_unsupported(self, _NEUTRAL)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is only allowed when stream is true")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "is only allowed when logprobs is true")
        if self.session_id is not None and self.copies > 1:
            raise RequestError("session_id", "goes on with one sequence: n must be 1")


def refuse_unsupported(asked: GenerationBody, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Refuses fields whose values would change the answer and are not supported.

    Args:
        asked: the request.
        neutral: values that change nothing, by field.

    Raises:
        ApiError: names the field.
    """
    for name, allowed in neutral.items():
        if (value := getattr(asked, name)) not in allowed:
            message = f"{name}: {value!r:.100} is not supported by this server"
            raise ApiError(400, message, param=name, code="unsupported_parameter")
