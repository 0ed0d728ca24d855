"""The body of OpenAI's completions."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from serving.api.failures import ApiError
from serving.api.protocol import GenerationBody, ListOf, StreamOptions
from yunmin.errors import RequestError

MAX_CHOICES = 128


class CompletionRequest(GenerationBody):
    """Body of `/v1/completions`: OpenAI's fields, and those of `/generate` beside them."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "def main(", "max_tokens": 16, "n": 2, "logprobs": 1, "echo": True}]}
    )

    prompt: str | ListOf[int] | ListOf[str] | ListOf[ListOf[int]] = Field(
        description="text or token ids, or several of either; with a session, what follows it"
    )
    model: str | None = Field(None, description="the served model's name, as `/v1/models` lists it")
    max_tokens: int | None = Field(
        None, json_schema_extra={"minimum": 0}, description="most tokens to generate; 0 only reads the prompt (16)"
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="choices per prompt (1)")
    best_of: int | None = Field(
        None, ge=1, le=MAX_CHOICES, description="generate so many and give the n of the best mean log-probability (n)"
    )
    echo: bool | None = Field(None, description="whether the text begins with the prompt (false)")
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities, and so many alternatives per token")
    stream: bool | None = Field(None, description="whether to answer with server-sent events")
    stream_options: StreamOptions | None = None
    suffix: str | None = Field(None, description="only null or empty: Mamba models cannot fill in the middle")
    user: str | None = Field(None, description="accepted and not used")

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def copies(self) -> int:
        """Sequences of each prompt."""
        return self.best_of or self.choices

    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        several: list[str | list[int]] = [item for item in self.prompt if not isinstance(item, int)]
        return several or [[item for item in self.prompt if isinstance(item, int)]]

    def check(self) -> None:
        """Refuses what contradicts itself or cannot be done.

        Raises:
            ApiError: names the field.
        """
        if self.suffix:
            message = "suffix: is not supported: the model reads in one direction"
            raise ApiError(400, message, param="suffix", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "is only allowed when stream is true")
        if self.copies < self.choices:
            raise RequestError("best_of", f"must be at least n, which is {self.choices}, got {self.best_of}")
        if self.stream and self.copies > self.choices:
            raise RequestError("best_of", "above n cannot be streamed: the best are known at the end")
        if self.session_id is not None and (self.copies > 1 or len(self.prompts()) > 1):
            raise RequestError("session_id", "goes on with one sequence: give one prompt, and neither n nor best_of")
        if self.echo and (self.session_id is not None or self.state is not None):
            raise RequestError("echo", "cannot show what was read before this request")
