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


@dataclass(frozen=True)
class TokenTable:
    """A byte-level BPE as llama.cpp reads it.

    Attributes:
        tokens: one for each row of the embedding; rows without one are called `[PADi]`, as its converter does.
        types: of each token: normal, control, user-defined or unused.
        merges: in order of rank, the two parts separated by a space.
        eos_id: end of text, or None.
        eot_id: another id that ends a text, which llama.cpp calls end of turn, or None; it has room for no more.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos_id: int | None
    eot_id: int | None = None


def token_table(tokenizer: Tokenizer, config: MambaConfig) -> TokenTable:
    """The tables of a byte-level BPE that splits text as GPT-2 does, which is llama.cpp's pre-tokenizer `gpt-2`.

    Raises:
        TokenizerError: it is of another kind, or would split text differently.
    """
    raw: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model, before = raw["model"], raw["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        raise TokenizerError(f"GGUF: expected a byte-level BPE tokenizer, found {model['type']}")
    splits_as_gpt2 = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    if not splits_as_gpt2 or before.get("add_prefix_space"):
        raise TokenizerError(
            "GGUF: expected the pre-tokenizer ByteLevel with GPT-2's pattern and no prefix space, "
            f"found {json.dumps(before)[:80]}"
        )
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [_UNUSED] * config.vocab_size
    for token, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = token, _NORMAL
    for added in raw["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    # what generation ends at comes from the config, and from the tokenizer where that names nothing
    ends = list(config.eos_token_ids) or [token_id for token_id in (tokenizer.eos_id,) if token_id is not None]
    ends.sort(key=lambda token_id: token_id != tokenizer.eos_id)
    eos_id, eot_id = [*ends, None, None][:2]
    return TokenTable(tokens, types, merges, eos_id, eot_id)


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
