"""Text to token ids and back, on the `tokenizers` library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from yunmin.errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE_FILE)
_BYTES = 256
# characters from where on other threads shall not wait: the library holds the interpreter's lock unless it gets a batch
_LONG_TEXT = 4096


class Tokenizer:
    """A `tokenizer.json`, with the end-of-text token that separates documents.

    Attributes:
        backend: the library's own object.
        eos_id: id of the end-of-text token, or None.
    """

    def __init__(self, backend: tokenizers.Tokenizer, eos_token: str | None = END_OF_TEXT) -> None:
        self.backend = backend
        self.eos_id: int | None = backend.token_to_id(eos_token) if eos_token else None
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer | None:
        """The tokenizer beside a checkpoint, or None where there is no `tokenizer.json`.

        Raises:
            TokenizerError: the file is damaged.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
            raise TokenizerError(f"{path}: expected a tokenizer.json, {error}") from None
        return cls(backend, _configured_eos(path.with_name("tokenizer_config.json")) or END_OF_TEXT)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Trains a byte-level BPE, which can represent every text.

        Args:
            texts: to learn merges from.
            vocab_size: ids in all, the 256 bytes and the end-of-text token included.

        Raises:
            TokenizerError: the vocabulary has no room for the bytes.
        """
        if vocab_size < _BYTES + 1:
            raise TokenizerError(f"vocab_size must be at least {_BYTES + 1} for a byte-level BPE, got {vocab_size}")
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return list(self.encoding(text).ids)

    def encoding(self, text: str) -> tokenizers.Encoding:
        """The library's own result, with the place of each token in the text."""
        if len(text) < _LONG_TEXT:
            return self.backend.encode(text, add_special_tokens=False)
        return self.backend.encode_batch([text], add_special_tokens=False)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(e.ids) for e in self.backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out, incomplete characters become U+FFFD."""
        return self.backend.decode(list(token_ids), skip_special_tokens=True)

    def is_shown(self, token_id: int) -> bool:
        """Whether `decode` reads an id at all: it passes over special tokens and ids without a token."""
        return token_id not in self._special_ids and self.backend.id_to_token(token_id) is not None

    def save(self, folder: str | Path) -> None:
        """Writes `tokenizer.json` and what `transformers` needs beside it."""
        self.backend.save(str(Path(folder) / "tokenizer.json"))
        eos = None if self.eos_id is None else self.backend.id_to_token(self.eos_id)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "clean_up_tokenization_spaces": False,
        }
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copies tokenizer files as they are; returns their names."""
    names = [name for name in _FILES if (Path(source) / name).is_file()]
    for name in names:
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


def _configured_eos(path: Path) -> str | None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: expected JSON, {error}") from None
    eos = settings.get("eos_token") if isinstance(settings, dict) else None
    content = eos.get("content") if isinstance(eos, dict) else eos
    if content is not None and not isinstance(content, str):
        raise TokenizerError(f"{path}: expected eos_token to be a string, found {content!r}")
    return content
