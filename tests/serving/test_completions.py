"""`/v1/completions` beyond one plain prompt; the library is the oracle."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import openai
import pytest

from serving.api.token_texts import TokenTexts
from tests.serving.fixtures import Running
from tests.serving.test_http import JSON, events, post, refusal
from yunmin.language_model import LanguageModel

PROMPT = "def main(argument):\n    Grüße"


@pytest.fixture
def client(running: Running) -> Any:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def completed(running: Running, **body: Any) -> JSON:
    response = post(running, "/v1/completions", {"prompt": PROMPT, "max_tokens": 12, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    answer: JSON = response.json()
    return answer


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_give_what_each_gives_alone(running: Running, model: LanguageModel, as_ids: bool) -> None:
    texts = ["def main(", PROMPT, "x"]
    prompts: list[Any] = [model.encode(text) for text in texts] if as_ids else texts
    answer = completed(running, prompt=prompts)
    expected = [model.generate(text, max_tokens=12, temperature=0) for text in texts]
    assert [choice["text"] for choice in answer["choices"]] == [one.text for one in expected]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == sum(one.prompt_tokens for one in expected)
    assert answer["usage"]["completion_tokens"] == 36


def test_choices_draw_with_one_seed_more_each(running: Running, model: LanguageModel) -> None:
    answer = completed(running, prompt=["def main(", "x"], n=2, temperature=1.0, seed=7)
    expected = [
        model.generate(prompt, max_tokens=12, seed=seed).text for prompt in ("def main(", "x") for seed in (7, 8)
    ]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == len(model.encode("def main(")) + len(model.encode("x"))


def test_choices_without_a_seed_differ(running: Running) -> None:
    answer = completed(running, n=3, temperature=1.0, max_tokens=20)
    assert len({choice["text"] for choice in answer["choices"]}) == 3


def test_streamed_choices_give_what_whole_ones_do(client: openai.OpenAI, running: Running) -> None:
    asked: JSON = {"n": 2, "temperature": 1.0, "seed": 3, "prompt": ["def main(", "x"], "max_tokens": 20}
    whole = completed(running, **asked)
    texts, reasons = [""] * 4, [None] * 4
    chunks: Any = client.completions.create(model="tiny", stream=True, stream_options={"include_usage": True}, **asked)
    *chunks, last = chunks
    for chunk in chunks:
        (choice,) = chunk.choices
        assert chunk.usage is None
        assert reasons[choice.index] is None
        texts[choice.index] += choice.text
        reasons[choice.index] = choice.finish_reason
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == ["length"] * 4
    assert last.choices == []
    assert last.usage.completion_tokens == 80
    assert last.usage.prompt_tokens == whole["usage"]["prompt_tokens"]


def test_best_of_gives_the_most_probable_and_counts_all(running: Running, model: LanguageModel) -> None:
    answer = completed(running, n=2, best_of=4, temperature=1.0, seed=5)

    def mean(seed: int) -> float:
        logprobs = model.generate(PROMPT, max_tokens=12, seed=seed, logprobs=0).logprobs
        assert logprobs is not None
        return sum(logprobs) / len(logprobs)

    best = sorted(range(5, 9), key=mean, reverse=True)[:2]
    expected = [model.generate(PROMPT, max_tokens=12, seed=seed).text for seed in best]
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == 48


def test_echo_begins_with_the_prompt(running: Running, model: LanguageModel) -> None:
    expected = PROMPT + model.generate(PROMPT, max_tokens=12, temperature=0).text
    assert completed(running, echo=True)["choices"][0]["text"] == expected
    assert completed(running, echo=True, prompt=model.encode(PROMPT))["choices"][0]["text"] == expected
    only = completed(running, echo=True, max_tokens=0)
    assert only["choices"][0] == {"index": 0, "text": PROMPT, "logprobs": None, "finish_reason": "length"}
    assert only["usage"]["completion_tokens"] == 0


def prompt_logprobs(model: LanguageModel, ids: list[int]) -> list[float]:
    """By stepping through the prompt."""
    import torch

    found = []
    logits, state = model.prefill(ids[:1])
    for token_id in ids[1:]:
        found.append(float(torch.log_softmax(logits[: model.config.n_tokens], 0)[token_id]))
        logits, state = model.step(token_id, state)
    return found


def test_logprobs_have_openais_shape(running: Running, model: LanguageModel) -> None:
    assert model.tokenizer is not None
    texts = TokenTexts(model.tokenizer)
    expected = model.generate(PROMPT, max_tokens=12, temperature=0, logprobs=3)
    assert expected.logprobs is not None
    assert expected.top_logprobs is not None
    choice = completed(running, logprobs=3)["choices"][0]
    found = choice["logprobs"]
    assert set(found) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert found["tokens"] == [texts.text(token_id) for token_id in expected.token_ids]
    assert found["token_logprobs"] == pytest.approx(expected.logprobs, abs=1e-6)
    for token_id, logprob, top, shown in zip(
        expected.token_ids, expected.logprobs, expected.top_logprobs, found["top_logprobs"], strict=True
    ):
        assert len(shown) <= 4
        assert shown[texts.text(token_id)] == pytest.approx(logprob, abs=1e-6)
        assert max(shown.values()) == pytest.approx(top[0][1], abs=1e-6)
    offsets = found["text_offset"]
    assert offsets[0] == 0
    assert all(a <= b <= len(choice["text"]) for a, b in pairwise(offsets))


def test_echoed_logprobs_are_those_of_the_prompt_read_step_by_step(running: Running, model: LanguageModel) -> None:
    ids = model.encode(PROMPT)
    for prompt in (PROMPT, ids):
        choice = completed(running, prompt=prompt, echo=True, logprobs=2, max_tokens=3)["choices"][0]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(prompt_logprobs(model, ids), abs=1e-4)
        assert len(found["tokens"]) == len(ids) + 3
        for token, offset, after in zip(found["tokens"], found["text_offset"], found["text_offset"][1:], strict=False):
            if "\ufffd" not in token and after - offset == len(token):
                assert choice["text"][offset:after] == token
    only = completed(running, echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert len(only["logprobs"]["tokens"]) == len(ids)
    assert [len(top) for top in only["logprobs"]["top_logprobs"][1:]] == [1] * (len(ids) - 1)


def test_streamed_logprobs_and_echo_join_to_the_whole(running: Running) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 2, "max_tokens": 8, "temperature": 0}
    whole = completed(running, **asked)["choices"][0]
    chunks = [event["choices"][0] for event in events(post(running, "/v1/completions", asked | {"stream": True}))]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == whole["logprobs"][name]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ids_and_strings_end_the_text_before_them(running: Running, model: LanguageModel, stream: bool) -> None:
    ids = model.generate(PROMPT, max_tokens=12, temperature=0).token_ids
    for extra in ({"stop_token_ids": [ids[4]]}, {"stop": model.generate(PROMPT, max_tokens=12, temperature=0).text[3]}):
        expected = model.generate(PROMPT, max_tokens=12, temperature=0, **extra)
        if stream:
            body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "stream": True} | extra
            chunks = [event["choices"][0] for event in events(post(running, "/v1/completions", body))]
            text, reason = "".join(chunk["text"] for chunk in chunks), chunks[-1]["finish_reason"]
        else:
            choice = completed(running, **extra)["choices"][0]
            text, reason = choice["text"], choice["finish_reason"]
        assert (text, reason) == (expected.text, "stop")


def test_penalties_and_biases_are_the_librarys(running: Running, model: LanguageModel) -> None:
    for extra in (
        {"presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"logit_bias": {"70": 8.5, "80": -100}},
        {"ignore_eos": True, "temperature": 1.0, "seed": 4, "min_p": 0.02, "top_k": 30},
    ):
        asked: JSON = {"max_tokens": 30, "temperature": 0} | extra
        assert completed(running, **asked)["choices"][0]["text"] == model.generate(PROMPT, **asked).text


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "maximum": 99}},
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("extra", "matches"),
    [
        ({"regex": "[ab]{3,5}c"}, lambda text: re.fullmatch("[ab]{3,5}c", text)),
        ({"choice": ["yes", "no"]}, lambda text: text in ("yes", "no")),
        ({"grammar": 'start: "x" /[0-9]+/ "y"'}, lambda text: re.fullmatch("x[0-9]+y", text)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
            lambda text: json.loads(text)["n"] <= 99,
        ),
        ({"response_format": {"type": "text"}}, lambda text: text),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_structured_output_matches_what_was_asked(running: Running, path: str, extra: JSON, matches: Any) -> None:
    # penalties keep a random model from writing digits for ever
    body = {"prompt": "x", "max_tokens": 200, "seed": 1, "frequency_penalty": 2.0} | extra
    answer = post(running, path, body).json()
    choice = answer["choices"][0] if path.startswith("/v1") else answer
    assert matches(choice["text"]), choice


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"regex": "("}, "regex"),
        ({"regex": "a", "choice": ["a"]}, "choice"),
        ({"choice": []}, "choice"),
        ({"grammar": "nonsense"}, "grammar"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "response_format"),
        ({"session_position": 1}, "session_position"),
        ({"session_id": "sess_x", "state": "y"}, "state"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"priority": 11}, "priority"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"stop_token_ids": [10_000]}, "stop_token_ids"),
        ({"session_id": "sess_x", "n": 2}, "session_id"),
        ({"session_id": "sess_x", "echo": True}, "echo"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(running: Running, extra: JSON, param: str) -> None:
    refusal(post(running, "/v1/completions", {"prompt": "x", "max_tokens": 4} | extra), 400, param)


def test_a_request_may_shorten_its_own_deadline(running: Running) -> None:
    endless = {"prompt": "x", "max_tokens": 100_000, "temperature": 0, "timeout_s": 0.3}
    assert "0.3 s" in refusal(post(running, "/v1/completions", endless), 504)


def test_a_repeated_prompt_is_not_read_again(running: Running) -> None:
    body = {"prompt": "cached " * 20, "max_tokens": 2, "temperature": 0}
    first = completed(running, **body)
    second = completed(running, **body)
    assert second["choices"] == first["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == second["usage"]["prompt_tokens"]


def test_usage_so_far_in_every_chunk_where_asked(running: Running, model: LanguageModel) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "stream": True, "stream_options": options}
    *chunks, last = events(post(running, "/v1/completions", body))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert {chunk["usage"]["prompt_tokens"] for chunk in [*chunks, last]} == {len(model.encode(PROMPT))}
