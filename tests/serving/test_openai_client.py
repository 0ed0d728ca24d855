from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serving.api.chat_template import BUILT_IN, ChatTemplate
from tests.serving.fixtures import Running
from yunmin.language_model import LanguageModel


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_completion(client: openai.OpenAI, model: LanguageModel) -> None:
    answer = client.completions.create(model="tiny", prompt="def main(", max_tokens=9, temperature=0, user="someone")
    expected = model.generate("def main(", max_tokens=9, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == "tiny"
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == 9 + expected.prompt_tokens


def chat_prompt(*messages: tuple[str, str]) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    return ChatTemplate(BUILT_IN["chatml"][0], {}).render(conversation)


def test_a_chat_streams_while_it_is_generated(client: openai.OpenAI, running: Running, model: LanguageModel) -> None:
    messages: Any = [{"role": "user", "content": "Grüße?"}]
    expected = model.generate(chat_prompt(("user", "Grüße?")), max_tokens=30, temperature=0).text
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=30, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected
    endless = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=100_000, temperature=0, stream=True, stop=[]
    )
    assert next(iter(endless)).choices[0].delta.role == "assistant"
    assert running.metric("yunmin_running_sequences") == 1
    endless.close()
    running.wait_for("yunmin_running_sequences", 0)


def test_responses_go_on_after_one_another(client: openai.OpenAI, model: LanguageModel) -> None:
    options: Any = {"model": "tiny", "max_output_tokens": 10, "temperature": 0}
    first = client.responses.create(input="One", **options)
    with client.responses.stream(input="Two", previous_response_id=first.id, **options) as stream:
        events = list(stream)
    prompt = chat_prompt(("user", "One"), ("assistant", first.output_text), ("user", "Two"))
    expected = model.generate(prompt, max_tokens=10, temperature=0).text
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    last = events[-1]
    assert last.type == "response.incomplete"  # as OpenAI's, where the limit has ended it
    assert last.response.output_text == expected
    with client.responses.stream(input="x", model="tiny", extra_body={"choice": ["yes"]}) as stream:
        assert stream.get_final_response().output_text == "yes"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_a_session_passes_as_extra_body(client: openai.OpenAI, model: LanguageModel) -> None:
    session: Any = client.post("/sessions", body={"prompt": "def main("}, cast_to=object)
    answer = client.completions.create(
        model="tiny", prompt="", max_tokens=6, temperature=0, extra_body={"session_id": session["id"]}
    )
    assert answer.choices[0].text == model.generate("def main(", max_tokens=6, temperature=0).text
    assert answer.model_extra is not None
    assert answer.model_extra["session"]["position"] == session["position"] + 6


def test_completion_has_the_default_length_of_openai(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="def main(", temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_prompts_as_a_list_with_one_text_and_as_ids(client: openai.OpenAI, model: LanguageModel) -> None:
    texts = {
        client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0).choices[0].text
        for prompt in ("def main(", ["def main("], model.encode("def main("))
    }
    assert texts == {model.generate("def main(", max_tokens=8, temperature=0).text}


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream(client: openai.OpenAI, model: LanguageModel, include_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if include_usage else {}
    params: dict[str, Any] = {"max_tokens": 40, "temperature": 0.9, "seed": 5, "top_p": 0.95}
    chunks = list(client.completions.create(model="tiny", prompt="Grüße", stream=True, **params, **options))
    expected = model.generate("Grüße", **params)
    usage = chunks.pop() if include_usage else None
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert len({chunk.id for chunk in chunks}) == 1
    if usage is not None:
        assert usage.choices == []
        assert usage.usage is not None
        assert usage.usage.completion_tokens == len(expected.token_ids)


def test_sampling_fields_beyond_openai_pass_as_extra_body(client: openai.OpenAI, model: LanguageModel) -> None:
    extra = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.4}
    answer = client.completions.create(model="tiny", prompt="ağaç", max_tokens=20, seed=1, extra_body=extra)
    expected = model.generate("ağaç", max_tokens=20, seed=1, top_k=5, min_p=0.05, repetition_penalty=1.4)
    assert answer.choices[0].text == expected.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", 5),
        ("best_of", 0),
        ("logprobs", 21),
        ("suffix", "end"),
        ("presence_penalty", 2.5),
        ("frequency_penalty", -2.5),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"9999": 1}),
        ("max_tokens", -1),
        ("prompt", ""),
        ("prompt", ["a", ""]),
        ("prompt", ["a", 1]),
        ("prompt", []),
        ("prompt", [[]]),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_what_is_unsupported_or_impossible_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4} | {field: value}
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**arguments)
    assert refused.value.param == field
    assert field in refused.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 1),
        ("best_of", 1),
        ("echo", False),
        ("logprobs", None),
        ("presence_penalty", 0),
        ("logit_bias", {}),
        ("suffix", ""),
    ],
)
def test_neutral_values_are_accepted(client: openai.OpenAI, field: str, value: Any) -> None:
    arguments: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 4} | {field: value}
    assert client.completions.create(**arguments).choices


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="tiny") as refused:
        client.completions.create(model="gpt", prompt="x")
    assert refused.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    assert [entry.id for entry in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
