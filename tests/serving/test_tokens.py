from __future__ import annotations

from typing import Any

import pytest
from starlette.applications import Starlette

from serving.api.chat_template import BUILT_IN, ChatTemplate
from serving.api.token_texts import TokenTexts
from tests.serving.apps import JSON, error_of, http_client, serving
from yunmin.language_model import LanguageModel
from yunmin.tokenizer import Tokenizer

TEXT = "def main():\n  Grüße 🙂 東京"


def test_tokens_of_a_text_are_the_librarys_and_come_back_as_the_text(model: LanguageModel) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            answer = (await client.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
            back = (await client.post("/detokenize", json={"tokens": answer["tokens"]})).json()
            assert (await client.post("/tokenize", json={"prompt": ""})).json()["tokens"] == []
            assert (await client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        assert answer["tokens"] == model.encode(TEXT)
        assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
        assert answer["max_model_len"] == 32_768 + 1000
        assert back == {"prompt": TEXT}

    serving(model, body)


def test_tokens_of_a_conversation_are_those_of_its_template(model: LanguageModel) -> None:
    messages: list[Any] = [{"role": "user", "content": "x"}]

    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            answer = (await client.post("/tokenize", json={"messages": messages})).json()
        text = ChatTemplate(BUILT_IN["plain"][0], {}).render(messages)
        assert answer["tokens"] == model.encode(text)

    serving(model, body, CHAT_TEMPLATE="plain")


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("/tokenize", {"prompt": "x", "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"prompt": "x" * 5000}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10_000]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
    ],
)
def test_a_bad_field_is_refused_by_name(model: LanguageModel, path: str, asked: JSON, param: str) -> None:
    async def body(app: Starlette) -> None:
        async with http_client(app) as client:
            assert error_of(await client.post(path, json=asked), 400)["param"] == param

    serving(model, body, MAX_PROMPT_TOKENS="1000", CHAT_TEMPLATE="plain")


def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode(TEXT)
    assert b"".join(bytes(texts.bytes(i) or []) for i in ids) == TEXT.encode()
    assert tokenizer.eos_id is not None
    assert texts.text(tokenizer.eos_id) == "<|endoftext|>"
    assert texts.bytes(tokenizer.eos_id) == list(b"<|endoftext|>")
    assert texts.text(10_000) == ""
