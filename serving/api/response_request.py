"""The body of OpenAI's responses, as far as it applies to a model of text."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from serving.api.chat_request import refuse_unsupported
from serving.api.conversation import ChatMessage, Message
from serving.api.protocol import Body, GenerationBody, JsonSchemaFormat, ListOf, ResponseFormat
from yunmin.errors import RequestError
from yunmin.sampling import MAX_LOGPROBS

LOGPROBS = "message.output_text.logprobs"
# what would ask for something else than one text, and the values that do not
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "include": (None, [], [LOGPROBS]),
    "truncation": (None, "disabled"),
    "background": (None, False),
    "reasoning": (None, {}),
    "session_id": (None,),
    "session_position": (None,),
    "state": (None,),
}


class InputMessage(ChatMessage):
    """One message of the input; what a response gave as output may be sent back."""

    type: Literal["message"] | None = None
    id: str | None = Field(None, description="accepted and not used")
    status: str | None = Field(None, description="accepted and not used")


class TextFormat(Body):
    """What the text must be: as `response_format`, with the schema's fields beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, description="accepted and not used")
    description: str | None = Field(None, description="accepted and not used")
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema the text must match")
    strict: bool | None = Field(None, description="accepted; the schema is always kept to")


class TextOptions(Body):
    """Options of the text."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = Field(None, description="only null or medium")


class ResponseStreamOptions(Body):
    """Options of the stream."""

    include_obfuscation: bool | None = Field(None, description="accepted and not used")


class ResponseRequest(GenerationBody):
    """Body of `/v1/responses`: OpenAI's fields, and those of `/generate` that say how to sample."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"input": "Hello", "instructions": "Be brief.", "max_output_tokens": 16}]}
    )

    input: str | ListOf[InputMessage] = Field(description="what is new of the conversation")
    model: str | None = Field(None, description="the served model's name, as `/v1/models` lists it")
    instructions: str | None = Field(None, description="a system's message, for this response alone")
    previous_response_id: str | None = Field(None, description="go on after this response, as often as you like")
    store: bool | None = Field(None, description="whether later ones may go on after this one (true)")
    max_output_tokens: int | None = Field(
        None, json_schema_extra={"minimum": 0}, description="most tokens to generate (the server's limit)"
    )
    text: TextOptions | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS, description="alternatives per token, see include")
    include: ListOf[str] | None = Field(None, description=f"only {LOGPROBS}")
    metadata: dict[str, str] | None = Field(None, description="given back with the response")
    stream: bool | None = Field(None, description="whether to answer with server-sent events")
    stream_options: ResponseStreamOptions | None = None
    truncation: str | None = Field(None, description="only disabled: this model has no window")
    tools: list[Any] | None = Field(None, description="only null or empty")
    tool_choice: str | dict[str, Any] | None = Field(None, description="only null, none or auto")
    parallel_tool_calls: bool | None = Field(None, description="accepted and not used")
    background: bool | None = Field(None, description="only null or false")
    reasoning: dict[str, Any] | None = Field(None, description="only null or empty")
    user: str | None = Field(None, description="accepted and not used")
    safety_identifier: str | None = Field(None, description="accepted and not used")
    prompt_cache_key: str | None = Field(None, description="accepted and not used: every prefix is looked up")
    service_tier: str | None = Field(None, description="accepted and not used")

    @property
    def logprobs(self) -> int | None:
        """Alternatives per token; None for no probabilities."""
        return (self.top_logprobs or 0) if self.include or self.top_logprobs is not None else None

    def messages(self) -> list[Message]:
        """The input as messages."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [message.to_message() for message in self.input]

    def with_format(self) -> ResponseRequest:
        """The same with `text.format` where the other endpoints have it.

        Raises:
            ApiError: names a field that is not supported.
            RequestError: names a field that contradicts another.
        """
        refuse_unsupported(self, _NEUTRAL)
        if self.input in ("", []):
            raise RequestError("input", "must not be empty")
        form = None if self.text is None else self.text.format
        if form is None:
            return self
        if self.response_format is not None:
            raise RequestError("text", "give either text.format or response_format, not both")
        schema = None
        if form.type == "json_schema":
            if form.schema_ is None:
                raise RequestError("text", "format of type json_schema needs a schema")
            schema = JsonSchemaFormat.model_validate({"schema": form.schema_})
        return self.model_copy(update={"response_format": ResponseFormat(type=form.type, json_schema=schema)})
