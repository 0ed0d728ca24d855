from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any

import pytest

from serving.api.access import Access, Key, KeyLimits, read_access
from serving.api.failures import ApiError
from serving.settings import read_settings
from yunmin.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limited(clock: Clock, **limits: int) -> Key:
    return Key("k", "secret", KeyLimits.model_validate(limits), clock)


def refused(deed: Any, status: int) -> ApiError:
    with pytest.raises(ApiError) as error:
        deed()
    assert error.value.status == status
    assert "secret" not in str(error.value)
    return error.value


def test_without_keys_everything_but_admin_is_open() -> None:
    assert Access().admit("/v1/completions", None) is None
    assert refused(lambda: Access().admit("/admin/reload", "Bearer x"), 404).code == "not_found"


def test_any_key_opens_and_its_name_is_known() -> None:
    keys = Access([Key("a", "secret-a"), Key("b", "secret-b")])
    for name in "ab":
        key = keys.admit("/generate", f"Bearer secret-{name}")
        assert key is not None
        assert key.name == name
    assert keys.admit("/generate", "bearer  secret-a ") is not None
    assert keys.admit("/docs", None) is None


@pytest.mark.parametrize(
    "header", [None, "", "secret-a", "Basic secret-a", "Bearer", "Bearer ", "Bearer secret-", "Bearer secret-aa"]
)
def test_a_missing_or_wrong_key_is_a_401(header: str | None) -> None:
    error = refused(lambda: Access([Key("a", "secret-a")]).admit("/generate", header), 401)
    assert error.headers["WWW-Authenticate"] == "Bearer"
    assert error.body()["error"]["type"] == "invalid_request_error"


def test_the_admin_key_opens_admin_alone_and_no_other_key_does() -> None:
    keys = Access([Key("a", "secret-a")], Key("admin", "secret-admin"))
    assert keys.admit("/admin/reload", "Bearer secret-admin") is not None
    refused(lambda: keys.admit("/admin/reload", "Bearer secret-a"), 401)
    refused(lambda: keys.admit("/generate", "Bearer secret-admin"), 401)


def test_a_key_is_compared_with_every_one_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    constant_time = hmac.compare_digest

    def compare(mine: bytes, theirs: bytes) -> bool:
        compared.append((len(mine), len(theirs)))
        return constant_time(mine, theirs)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    keys = Access([Key(str(n), f"secret-{n}") for n in range(5)])
    keys.admit("/x", "Bearer secret-0")
    assert compared == [(32, 32)] * 5  # digests, whose lengths tell nothing


def test_requests_per_minute_fill_up_evenly() -> None:
    clock = Clock()
    key = limited(clock, requests_per_minute=6)
    for _ in range(6):
        key.begin()
    error = refused(key.begin, 429)
    assert error.headers["Retry-After"] == "10"
    assert error.code == "rate_limit_exceeded"
    assert error.kind == "rate_limit_error"
    clock.now += 10.001
    key.begin()
    refused(key.begin, 429)


def test_tokens_per_minute_count_when_a_request_ends() -> None:
    clock = Clock()
    key = limited(clock, tokens_per_minute=60)
    key.begin()
    key.begin()  # nothing is used yet
    key.end(80)
    assert int(refused(key.begin, 429).headers["Retry-After"]) == 21
    clock.now += 21.001
    key.begin()


def test_concurrent_requests_are_bounded_and_given_back() -> None:
    key = limited(Clock(), concurrent=2)
    key.begin()
    key.begin()
    assert refused(key.begin, 429).headers["Retry-After"] == "1"
    key.end(0)
    key.begin()


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    key = limited(clock, concurrent=1, requests_per_minute=2)
    key.begin()
    for _ in range(5):
        refused(key.begin, 429)
    key.end(0)
    key.begin()


KEY_FILE = """
[keys.alice]
key = "secret-alice"
requests_per_minute = 5

[keys.bob]
key = "secret-bäb"
"""


def test_keys_come_from_the_environment_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(KEY_FILE, encoding="utf-8")
    environ = {"YUNMIN_API_KEYS": "secret-1, secret-2,", "YUNMIN_API_KEY_FILE": str(path), "YUNMIN_ADMIN_KEY": "root"}
    settings = read_settings(environ)
    assert "secret" not in repr(settings)
    keys = read_access(settings)
    presented = {"secret-1": "env-1", "secret-2": "env-2", "secret-alice": "alice", "secret-bäb": "bob"}
    for secret, name in presented.items():
        key = keys.admit("/x", f"Bearer {secret.encode().decode('latin-1')}")
        assert key is not None
        assert key.name == name
        assert key.limits.requests_per_minute == (5 if name == "alice" else None)
    assert keys.admit("/admin/reload", "Bearer root") is not None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[keys.a]\nkey = "secret\n', "expected TOML, it is damaged at line 2"),
        ("[keys.a]\n", "keys.a.key: field required"),
        ('[keys.a]\nkey = ""', "keys.a.key: expected a key, it is empty"),
        ('[keys.a]\nkey = "secret"\nrequest_per_minute = 5', "keys.a.request_per_minute: extra inputs"),
        ('[keys.a]\nkey = "secret"\nconcurrent = 0', "keys.a.concurrent: input should be greater"),
        ("[keys.a]\nkey = 5", "keys.a.key: input should be a valid string"),
        ('[kyes.a]\nkey = "secret"', "found kyes"),
        ("keys = 5", "expected only tables"),
        ("", r"expected at least one \[keys.NAME\]"),
    ],
)
def test_a_key_file_with_a_mistake_is_one_line_without_a_key(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=expected) as error:
        read_access(read_settings({"YUNMIN_API_KEY_FILE": str(path)}))
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["YUNMIN_API_KEYS", "YUNMIN_ADMIN_KEY"])
def test_a_variable_for_keys_that_holds_none_does_not_leave_the_server_open(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected "):
        read_access(read_settings({name: " " if name == "YUNMIN_ADMIN_KEY" else " , "}))


def test_a_missing_key_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match="/nowhere/keys: expected a file of keys, No such file"):
        read_access(read_settings({"YUNMIN_API_KEY_FILE": "/nowhere/keys"}))
