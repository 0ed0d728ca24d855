"""Reads a training configuration: YAML, `key=value` overrides, and errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from training.config import TrainingConfig
from yunmin.errors import ConfigError


def load_config(path: str | Path | None, overrides: tuple[str, ...] | list[str] = ()) -> TrainingConfig:
    """Reads YAML, then applies `key=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: a missing or malformed file, an unknown key or an impossible value; names it.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if path is not None:
        values = _read_yaml(Path(path))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"{override!r}: expected key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{key}: {text!r} is no YAML value") from None
        values[key] = value
        sources[key] = "command line"
    return parse_config(values, where="configuration" if path is None else str(path), sources=sources)


def describe_keys(model: type[BaseModel]) -> list[str]:
    """One line for each key: name, default, description, and what it may be where that is a short list."""
    lines = []
    for name, field in model.model_fields.items():
        default = field.get_default()
        shown = yaml.safe_dump(list(default) if isinstance(default, tuple) else default, default_flow_style=True)
        shown = shown.removesuffix("\n").removesuffix("\n...")
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        allowed = f" ({', '.join(choices)})" if choices else ""
        lines.append(f"{name + '=' + shown:<38} {field.description}{allowed}")
    return lines


def parse_config(
    values: dict[str, Any], *, where: str = "configuration", sources: Mapping[str, str] | None = None
) -> TrainingConfig:
    """Validates a dictionary.

    Args:
        values: by key.
        where: they come from, for the error's text.
        sources: where single keys come from instead.

    Raises:
        ConfigError: names the first unknown key or impossible value.
    """
    try:
        return TrainingConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        where = (sources or {}).get(key.partition(".")[0], where)
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, TrainingConfig.model_fields, n=1)
            hint = f", did you mean {near[0]!r}?" if near else "; yunmin train --help lists all keys"
            raise ConfigError(f"{where}: unknown key {key!r}{hint}") from None
        message = first["msg"].removeprefix("Value error, ")
        found = f", got {first['input']!r}" if key else ""
        raise ConfigError(f"{where}: {key + ': ' if key else ''}{message}{found}") from None
    except TypeError:
        raise ConfigError(f"{where}: keys must be strings") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: expected a YAML file, found no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: expected YAML, {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(values).__name__}")
    return values
