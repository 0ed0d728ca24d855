"""From messages to the text that a chat model reads, by Hugging Face's conventions for chat templates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from yunmin.errors import ConfigError, RequestError, TokenizerError
from yunmin.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer

Messages = Sequence[Mapping[str, Any]]

_CONFIG_FILE = "tokenizer_config.json"
_CHATML_END = "<|im_end|>"
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# for models that know no chat; ends before the blank, which most tokenizers join with the word behind it
_PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
BUILT_IN: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (_CHATML, (_CHATML_END,)),
    "plain": (_PLAIN, ("\nUser:", "\nSystem:", "\nTool:")),
}


class ChatTemplate:
    """A compiled template.

    Args:
        source: in Jinja, as `transformers` has them.
        tokens: special tokens by name (`bos_token`, `eos_token`, ...), as the template sees them.
        stop: text that ends a turn.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], stop: Sequence[str] = ()) -> None:
        self._template = _environment().from_string(source)
        self._tokens = dict(tokens)
        self.stop = tuple(stop)

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation.

        Args:
            messages: with `role` and `content`.
            add_generation_prompt: whether it shall end where the assistant's next turn begins.

        Raises:
            RequestError: the template refuses them.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._tokens,
            )
        # whatever a template does with messages it does not expect
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RequestError("messages", f"the chat template refuses them: {reason}") from None


def find_template(configured: str, folder: Path) -> ChatTemplate | None:
    """The template that a server uses.

    Args:
        configured: name of a built-in one, or a file; empty takes the model's own.
        folder: of the model.

    Returns:
        The template, or None where none is configured and the model has none.

    Raises:
        ConfigError: there is no such file, or it is no template.
        TokenizerError: the model's own cannot be read.
    """
    settings = _tokenizer_config(folder)
    tokens = _special_tokens(settings)
    if configured in BUILT_IN:
        source, stop = BUILT_IN[configured]
        return ChatTemplate(source, tokens, stop)
    try:
        if configured:
            return _compiled(Path(configured), Path(configured).read_text(encoding="utf-8"), tokens)
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(BUILT_IN)
        raise ConfigError(f"chat template {configured!r}: expected {names} or a file, {error}") from None
    own = folder / CHAT_TEMPLATE_FILE
    if own.is_file():
        return _compiled(own, own.read_text(encoding="utf-8"), tokens)
    named = settings.get("chat_template")
    if isinstance(named, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}.get("default")
    return _compiled(folder / _CONFIG_FILE, named, tokens) if isinstance(named, str) else None


def turn_positions(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Messages, most: int
) -> tuple[list[int], list[int]]:
    """The token ids of a conversation, and where other conversations are likely to part from it.

    Args:
        template: renders it.
        tokenizer: encodes it.
        messages: all of them, the newest one last.
        most: ids that are worth a look; positions in more of them are not looked for.

    Returns:
        The ids, and positions in them: after the system's messages, and after each of the last turns.
    """
    text = template.render(messages)
    encoded = tokenizer.encoding(text)
    ids = list(encoded.ids)
    if len(ids) > most:
        return ids, []
    starts = {begin: index for index, (begin, _) in reversed(list(enumerate(encoded.offsets)))}
    opening = next((n for n, message in enumerate(messages) if message["role"] != "system"), len(messages))
    counts = {opening, *range(max(1, len(messages) - _LAST_TURNS), len(messages) + 1)} - {0}
    found = set()
    for count in counts:
        try:
            part = template.render(messages[:count], add_generation_prompt=False)
        except RequestError:  # a template may want whole turns
            continue
        if text.startswith(part) and len(part) in starts:
            found.add(starts[len(part)])
    return ids, sorted(found - {0})


_LAST_TURNS = 3  # what lies further back was at the end of an earlier request


def _compiled(path: Path, source: str, tokens: Mapping[str, str]) -> ChatTemplate:
    try:
        return ChatTemplate(source, tokens)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{path}: line {error.lineno}: expected a chat template, {error.message}") from None


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: expected JSON, {error}") from None
    return settings if isinstance(settings, dict) else {}


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what is trained on; for rendering it is nothing but its content."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)
