"""The tokenizer's section of a GGUF file: tokens, their types, merges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from yunmin.config import MambaConfig
from yunmin.errors import TokenizerError
from yunmin.tokenizer import Tokenizer

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
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    eos_id: int | None


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
    eos_id = tokenizer.eos_id if tokenizer.eos_id is not None else next(iter(config.eos_token_ids), None)
    return TokenTable(tokens, types, merges, eos_id)
