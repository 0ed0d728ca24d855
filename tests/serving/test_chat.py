"""`/v1/chat/completions`; the oracle is the library, given the text that the template renders."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from starlette.applications import Starlette

from serving.api.chat_template import BUILT_IN, ChatTemplate
from serving.api.token_texts import TokenTexts
from tests.serving.apps import JSON, error_of, events_of, http_client, openai_client, serving
from yunmin.language_model import LanguageModel

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße aus 東京?"},
]
PATH = "/v1/chat/completions"
GREEDY: JSON = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0}


def prompt(messages: list[Any], name: str = "chatml") -> str:
    return ChatTemplate(BUILT_IN[name][0], {}).render(messages)


def test_a_chat_answers_what_the_library_does(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            answer = await client.chat.completions.create(model="tiny", **GREEDY)
        expected = model.generate(prompt(MESSAGES), max_tokens=12, temperature=0)
        (choice,) = answer.choices
        assert choice.message.role == "assistant"
        assert choice.message.content == expected.text
        assert choice.finish_reason == expected.finish_reason
        assert choice.logprobs is None
        assert answer.object == "chat.completion"
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == expected.prompt_tokens
        assert answer.usage.completion_tokens == 12

    serving(model, body, CHAT_TEMPLATE="chatml")


@pytest.mark.parametrize("include_usage", [False, True])
def test_a_streamed_chat_joins_to_the_whole(model: LanguageModel, include_usage: bool) -> None:
    async def body(app: Starlette) -> None:
        options: JSON = {"stream_options": {"include_usage": True}} if include_usage else {}
        asked: JSON = {"messages": MESSAGES, "max_completion_tokens": 20, "n": 2, "seed": 4, "temperature": 1.0}
        async with openai_client(app) as client:
            whole = await client.chat.completions.create(model="tiny", **asked)
            stream = await client.chat.completions.create(model="tiny", stream=True, **asked, **options)
            chunks = [chunk async for chunk in stream]
        last = chunks.pop() if include_usage else None
        texts, roles = ["", ""], [0, 0]
        reasons: list[Any] = [None, None]
        for chunk in chunks:
            assert chunk.object == "chat.completion.chunk"
            (choice,) = chunk.choices
            roles[choice.index] += choice.delta.role == "assistant"
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
        assert texts == [choice.message.content for choice in whole.choices]
        assert reasons == ["length", "length"]
        assert roles == [1, 1]
        assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant", "assistant"]
        if last is not None:
            assert last.choices == []
            assert last.usage is not None
            assert last.usage.completion_tokens == 40

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_logprobs_have_the_shape_of_chats(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        asked: JSON = GREEDY | {"logprobs": True, "top_logprobs": 2}
        async with openai_client(app) as client:
            answer = await client.chat.completions.create(model="tiny", **asked)
        async with http_client(app) as client:
            chunks = events_of(await client.post(PATH, json=asked | {"stream": True}))
        expected = model.generate(prompt(MESSAGES), max_tokens=12, temperature=0, logprobs=2)
        assert model.tokenizer is not None
        assert expected.logprobs is not None
        texts = TokenTexts(model.tokenizer)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [entry.token for entry in logprobs.content] == [texts.text(i) for i in expected.token_ids]
        assert [entry.logprob for entry in logprobs.content] == pytest.approx(expected.logprobs, abs=1e-6)
        assert all(len(entry.top_logprobs) == 2 for entry in logprobs.content)
        joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
        assert joined.decode(errors="replace") == expected.text
        streamed = [entry for c in chunks for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
        assert [entry["token"] for entry in streamed] == [entry.token for entry in logprobs.content]

    serving(model, body, CHAT_TEMPLATE="chatml")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Grüße aus 東京?"}],
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": [{"type": "text", "text": "Grüße aus 東京?"}], "name": "me"},
        ],
    ],
)
def test_parts_and_developers_read_as_text_of_the_system(model: LanguageModel, messages: list[Any]) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            answer = (await client.post(PATH, json=GREEDY | {"messages": messages})).json()
        expected = model.generate(prompt(MESSAGES), max_tokens=12, temperature=0)
        assert answer["choices"][0]["message"]["content"] == expected.text

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_an_answer_sent_back_as_the_client_got_it_is_accepted(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            answer = await client.chat.completions.create(model="tiny", **GREEDY)
            again: Any = [*MESSAGES, answer.choices[0].message, {"role": "user", "content": "And?"}]
            second = await client.chat.completions.create(model="tiny", messages=again, max_tokens=5, temperature=0)
        text = answer.choices[0].message.content
        rendered = prompt([*MESSAGES, {"role": "assistant", "content": text}, {"role": "user", "content": "And?"}])
        assert second.choices[0].message.content == model.generate(rendered, max_tokens=5, temperature=0).text

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_a_turn_ends_at_the_templates_mark(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        expected = model.generate(prompt(MESSAGES, "plain"), max_tokens=200, seed=3)
        mark = expected.text[4:6]
        app.state.backend.template.stop = (mark,)
        async with http_client(app) as client:
            asked = {"messages": MESSAGES, "max_tokens": 200, "seed": 3}
            answer = (await client.post(PATH, json=asked)).json()["choices"][0]
            whole = (await client.post(PATH, json=asked | {"ignore_eos": True})).json()["choices"][0]
        assert answer["message"]["content"] == expected.text[: expected.text.index(mark)]
        assert answer["finish_reason"] == "stop"
        assert len(whole["message"]["content"]) >= len(expected.text)

    serving(model, body, CHAT_TEMPLATE="plain")


def test_the_end_of_text_of_the_tokenizer_ends_a_turn(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        assert model.tokenizer is not None
        bias = {str(model.tokenizer.eos_id): 100.0}
        async with http_client(app) as client:
            answer = (await client.post(PATH, json=GREEDY | {"logit_bias": bias})).json()
        assert answer["choices"][0]["message"]["content"] == ""
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 0

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_structured_output_in_openais_words(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema | {"additionalProperties": False}},
        }
        async with openai_client(app) as client:
            answer = await client.chat.completions.create(
                model="tiny", messages=MESSAGES, response_format=form, max_tokens=200, seed=1, frequency_penalty=2
            )
        text = "".join((answer.choices[0].message.content or "").split())
        assert text in ('{"ok":true}', '{"ok":false}')

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_without_a_template_one_error_says_how_to_configure_it(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            with pytest.raises(openai.BadRequestError, match="--chat-template chatml or plain") as refused:
                await client.chat.completions.create(model="tiny", **GREEDY)
        assert refused.value.code == "no_chat_template"
        assert refused.value.param == "messages"

    serving(model, body)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"store": True}, "store"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_completion_tokens": 1001}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"timeout_s": 301}, "timeout_s"),
        ({"model": "other"}, "model"),
        ({"session_id": "sess_x", "n": 2}, "session_id"),
    ],
)
def test_a_bad_field_is_refused_by_name(model: LanguageModel, change: JSON, param: str) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            answer = await client.post(PATH, json=GREEDY | change)
        error = error_of(answer, 404 if param == "model" else 400)
        assert error["param"] == param
        assert param in error["message"]

    serving(model, body, CHAT_TEMPLATE="chatml", MAX_PROMPT_TOKENS="400")


def test_the_next_turn_reads_little_more_than_itself(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            first = (await client.post(PATH, json=GREEDY | {"max_tokens": 1})).json()
            # another question after the same beginning parts from the first one where its turn began
            other = [MESSAGES[0], {"role": "user", "content": "Something else, and longer."}]
            second = (await client.post(PATH, json=GREEDY | {"messages": other})).json()
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        shared = len(model.encode("<|im_start|>system\nBe brief.<|im_end|>\n"))
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= shared
        expected = model.generate(prompt(other), max_tokens=12, temperature=0).text
        assert second["choices"][0]["message"]["content"] == expected

    serving(model, body, CHAT_TEMPLATE="chatml")


async def turn(client: Any, session_id: str, text: str, **more: Any) -> JSON:
    asked = {"messages": [{"role": "user", "content": text}], "max_tokens": 6, "session_id": session_id} | more
    answer = await client.post(PATH, json={"temperature": 0} | asked)
    assert answer.status_code == 200, answer.text
    found: JSON = answer.json()
    return found


def test_a_session_holds_the_conversation(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={})).json()["id"]
            first = await turn(client, session_id, "Hello", seed=1)
            second = await turn(client, session_id, "And?", seed=1)
            texts = [one["choices"][0]["message"]["content"] for one in (first, second)]
            messages = [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": texts[0]},
                {"role": "user", "content": "And?"},
            ]
            # the model goes on after its own spelling of what it has said, which the tokenizer's need not be
            asked = prompt(messages[:1])
            begun = [*model.encode(asked), *model.generate(asked, max_tokens=6, temperature=0).token_ids]
            read = [*begun, *model.encode(prompt(messages)[len(asked + texts[0]) :])]
            assert texts[1] == model.generate(read, max_tokens=6, temperature=0).text
            assert read != model.encode(prompt(messages))
            assert second["usage"]["prompt_tokens"] == len(read)
            assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(begun)
            shown = (await client.get(f"/v1/sessions/{session_id}")).json()
            assert shown["messages"] == [*messages, {"role": "assistant", "content": texts[1]}]
            assert second["session"] == {"id": session_id, "position": shown["position"]}
            refused = error_of(await client.post("/generate", json={"prompt": "x", "session_id": session_id}), 409)
            assert refused["code"] == "wrong_session_kind"

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_a_long_tail_is_refused_however_the_model_has_spelled_what_is_before_it(
    model: LanguageModel,
) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={})).json()["id"]
            await turn(client, session_id, "Hello")
            long = {"messages": [{"role": "user", "content": "x" * 90}], "max_tokens": 1, "session_id": session_id}
            error = error_of(await client.post(PATH, json=long), 400)
            begun = prompt([{"role": "user", "content": "Hello"}])
            said = model.generate(begun, max_tokens=6, temperature=0).text
            whole = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}, *long["messages"]]
            tail = len(model.encode(prompt(whole)[len(begun + said) :]))
            assert error["message"].endswith(f"at most 100 tokens on this server, got {tail}")

    serving(model, body, CHAT_TEMPLATE="chatml", MAX_PROMPT_TOKENS="100")


def test_a_streamed_turn_is_saved_before_its_last_chunk(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={})).json()["id"]
            asked = {"messages": MESSAGES, "max_tokens": 6, "temperature": 0, "session_id": session_id, "stream": True}
            chunks = events_of(await client.post(PATH, json=asked))
            shown = (await client.get(f"/v1/sessions/{session_id}")).json()
        assert chunks[-1]["session"] == {"id": session_id, "position": shown["position"]}
        assert all("session" not in chunk for chunk in chunks[:-1])
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        assert shown["messages"] == [*MESSAGES, {"role": "assistant", "content": text}]

    serving(model, body, CHAT_TEMPLATE="chatml")


def test_a_session_of_text_is_no_conversation(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            session_id = (await client.post("/v1/sessions", json={"prompt": "Once"})).json()["id"]
            refused = error_of(await client.post(PATH, json=GREEDY | {"session_id": session_id}), 409)
            assert "/v1/completions" in refused["message"]

    serving(model, body, CHAT_TEMPLATE="chatml")
