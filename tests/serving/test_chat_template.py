from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from serving.api.chat_template import BUILT_IN, ChatTemplate, find_template, turn_positions
from yunmin.errors import ConfigError, RequestError
from yunmin.tokenizer import Tokenizer, copy_tokenizer

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Grüße</b> aus 東京?"},
    {"role": "assistant", "content": "  Ja.  "},
    {"role": "user", "content": "Warum?"},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
# what templates of well-known models use
TEMPLATES = [
    BUILT_IN["chatml"][0],
    BUILT_IN["plain"][0],
    """{{ bos_token }}
    {%- for message in messages %}
        {%- if message['role'] == 'user' %}
            {{- '[INST] ' + message['content'] + ' [/INST]' }}
        {%- elif loop.first and not tools %}
            {%- set system = message.content %}
            {{- system | trim | tojson }}
        {%- else %}
            {% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}
        {%- endif %}
        {%- if loop.index0 > 7 %}{% break %}{% endif %}
    {%- endfor %}
    {%- if add_generation_prompt %}{{ 'A:' }}{% endif %}
""",
    """{% set ns = namespace(n=0) %}
    {% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson(indent=1) }}{% endfor %}""",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_rendered_conversation_equals_that_of_transformers(source: str, add_generation_prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[CONVERSATION],
        chat_template=source,
        add_generation_prompt=add_generation_prompt,
        **TOKENS,
    )
    rendered = ChatTemplate(source, TOKENS).render(CONVERSATION, add_generation_prompt=add_generation_prompt)
    assert rendered == expected[0]


def test_strftime_now_is_there() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([]).isdecimal()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_what_a_template_refuses_is_a_bad_request(source: str, expected: str) -> None:
    with pytest.raises(RequestError, match=expected) as refused:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert refused.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set messages[0].role = 'x' %}",
    ],
)
def test_a_template_reaches_nothing_but_the_messages(source: str) -> None:
    with pytest.raises((RequestError, Exception), match=r"unsafe|immutable|append|expected token") as refused:
        ChatTemplate(source, {}).render(CONVERSATION)
    assert "object at" not in str(refused.value)


def folder_with(tmp_path: Path, settings: Any, jinja: str | None = None) -> Path:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return tmp_path


def rendered(template: ChatTemplate | None) -> str:
    assert template is not None
    return template.render([{"role": "user", "content": "x"}])


def test_the_models_own_template_is_found_in_its_file_and_in_its_settings(tmp_path: Path) -> None:
    own = "{{ bos_token }}{{ messages[0].content }}"
    settings = {"chat_template": own, "bos_token": {"content": "<s>", "lstrip": False}, "model_max_length": 5}
    assert rendered(find_template("", folder_with(tmp_path, settings))) == "<s>x"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": own}]
    assert rendered(find_template("", folder_with(tmp_path, settings | {"chat_template": several}))) == "<s>x"
    assert rendered(find_template("", folder_with(tmp_path, settings, "{{ eos_token }}file"))) == "file"


def test_a_configured_template_goes_before_the_models_own(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, {"eos_token": "</s>"}, "own")
    assert rendered(find_template("chatml", folder)) == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(find_template("plain", folder)) == "User: x\nAssistant:"
    (tmp_path / "mine.jinja").write_text("{{ eos_token }}mine")
    assert rendered(find_template(str(tmp_path / "mine.jinja"), folder)) == "</s>mine"


def test_a_model_without_template_has_none(tmp_path: Path) -> None:
    assert find_template("", tmp_path) is None
    assert find_template("", folder_with(tmp_path, {"eos_token": "</s>"})) is None


def test_a_configured_template_that_is_none_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat template 'nothing': expected chatml, plain or a file, .*nothing"):
        find_template("nothing", tmp_path)
    broken = tmp_path / "broken.jinja"
    broken.write_text("\n{% for %}")
    with pytest.raises(ConfigError, match=r"broken.jinja: line 2: expected a chat template"):
        find_template(str(broken), tmp_path)


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_turns_end_where_shorter_conversations_end(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate(BUILT_IN[name][0], {})
    ids, positions = turn_positions(template, tokenizer, CONVERSATION, 1000)
    assert ids == tokenizer.encode(template.render(CONVERSATION))
    prefixes = {
        tuple(tokenizer.encode(template.render(CONVERSATION[:n], add_generation_prompt=False)))
        for n in range(1, len(CONVERSATION) + 1)
    }
    found = {tuple(ids[:position]) for position in positions}
    assert found <= prefixes
    assert len(found) == len(prefixes)


def test_turns_of_a_template_that_wants_whole_ones_are_passed_over(tokenizer: Tokenizer) -> None:
    source = "{% if messages | length < 4 %}{{ raise_exception('more') }}{% endif %}{{ messages[0].content }}"
    ids, positions = turn_positions(ChatTemplate(source, {}), tokenizer, CONVERSATION, 1000)
    assert ids == tokenizer.encode("Be brief.")
    assert positions == []


def test_a_template_file_goes_where_the_tokenizer_goes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("from", "to"):
        (tmp_path / name).mkdir()
    tokenizer.save(tmp_path / "from")
    (tmp_path / "from" / "chat_template.jinja").write_text("x")
    assert "chat_template.jinja" in copy_tokenizer(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == "x"
