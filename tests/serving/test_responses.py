"""`/v1/responses`; the oracle is the library, given the text that the template renders."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from starlette.applications import Starlette

from serving.api.chat_template import BUILT_IN, ChatTemplate
from tests.serving.apps import JSON, error_of, http_client, openai_client, serving
from yunmin.errors import YunminError
from yunmin.language_model import LanguageModel

PATH = "/v1/responses"
GREEDY: JSON = {"max_output_tokens": 8, "temperature": 0}


def answer_to(model: LanguageModel, *messages: tuple[str, str], count: int = 8) -> str:
    """What the library answers to a conversation."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    prompt = ChatTemplate(BUILT_IN["chatml"][0], {}).render(conversation)
    return model.generate(prompt, max_tokens=count, temperature=0).text


def respond(model: LanguageModel, body: Any, **variables: str) -> None:
    serving(model, body, **({"CHAT_TEMPLATE": "chatml"} | variables))


@pytest.mark.parametrize(
    "given",
    [
        "Grüße?",
        [{"role": "user", "content": "Grüße?"}],
        [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Grüße?"}]}],
    ],
)
def test_a_response_answers_what_the_library_does(model: LanguageModel, given: Any) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            response = await client.responses.create(
                model="tiny", input=given, instructions="Be brief.", metadata={"a": "b"}, **GREEDY
            )
        expected = answer_to(model, ("system", "Be brief."), ("user", "Grüße?"))
        assert response.output_text == expected
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.metadata == {"a": "b"}
        assert response.usage is not None
        assert response.usage.output_tokens == 8
        assert response.usage.total_tokens == 8 + response.usage.input_tokens

    respond(model, body)


def test_a_response_goes_on_after_another_as_often_as_one_likes(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            first = await client.responses.create(model="tiny", input="One", **GREEDY)
            branches = [
                await client.responses.create(model="tiny", input=text, previous_response_id=first.id, **GREEDY)
                for text in ("Two", "Three", "Two")
            ]
            third = await client.responses.create(
                model="tiny", input="Four", previous_response_id=branches[1].id, **GREEDY
            )
        history = [("user", "One"), ("assistant", first.output_text)]
        for text, branch in zip(("Two", "Three", "Two"), branches, strict=True):
            assert branch.output_text == answer_to(model, *history, ("user", text))
        history += [("user", "Three"), ("assistant", branches[1].output_text)]
        assert third.output_text == answer_to(model, *history, ("user", "Four"))
        assert len({first.id, third.id, *(branch.id for branch in branches)}) == 5

    respond(model, body)


def test_responses_after_the_same_one_draw_apart_unless_they_name_a_seed(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            # a text that the model can spell in one way only, so that its state is gone on with
            first = (await client.post(PATH, json={"input": "One", "choice": ["x"]})).json()
            asked = {"input": "Two", "previous_response_id": first["id"], "max_output_tokens": 12}
            found = [(await client.post(PATH, json=asked | seed)).json() for seed in ({}, {}, {"seed": 5}, {"seed": 5})]
        assert all(response["usage"]["input_tokens_details"]["cached_tokens"] for response in found)
        texts = [response["output"][0]["content"][0]["text"] for response in found]
        assert texts[0] != texts[1]
        assert texts[2] == texts[3]

    respond(model, body, CACHE_BYTES="0")


def test_a_session_whose_ids_begin_the_conversation_is_gone_on_with(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            # one letter between other kinds of characters: the model can spell it in one way only
            first = (await client.post(PATH, json={"input": "One", "choice": ["x"]})).json()
            asked = GREEDY | {"input": "Two", "previous_response_id": first["id"]}
            second = (await client.post(PATH, json=asked)).json()
        usage = first["usage"]
        cached = second["usage"]["input_tokens_details"]["cached_tokens"]
        assert cached == usage["input_tokens"] + usage["output_tokens"]
        expected = answer_to(model, ("user", "One"), ("assistant", "x"), ("user", "Two"))
        assert second["output"][0]["content"][0]["text"] == expected

    respond(model, body, CACHE_BYTES="0")


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_stream_has_openais_events_and_ends_with_the_whole(model: LanguageModel, logprobs: bool) -> None:
    async def body(app: Starlette) -> None:
        extra: JSON = {"include": ["message.output_text.logprobs"], "top_logprobs": 2} if logprobs else {}
        async with openai_client(app) as client:
            stream = await client.responses.create(model="tiny", input="Grüße?", stream=True, **GREEDY, **extra)
            events: list[Any] = [event async for event in stream]
            kept = await client.responses.retrieve(events[0].response.id)
        names = [event.type for event in events]
        deltas = [event for event in events if event.type == "response.output_text.delta"]
        assert names[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert names[4:-4] == ["response.output_text.delta"] * len(deltas)
        assert names[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.incomplete",
        ]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        text = answer_to(model, ("user", "Grüße?"))
        assert "".join(event.delta for event in deltas) == text
        assert events[-4].text == text
        whole = events[-1].response
        assert whole.output_text == text
        assert whole.id == events[0].response.id
        assert len({event.item_id for event in deltas}) == 1
        if logprobs:
            assert sum(len(event.logprobs) for event in deltas) == 8
            assert len(whole.output[0].content[0].logprobs) == 8
        assert kept.output_text == text
        assert kept.usage == whole.usage

    respond(model, body)


def test_a_text_that_ends_by_itself_is_completed(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        asked: JSON = {"input": "x", "stream": True, "stop": answer_to(model, ("user", "x"))[2]} | GREEDY
        async with http_client(app) as client:
            streamed = (await client.post(PATH, json=asked)).text
        assert "event: response.completed\n" in streamed
        assert "[DONE]" not in streamed

    respond(model, body)


def test_kept_responses_are_shown_and_deleted(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with openai_client(app) as client:
            first = await client.responses.create(model="tiny", input="One", **GREEDY)
            second = await client.responses.create(model="tiny", input="Two", previous_response_id=first.id, **GREEDY)
            assert await client.responses.retrieve(first.id) == first
            await client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(first.id)
            with pytest.raises(openai.BadRequestError) as refused:
                await client.responses.create(model="tiny", input="x", previous_response_id=first.id)
            assert refused.value.code == "previous_response_not_found"
            assert refused.value.param == "previous_response_id"
            # what came after it stays
            assert (await client.responses.retrieve(second.id)).output_text == second.output_text

    respond(model, body)


@pytest.mark.parametrize("previous", [False, True])
def test_a_response_that_is_not_stored_leaves_nothing(model: LanguageModel, previous: bool) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            asked: JSON = {"input": "One", "store": False} | GREEDY
            history: list[tuple[str, str]] = []
            if previous:
                first = (await client.post(PATH, json=asked | {"store": True})).json()
                asked |= {"previous_response_id": first["id"]}
                history = [("user", "One"), ("assistant", first["output"][0]["content"][0]["text"])]
            before = (await client.get("/v1/sessions")).json()
            answer = (await client.post(PATH, json=asked)).json()
            assert answer["store"] is False
            assert answer["output"][0]["content"][0]["text"] == answer_to(model, *history, ("user", "One"))
            error_of(await client.get(f"{PATH}/{answer['id']}"), 404)
            assert (await client.get("/v1/sessions")).json() == before

    respond(model, body)


def test_a_response_that_fails_leaves_nothing_and_no_clean_end(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(app: Starlette) -> None:
        engine = app.state.backend.engine
        step = engine._runtime.step
        calls = 0

        def breaking(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise YunminError("a broken kernel")
            return step(*arguments)

        monkeypatch.setattr(engine._runtime, "step", breaking)
        async with http_client(app) as client:
            streamed = (await client.post(PATH, json={"input": "One", "stream": True} | GREEDY)).text
            *_, last, rest = streamed.split("\n\n")
            assert rest == ""
            assert last.startswith("event: error\ndata: ")
            assert "a broken kernel" in last
            assert "response.completed" not in streamed
            error_of(await client.post(PATH, json={"input": "One"} | GREEDY), 500)
            assert (await client.get("/v1/sessions")).json()["data"] == []

    respond(model, body)


def test_the_text_keeps_to_a_schema_in_the_words_of_responses(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
        form = {"type": "json_schema", "name": "a", "schema": schema | {"additionalProperties": False}, "strict": True}
        asked = {"input": "x", "text": {"format": form}, "seed": 1, "frequency_penalty": 2, "max_output_tokens": 200}
        async with http_client(app) as client:
            answer = (await client.post(PATH, json=asked)).json()
        text = "".join(answer["output"][0]["content"][0]["text"].split())
        assert text in ('{"ok":true}', '{"ok":false}')
        assert answer["text"]["format"] == form

    respond(model, body)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"previous_response_id": "nothing"}, "previous_response_id"),
        ({"session_id": "sess_0"}, "session_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"background": True}, "background"),
        ({"timeout_s": -1.0}, "timeout_s"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"max_output_tokens": 0.5}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "x"}}}}, "text"),
    ],
)
def test_a_bad_field_is_refused_by_name(model: LanguageModel, change: JSON, param: str) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            error = error_of(await client.post(PATH, json={"input": "x"} | GREEDY | change), 400)
        assert error["param"] == param
        assert param in error["message"]

    respond(model, body)


def test_without_a_template_there_are_no_responses(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            error = error_of(await client.post(PATH, json={"input": "x"}), 400)
        assert error["code"] == "no_chat_template"

    serving(model, body)
