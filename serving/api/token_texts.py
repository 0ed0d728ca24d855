"""Single tokens as text and bytes, for answers that show them one by one."""

from __future__ import annotations

from tokenizers import decoders

from yunmin.tokenizer import Tokenizer


class TokenTexts:
    """What each token of a vocabulary looks like by itself; remembered once asked for.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")  # some tokenizers drop the blank before a text's first word
        self._anchor_text = tokenizer.decode(self._anchor)
        self._is_byte_level = _has_byte_level(tokenizer)
        self._texts: dict[int, str] = {}

    def text(self, token_id: int) -> str:
        """As it reads within a text; U+FFFD for a part of a character, its name for a special token."""
        if token_id not in self._texts:
            self._texts[token_id] = self._find(token_id)
        return self._texts[token_id]

    def bytes(self, token_id: int) -> list[int] | None:
        """UTF-8 of its text; None where it is a part of a character and the tokenizer does not say which."""
        if self._is_byte_level and self._tokenizer.is_shown(token_id):
            token = self._tokenizer.backend.id_to_token(token_id)
            if token is not None and all(char in _BYTES for char in token):
                return [_BYTES[char] for char in token]
        text = self.text(token_id)
        return None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())

    def _find(self, token_id: int) -> str:
        if not self._tokenizer.is_shown(token_id):
            return self._tokenizer.backend.id_to_token(token_id) or ""
        return self._tokenizer.decode([*self._anchor, token_id])[len(self._anchor_text) :]


def _has_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.backend.decoder, decoders.ByteLevel)


def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: each byte as one printable character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_of_char()
