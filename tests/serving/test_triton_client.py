"""Text from a model under a real Triton server, by both of its protocols."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from export.triton import write_repository
from serving.client_cli import main
from serving.settings import Settings
from serving.triton.asked import read_request
from serving.triton.client import TritonError, ask
from serving.triton.python_model import read_settings
from tests.serving.triton_server import TritonServer, free_ports, triton_server
from tests.triton_models import write_tiny_artifact
from yunmin.errors import ConfigError, RequestError
from yunmin.language_model import LanguageModel, load
from yunmin.triton_contract import SETTINGS

GREEDY = {"temperature": 0, "max_tokens": 24}
PROMPTS = ["def scan(", "The quick", "café 速い", "x", "0123456789 times, she said."]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(write_tiny_artifact(tmp_path_factory.mktemp("triton") / "artifact"), device="cpu")


@pytest.fixture(scope="module")
def server(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("server")
    write_repository(folder / "repository", model.folder)
    config = folder / "repository" / "mamba" / "config.pbtxt"
    text = config.read_text()
    more = 'parameters { key: "max_tokens", value: { string_value: "1000000" } }\n'
    config.write_text(text + more)
    with triton_server(folder / "repository", "mamba", folder) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("prompt", [*PROMPTS, [5, 7, 11]])
def test_both_protocols_stream_what_generate_gives(
    server: TritonServer, model: LanguageModel, protocol: str, prompt: str | list[int]
) -> None:
    answers = list(ask(getattr(server, protocol), "mamba", prompt, GREEDY))
    expected = model.generate(prompt, temperature=0.0, max_tokens=24)
    assert "".join(answer.text for answer in answers) == expected.text
    assert tuple(i for answer in answers for i in answer.token_ids) == expected.token_ids
    assert [answer.finish_reason for answer in answers] == [None] * (len(answers) - 1) + [expected.finish_reason]


@pytest.mark.slow
def test_seeded_sampling_is_that_of_generate(server: TritonServer, model: LanguageModel) -> None:
    sampling = {"seed": 7, "top_k": 40, "max_tokens": 16, "stop": ["zz"], "logit_bias": {"3": -100}}
    (answer,) = ask(server.grpc, "mamba", "def", sampling, stream=False)
    expected = model.generate("def", seed=7, top_k=40, max_tokens=16, stop=["zz"], logit_bias={"3": -100})
    assert (answer.text, answer.token_ids, answer.finish_reason) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )


@pytest.mark.slow
def test_concurrent_requests_get_what_each_gets_alone(server: TritonServer, model: LanguageModel) -> None:
    prompts = [f"{prompt}{number}" for number in range(4) for prompt in PROMPTS]

    def text(prompt: str) -> str:
        url = server.grpc if len(prompt) % 2 else server.http
        return "".join(answer.text for answer in ask(url, "mamba", prompt, GREEDY))

    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(text, prompts))
    assert found == [model.generate(prompt, temperature=0.0, max_tokens=24).text for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_who_stops_reading_frees_a_slot(server: TritonServer, protocol: str) -> None:
    endless = {"temperature": 0, "max_tokens": 1_000_000, "ignore_eos": True}
    for _ in range(12):  # of eight slots
        answers = ask(getattr(server, protocol), "mamba", "x", endless)
        assert next(answers).finish_reason is None
        answers.close()  # type: ignore[attr-defined]
    assert list(ask(server.grpc, "mamba", "x", GREEDY, timeout_s=30))  # else it would wait for ever


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ("x", {"temperature": -1}, r"temperature: must be a number in 0\.\.100, got -1"),
        ("x", {"top_q": 1}, "top_q: unknown parameter"),
        ("x", {"max_tokens": 1_000_001}, "max_tokens: must be at most 1000000 on this server"),
        ("", {}, "text_input: must not be empty"),
        ([300], {}, r"input_ids: token ids must lie in 0\.\.299, got 300"),
        ("x" * 1_048_577, {}, "text_input: must have at most 1048576 bytes"),
    ],
)
def test_impossible_requests_are_refused_by_name(
    server: TritonServer, protocol: str, prompt: str | list[int], sampling: dict[str, object], message: str
) -> None:
    with pytest.raises(TritonError, match=message):
        list(ask(getattr(server, protocol), "mamba", prompt, sampling))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_missing_model_is_named(server: TritonServer, protocol: str) -> None:
    with pytest.raises(TritonError, match="nope"):
        list(ask(getattr(server, protocol), "nope", "x", GREEDY))


@pytest.mark.slow
def test_the_command_prints_the_text_or_json(
    server: TritonServer, model: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate("def", temperature=0.0, max_tokens=8)
    arguments = ["--prompt", "def", "--temperature", "0", "--max-tokens", "8"]
    assert main([server.http, *arguments]) == 0
    assert capsys.readouterr().out == expected.text + "\n"
    assert main([server.grpc, *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], tuple(found["token_ids"])) == (expected.text, expected.token_ids)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_server_that_is_away_is_named(scheme: str) -> None:
    (port,) = free_ports(1)
    with pytest.raises(TritonError, match=f"{scheme}://127.0.0.1:{port}: no Triton server answers"):
        list(ask(f"{scheme}://127.0.0.1:{port}", "mamba", "x", {}))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "protocol"), [("http", "grpc"), ("grpc", "http")])
def test_a_port_of_the_other_protocol_is_named(server: TritonServer, scheme: str, protocol: str) -> None:
    url = f"{scheme}://{getattr(server, protocol).partition('://')[2]}"
    with pytest.raises(TritonError, match=f"{url}: no Triton server answers"):
        list(ask(url, "mamba", "x", {}))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_what_cannot_be_asked_is_refused_by_name(scheme: str) -> None:
    for seconds in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="timeout: expected seconds above 0"):
            ask(f"{scheme}://localhost:1", "mamba", "x", {}, timeout_s=seconds)
    with pytest.raises(RequestError, match="input_ids: token ids must be integers of 64 bits"):
        ask(f"{scheme}://localhost:1", "mamba", [1, 2**63], {})
    with pytest.raises(RequestError, match="text_input: must be UTF-8, character 1 is not"):
        ask(f"{scheme}://localhost:1", "mamba", "a\udcff", {})


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8001",
        "ftp://localhost",
        "grpc://localhost",
        "http://localhost:port",
        "grpc://localhost:8001/v2",
        "http://localhost:8000?v=2",
    ],
)
def test_urls_of_no_protocol_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        ask(url, "mamba", "x", {})


def test_a_request_needs_one_prompt_and_names_each_field_once() -> None:
    settings = read_settings({"parameters": {"max_prompt_tokens": {"string_value": "3"}}})

    def read(parameters: str = "", **values: list[object]) -> object:
        return read_request(values.get, parameters, settings)

    cases: list[tuple[str, dict[str, list[object]], str]] = [
        ("", {}, "text_input: is missing"),
        ("", {"text_input": [b"x"], "input_ids": [1]}, "not both"),
        ("", {"text_input": [b"\xff"]}, "must be UTF-8"),
        ("", {"text_input": [b"x", b"y"]}, "must have one element, got 2"),
        ("", {"input_ids": [1, 2, 3, 4]}, "at most 3 tokens"),
        ("", {"text_input": [b"x"], "sampling_parameters": [b"[1]"]}, "must be a JSON object"),
        ('{"seed": 1}', {"text_input": [b"x"], "sampling_parameters": [b'{"seed": 1}']}, "seed: is given twice"),
    ]
    for parameters, values, message in cases:
        with pytest.raises(RequestError, match=message):
            read(parameters, **values)


@pytest.mark.parametrize(("name", "value"), [("slot", "8"), ("slots", "many"), ("slots", "0")])
def test_impossible_settings_are_named(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"config.pbtxt: parameter '{name}'"):
        read_settings({"parameters": {name: {"string_value": value}}})


def test_requests_that_warm_the_model_up_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.pbtxt: model_warmup: expected none"):
        read_settings({"model_warmup": [{"name": "one"}]})


def test_every_parameter_of_a_repository_is_a_setting_of_the_server() -> None:
    assert set(SETTINGS) <= set(Settings.model_fields)
