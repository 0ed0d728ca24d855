"""What a server is told: environment variables, checked once, with every name in one table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from serving.bento_model import SCHEME, own_artifact, stored_artifact
from yunmin.errors import ConfigError

PREFIX = "YUNMIN_"


class Settings(BaseModel):
    """A server's settings; each field is also the environment variable `YUNMIN_` + its name in capitals.

    `bentoml serve`, a container and `yunmin serve` (whose options set the same variables) thus agree.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str = Field("", description="artifact, run folder or checkpoint to serve, or bentoml:NAME[:VERSION]")
    model_name: str = Field("", description="name that requests give as `model` (default: the folder's name)")
    device: str = Field("auto", description="torch device; auto takes CUDA where there is one, else the CPU")
    runtime: Literal["auto", "native", "torch", "onnx"] = Field(
        "auto", description="native runs on CPUs only; auto prefers it; onnx runs the artifact's graph"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the model; 0 leaves torch's own choice")
    slots: int = Field(8, ge=1, le=4096, description="sequences that advance together")
    queue: int = Field(64, ge=0, le=100_000, description="requests that may wait for a slot; more get 429")
    prefill_chunk: int = Field(256, ge=1, le=65_536, description="most prompt tokens read in one turn")
    decode_stall: float = Field(
        0.75,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="by how much of itself a decode step may be delayed by prompts",
    )
    cache_bytes: int = Field(536_870_912, ge=0, description="memory for states of prompts that were read; 0 keeps none")
    cache_interval: int = Field(1024, ge=16, description="tokens between two such states in a long prompt")
    max_prompt_tokens: int = Field(32_768, ge=1, description="longest prompt")
    max_tokens: int = Field(4096, ge=1, description="most tokens that one request may generate")
    max_body_bytes: int = Field(1_048_576, ge=1024, description="largest request body")
    deadline_s: float = Field(300.0, gt=0, le=86_400, allow_inf_nan=False, description="longest time of one request")

    states: str = Field("", description="folder of named states, from `yunmin state build` (default: none)")
    session_dir: str = Field("", description="folder that keeps sessions (default: memory keeps them)")
    session_url: str = Field("", description="fsspec URL that keeps sessions for several servers: s3://..., file://...")
    session_ttl_s: float = Field(
        86_400.0,
        ge=0,
        le=1e9,
        allow_inf_nan=False,
        description="seconds that a session lives after it was last saved; 0 for ever",
    )
    session_memory_bytes: int = Field(268_435_456, ge=0, description="memory for states of sessions")
    session_disk_bytes: int = Field(10_737_418_240, ge=0, description="most bytes of states in the session folder")
    max_sessions: int = Field(10_000, ge=1, description="most sessions at a time")
    max_session_tokens: int = Field(1_000_000, ge=1, description="tokens after which a session can grow no further")

    chat_template: str = Field("", description="chatml, plain or a Jinja file (default: the model's own)")
    api_keys: SecretStr = Field(SecretStr(""), description="bearer keys, by commas; none leaves the server open")
    api_key_file: str = Field("", description="TOML file of bearer keys with limits: [keys.NAME] key = ...")
    admin_key: SecretStr = Field(SecretStr(""), description="bearer key of /admin/; none keeps that off")
    reload_root: str = Field("", description="folder whose artifacts /admin/reload may load (default: only `artifact`)")
    cors_origins: str = Field("", description="origins whose pages may call the server, by commas; * for any")
    log_format: Literal["off", "text", "json"] = Field("off", description="one line per request on stderr, or none")
    log_prompts: bool = Field(False, description="whether those lines have the text of prompts and answers")

    @property
    def served_name(self) -> str:
        """The name under which the model is listed."""
        return self.model_name or Path(self.artifact).resolve().name


@dataclass(frozen=True)
class Variable:
    """One setting as the outside names it."""

    field: str
    name: str
    description: str
    default: Any
    is_secret: bool = False

    @property
    def option(self) -> str:
        """Its option of `yunmin serve`."""
        return "--" + self.field.replace("_", "-")


def variables() -> list[Variable]:
    """Every environment variable the server reads."""
    return [
        Variable(
            field, PREFIX + field.upper(), info.description or "", info.default, isinstance(info.default, SecretStr)
        )
        for field, info in Settings.model_fields.items()
    ]


def read_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from the environment; an unset or empty variable means the default.

    A bento serves what it was built with, unless told otherwise. A model of BentoML's store is served by its name.

    Raises:
        ConfigError: a value is impossible, or the store has no such model; names the variable or the model.
    """
    environ = os.environ if environ is None else environ
    given = {v.field: environ[v.name] for v in variables() if environ.get(v.name)}
    artifact = given.get("artifact") or own_artifact()
    if artifact.startswith(SCHEME):
        artifact, name = stored_artifact(artifact.removeprefix(SCHEME))
        given.setdefault("model_name", name)
    given["artifact"] = artifact
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        variable = next(v for v in variables() if v.field == first["loc"][0])
        raise ConfigError(
            f"{variable.name} ({variable.option}): {first['msg'].lower()}, got {first['input']!r}"
        ) from None


def require_artifact(settings: Settings) -> str:
    """The artifact to serve.

    Raises:
        ConfigError: none is named.
    """
    if not settings.artifact:
        raise ConfigError(f"{PREFIX}ARTIFACT: expected the artifact folder to serve, it is not set")
    return settings.artifact
