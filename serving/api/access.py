"""Who may ask, and how much: bearer keys, and limits for each of them."""

from __future__ import annotations

import hashlib
import hmac
import math
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serving.api import page
from serving.api.failures import ApiError
from serving.settings import PREFIX, Settings
from yunmin.errors import ConfigError

# answered without a key; BentoML answers /livez, /healthz and /readyz before they come here
OPEN_PATHS = page.OPEN_PATHS | {"/openapi.json", "/docs.json", "/health"}
ADMIN_PREFIX = "/admin/"
_MINUTE_S = 60.0


class KeyLimits(BaseModel):
    """What one key may ask for; None is no limit.

    Attributes:
        requests_per_minute: a whole minute's worth may come at once.
        tokens_per_minute: read and generated ones, counted when a request ends; the next one waits until the minute's
            share has made up for them.
        concurrent: requests at a time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    concurrent: int | None = Field(None, ge=1)


class _FileEntry(KeyLimits):
    key: str


class Allowance:
    """What is left of a limit per minute, filled up evenly.

    Args:
        per_minute: the limit, and the most there can be.
        clock: seconds, monotonic.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._most = float(per_minute)
        self._left = self._most
        self._clock = clock
        self._filled = clock()

    def wait_s(self, needed: float) -> float:
        """Seconds until as much is there."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._filled) * self._most / _MINUTE_S)
        self._filled = now
        return max(0.0, (needed - self._left) * _MINUTE_S / self._most)

    def take(self, amount: float) -> None:
        """Takes what was used, even if it is more than is left."""
        self._left -= amount


class Key:
    """A bearer key, known by its digest, and what is left of its limits.

    Args:
        name: for logs.
        secret: the key itself; not kept.
        limits: of this key.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        secret: str,
        limits: KeyLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.limits = limits or KeyLimits(requests_per_minute=None, tokens_per_minute=None, concurrent=None)
        self._digest = _digest(secret.encode())
        self._running = 0
        self._requests = _allowance(self.limits.requests_per_minute, clock)
        self._tokens = _allowance(self.limits.tokens_per_minute, clock)

    def matches(self, digest: bytes) -> bool:
        """Whether a presented key, by its digest, is this one; takes the same time whether it is or not."""
        return hmac.compare_digest(self._digest, digest)

    def begin(self) -> None:
        """A request begins; `end` must follow.

        Raises:
            ApiError: 429, this key has reached a limit.
        """
        if self.limits.concurrent is not None and self._running >= self.limits.concurrent:
            raise _too_many(f"this key may have {self.limits.concurrent} requests at a time", 1.0)
        if self._tokens is not None and (wait_s := self._tokens.wait_s(1.0)):
            raise _too_many(f"this key may use {self.limits.tokens_per_minute} tokens per minute", wait_s)
        if self._requests is not None:
            if wait_s := self._requests.wait_s(1.0):
                raise _too_many(f"this key may send {self.limits.requests_per_minute} requests per minute", wait_s)
            self._requests.take(1.0)
        self._running += 1

    def end(self, tokens: int) -> None:
        """A request has ended.

        Args:
            tokens: it has used.
        """
        self._running -= 1
        if self._tokens is not None:
            self._tokens.take(tokens)


class Access:
    """All keys of a server.

    Args:
        keys: any of them opens the server; none at all leaves it open.
        admin_key: opens what is below `/admin/`; None keeps that closed to everyone.
    """

    def __init__(self, keys: Iterable[Key] = (), admin_key: Key | None = None) -> None:
        self._keys = tuple(keys)
        self._admin_key = admin_key

    def admit(self, path: str, authorization: str | None) -> Key | None:
        """The key that a request comes with, where one is needed.

        Args:
            path: that is asked for.
            authorization: the header of that name.

        Raises:
            ApiError: 401, the key is missing or wrong; 404, there is no admin key to open that path with.
        """
        if path.startswith(ADMIN_PREFIX):
            if self._admin_key is None:
                raise ApiError(404, f"{path}: off, since this server has no admin key", code="not_found")
            return _matching((self._admin_key,), authorization)
        if not self._keys or path in OPEN_PATHS:
            return None
        return _matching(self._keys, authorization)


def read_access(settings: Settings) -> Access:
    """The keys that the settings name.

    Raises:
        ConfigError: a variable is set and holds no key, or the key file cannot be read; names the entry, never a key.
    """
    given = settings.api_keys.get_secret_value()
    secrets = [secret.strip() for secret in given.split(",")]
    keys = [Key(f"env-{number}", secret) for number, secret in enumerate(filter(None, secrets), 1)]
    if given and not keys:  # whoever meant to set keys must not get an open server
        raise ConfigError(f"{PREFIX}API_KEYS: expected keys, found blanks and commas only")
    if settings.api_key_file:
        keys += _read_key_file(Path(settings.api_key_file))
        if not keys:
            raise ConfigError(f"{settings.api_key_file}: expected at least one [keys.NAME], found none")
    admin = settings.admin_key.get_secret_value().strip()
    if settings.admin_key.get_secret_value() and not admin:
        raise ConfigError(f"{PREFIX}ADMIN_KEY: expected a key, found blanks only")
    return Access(keys, Key("admin", admin) if admin else None)


def _read_key_file(path: Path) -> list[Key]:
    try:
        found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: expected a file of keys, {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        where = str(error).rpartition("(")[2].rstrip(")") or "somewhere"  # the rest may quote a key
        raise ConfigError(f"{path}: expected TOML, it is damaged {where}") from None
    entries = found.get("keys", {})
    if set(found) - {"keys"} or not isinstance(entries, dict):
        raise ConfigError(f"{path}: expected only tables [keys.NAME], found {', '.join(found)}")
    return [_key_of(path, name, entry) for name, entry in entries.items()]


def _key_of(path: Path, name: str, values: Any) -> Key:
    try:
        entry = _FileEntry.model_validate(values, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(["keys", name, *map(str, first["loc"])])
        raise ConfigError(f"{path}: {where}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None
    if not entry.key.strip():
        raise ConfigError(f"{path}: keys.{name}.key: expected a key, it is empty")
    return Key(name, entry.key.strip(), KeyLimits(**entry.model_dump(exclude={"key"})))


def _matching(keys: Iterable[Key], authorization: str | None) -> Key:
    scheme, _, presented = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not presented.strip():
        raise _unauthorized("an API key is needed: Authorization: Bearer KEY", "missing_api_key")
    digest = _digest(presented.strip().encode("latin-1"))
    found = None
    for key in keys:  # all of them: the time must not tell which one was near
        if key.matches(digest):
            found = key
    if found is None:
        raise _unauthorized("the API key is not one of this server's", "invalid_api_key")
    return found


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _allowance(per_minute: int | None, clock: Callable[[], float]) -> Allowance | None:
    return None if per_minute is None else Allowance(per_minute, clock)


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})


def _too_many(message: str, wait_s: float) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
