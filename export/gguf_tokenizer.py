"""The tokenizer's section of a GGUF file: tokens, their types, merges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yunmin.config import MambaConfig
from yunmin.errors import TokenizerError
from yunmin.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer

# gguf.TokenType, which cannot be imported where the package is missing
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_END_ROLES = ("eos", "eot", "eom")  # what llama.cpp ends a text at: end of text, of turn, of message
_REFUSED = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")  # of a BPE, where not false or empty


@dataclass(frozen=True)
class TokenTable:
    """A byte-level BPE as llama.cpp reads it.

    Attributes:
        tokens: one for each row of the embedding; ids without one are called `[PADi]`, as its converter does.
        types: of each token: normal, control, user-defined or unused.
        merges: in order of rank, the two parts separated by a space.
        end_ids: what ends a text, by llama.cpp's roles.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    end_ids: dict[str, int]


def token_table(tokenizer: Tokenizer, config: MambaConfig) -> TokenTable:
    """The tables of a byte-level BPE that splits text as GPT-2 does, which is llama.cpp's pre-tokenizer `gpt-2`.

    NFC is the one normalizer that is let pass, as llama.cpp's converter does: published models have it, and nearly all
    text is in that form already.

    Raises:
        TokenizerError: it is of another kind, or would split text differently; or more ids end a text than llama.cpp
            has places for.
    """
    raw: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model, before, normalizer = raw["model"], raw["pre_tokenizer"] or {}, raw["normalizer"]
    if model["type"] != "BPE":
        raise TokenizerError(f"GGUF: expected a byte-level BPE tokenizer, found {model['type']}")
    splits_as_gpt2 = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    if not splits_as_gpt2 or before.get("add_prefix_space"):
        raise TokenizerError(
            "GGUF: expected the pre-tokenizer ByteLevel with GPT-2's pattern and no prefix space, "
            f"found {json.dumps(before)[:80]}"
        )
    if normalizer is not None and normalizer["type"] != "NFC":
        raise TokenizerError(f"GGUF: expected no normalizer but NFC, found {json.dumps(normalizer)[:80]}")
    for option in _REFUSED:
        if model.get(option):
            raise TokenizerError(f"GGUF: llama.cpp's pre-tokenizer gpt-2 has no {option}, found {model[option]!r}")
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    for token, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = token, _NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return TokenTable(tokens, types, merges, _end_ids(tokenizer, config))


def _end_ids(tokenizer: Tokenizer, config: MambaConfig) -> dict[str, int]:
    """What generation ends at, from the config, and from the tokenizer where that names nothing; the latter's first."""
    ends = list(config.eos_token_ids) or [token_id for token_id in (tokenizer.eos_id,) if token_id is not None]
    ends.sort(key=lambda token_id: token_id != tokenizer.eos_id)
    if len(ends) > len(_END_ROLES):
        raise TokenizerError(
            f"GGUF: llama.cpp has places for {len(_END_ROLES)} ids that end a text, found {len(ends)} in eos_token_id"
        )
    return dict(zip(_END_ROLES, ends, strict=False))


def chat_template_of(folder: str | Path) -> str | None:
    """The Jinja source of a model's own chat template: the file's, else the default one in `tokenizer_config.json`.

    Raises:
        TokenizerError: a file cannot be read.
    """
    own, settings = Path(folder) / CHAT_TEMPLATE_FILE, Path(folder) / "tokenizer_config.json"
    try:
        if own.is_file():
            return own.read_text(encoding="utf-8")
        raw = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{folder}: expected a chat template or tokenizer_config.json, {error}") from None
    named = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(named, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, dict)}.get("default")
    return named if isinstance(named, str) else None
