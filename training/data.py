"""What a run learns from and is measured on: documents, packed into sequences of equal length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.config import TrainingConfig
from training.synthetic import synthetic_documents
from yunmin.corpus import Document, read_documents, split_documents
from yunmin.errors import ConfigError, DataError
from yunmin.tokenizer import Tokenizer

SYNTHETIC = "synthetic"
IGNORED = -100  # label of a position that is read and not learned, as torch's cross-entropy has it


@dataclass(frozen=True)
class TokenStream:
    """Documents in a row, the end-of-text token after each.

    Attributes:
        ids: int32 (n,).
        is_target: whether a token is to be learned, bool (n,); prompts are not.
        document: number of the document each token belongs to, int32 (n,).
    """

    ids: Tensor
    is_target: Tensor
    document: Tensor


@dataclass(frozen=True)
class PackedData:
    """Sequences of L + 1 tokens; each begins with the token its predecessor ended with, so that every token is learned.

    Attributes:
        ids: int32 (S, L + 1).
        is_target: bool (S, L + 1).
        documents: first and last document of each sequence, int32 (S, 2).
    """

    ids: Tensor
    is_target: Tensor
    documents: Tensor

    def __len__(self) -> int:
        return self.ids.shape[0]

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some sequences, both int64 (B, L); the label is the next token, or `IGNORED`."""
        ids, is_target = self.ids[rows].long(), self.is_target[rows]
        return ids[:, :-1], ids[:, 1:].masked_fill(~is_target[:, 1:], IGNORED)


@dataclass(frozen=True)
class TrainingData:
    """Training sequences and held-out tokens, which never overlap.

    Attributes:
        training: what is learned.
        validation: held-out token ids, int64 (n,).
        training_documents: how many documents went into `training`.
    """

    training: PackedData
    validation: Tensor
    training_documents: int

    @property
    def sha256(self) -> str:
        """Digest of all that was read, so that a resumed run can tell whether it is the same."""
        digest = hashlib.sha256()
        for tensor in (self.training.ids, self.training.is_target.to(torch.int32), self.validation):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


class BatchOrder:
    """Which sequences each step sees: every epoch all of them once, shuffled from the seed and the epoch's number.

    Args:
        sequences: how many there are.
        batch_size: per step; an epoch's last batch may be smaller.
        seed: of the run.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        self.sequences = sequences
        self.batch_size = batch_size
        self.seed = seed
        self.batches_per_epoch = -(-sequences // batch_size)
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and batch within it, both from 0."""
        return divmod(step, self.batches_per_epoch)

    def rows(self, step: int) -> Tensor:
        """The sequences of a step, int64 (B,)."""
        epoch, batch = self.position(step)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed + 1_000_003 * (epoch + 1)) % 2**63)
            self._order, self._epoch = torch.randperm(self.sequences, generator=generator), epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]


def read_and_split(config: TrainingConfig) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of the configured sources; a document is never in both.

    Raises:
        DataError: a source is unknown, empty or malformed, or nothing is left to train on or to hold out.
    """
    documents = _read(config.data, config.max_documents)
    if config.validation_data:
        held_out = _read(config.validation_data, None)
        unwanted = {(d.prompt + d.text).strip() for d in held_out}
        training = [d for d in documents if (d.prompt + d.text).strip() not in unwanted]
    else:
        training, held_out = split_documents(documents, config.validation_share)
    for kind, part in (("to train on", training), ("to hold out", held_out)):
        if not part:
            raise DataError(f"{', '.join(config.data)}: {len(documents)} documents leave nothing {kind}")
    return training, held_out


def token_stream(documents: Sequence[Document], tokenizer: Tokenizer, end_of_text: int) -> TokenStream:
    """Encodes documents; prompts are marked as not to be learned."""
    prompts = tokenizer.encode_batch([d.prompt for d in documents])
    texts = tokenizer.encode_batch([d.text for d in documents])
    return _stream([(prompt, [*text, end_of_text]) for prompt, text in zip(prompts, texts, strict=True)])


def pack(stream: TokenStream, sequence_length: int) -> PackedData:
    """Cuts a stream into sequences; a tail shorter than one, and sequences with nothing to learn, are left out.

    Raises:
        DataError: not even one sequence.
    """
    count = stream.ids.numel()
    if count < sequence_length + 1:
        raise DataError(f"training data has {count} tokens, sequence_length {sequence_length} needs one more than that")
    ids, is_target, document = (
        t.unfold(0, sequence_length + 1, sequence_length) for t in (stream.ids, stream.is_target, stream.document)
    )
    teaches = is_target[:, 1:].any(1)
    if not bool(teaches.any()):
        raise DataError("training data has no completion to learn within a whole sequence")
    return PackedData(ids[teaches], is_target[teaches], document[teaches][:, [0, -1]])


def load_text(
    config: TrainingConfig, split: tuple[list[Document], list[Document]], tokenizer: Tokenizer, end_of_text: int
) -> TrainingData:
    """Tokenizes and packs the documents of `read_and_split`."""
    training, held_out = split
    return _assemble(
        config,
        token_stream(training, tokenizer, end_of_text),
        token_stream(held_out, tokenizer, end_of_text),
        len(training),
    )


def load_synthetic(config: TrainingConfig, n_tokens: int, separator: int) -> TrainingData:
    """Draws synthetic documents and packs them."""
    if config.validation_data:
        raise ConfigError("validation_data: synthetic data holds out its own, expected no other source")
    documents = synthetic_documents(n_tokens, separator, config.seed, config.max_documents)
    held_out = max(1, round(len(documents) * config.validation_share))
    if held_out >= len(documents):
        raise DataError(f"max_documents: {len(documents)} leaves nothing to train on")
    streams = [
        _stream([([], [*document, separator]) for document in part])
        for part in (documents[:-held_out], documents[-held_out:])
    ]
    return _assemble(config, streams[0], streams[1], len(documents) - held_out)


def is_synthetic(config: TrainingConfig) -> bool:
    """Whether the data is synthetic.

    Raises:
        ConfigError: it is mixed with other sources, whose ids would mean something else.
    """
    if SYNTHETIC in config.data and len(config.data) > 1:
        raise ConfigError(f"data: {SYNTHETIC!r} cannot be mixed with other sources, got {', '.join(config.data)}")
    if SYNTHETIC in config.validation_data:
        raise ConfigError(f"validation_data: {SYNTHETIC!r} holds out its own")
    return config.data == (SYNTHETIC,)


def _assemble(config: TrainingConfig, training: TokenStream, held_out: TokenStream, documents: int) -> TrainingData:
    validation = held_out.ids[: config.validation_tokens + 1].long()
    if validation.numel() < 2:
        raise DataError(f"held-out text has {validation.numel()} tokens, expected at least 2")
    return TrainingData(pack(training, config.sequence_length), validation, documents)


def _read(sources: Sequence[str], most: int | None) -> list[Document]:
    return list(dict.fromkeys(d for source in sources for d in read_documents(source)[:most]))


def _stream(parts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> TokenStream:
    ids = torch.tensor([i for prompt, text in parts for i in (*prompt, *text)], dtype=torch.int32)
    lengths = torch.tensor([n for prompt, text in parts for n in (len(prompt), len(text))])
    is_target = torch.repeat_interleave(torch.arange(lengths.numel()) % 2 == 1, lengths)
    document = torch.repeat_interleave(torch.arange(lengths.numel(), dtype=torch.int32) // 2, lengths)
    return TokenStream(ids, is_target, document)
