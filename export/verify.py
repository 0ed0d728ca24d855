"""Proof that an export computes what the trained model computes: the same logits, on real text.

The trained model reads each sequence alone; the exported one reads all as one batch with padding on either side. So
one comparison covers the weights and the padding, and a second one the step-by-step path.
"""

from __future__ import annotations

import argparse
import json.decoder
import random
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from yunmin.artifact import Parity
from yunmin.corpus import read_documents, texts_of
from yunmin.errors import DataError, TokenizerError, VerificationError
from yunmin.model import MambaLM
from yunmin.tokenizer import Tokenizer

TOLERANCES = {
    "float32": 1e-4,
    "float64": 1e-10,
    "stepwise": 1e-4,
    "cut": 1e-4,
    "layers": 3e-2,
    "quantized": 3e-2,
    "onnx_embedding": 1e-6,
    "onnx": 1e-4,
    "onnx_steps": 1e-4,
    "onnx_int8_activations": 3e-2,
}
_REFERENCES = {
    "float32": "the trained model's",
    "float64": "the trained model's",
    "stepwise": "its own over whole sequences when it steps",
    "layers": "those of the stored integers in plain torch",
    "quantized": "those of the stored integers in plain torch",
    "cut": "those of the model that was cut further, in float64,",
    "onnx_embedding": "those of the weights it stands for, looked up for every id,",
    "onnx": "those of the weights it stands for in plain torch",
    "onnx_steps": "those of the weights it stands for in plain torch when it steps",
    "onnx_int8_activations": "those of the weights it stands for in plain torch when activations are rounded",
}
_LENGTHS = (96, 61, 33, 7)  # unequal, and no multiples of a kernel's block
_CHARACTERS_PER_TOKEN = 16  # more than any tokenizer needs, so that not a whole book is tokenized
_STEPS = 6
_ROWS = 32  # of logits, compared at once
_SEED = 0


@dataclass(frozen=True)
class Probe:
    """What the models are compared on.

    Attributes:
        sequences: token ids, at least one, each of at least two.
        origin: where they come from, for the manifest.
    """

    sequences: tuple[tuple[int, ...], ...]
    origin: str

    @property
    def tokens(self) -> int:
        return sum(len(sequence) for sequence in self.sequences)


def make_probe(tokenizer: Tokenizer | None, n_tokens: int, data: str | None = None) -> Probe:
    """Token ids to compare on: of real text, or seeded random ones for a model without tokenizer.

    Args:
        tokenizer: of the model.
        n_tokens: ids below this are valid.
        data: a source that `yunmin.corpus.read_documents` knows; None takes modules of the standard library.

    Raises:
        DataError: the source has no text of at least two tokens, or is given for a model without tokenizer.
        TokenizerError: the tokenizer gives ids that the model does not have.
    """
    if tokenizer is None:
        if data is not None:
            raise DataError(f"{data}: verifying on text needs a tokenizer, and the model has none")
        rng = random.Random(_SEED)  # noqa: S311 (no secret)
        sequences = tuple(tuple(rng.randrange(n_tokens) for _ in range(length)) for length in _LENGTHS)
        return Probe(sequences, f"random token ids, seed {_SEED} (the model has no tokenizer)")
    if data is None:
        modules = (argparse, json.decoder, textwrap, random)
        texts = [text for module in modules for text in texts_of(read_documents(str(module.__file__)))]
        origin = "standard library: " + ", ".join(Path(str(module.__file__)).name for module in modules)
    else:
        texts = _spread(texts_of(read_documents(data)))
        origin = data
    sequences = _cut_to_lengths(tokenizer, texts)
    if not sequences:
        raise DataError(f"{data}: no document has two tokens")
    largest = max(max(sequence) for sequence in sequences)
    if largest >= n_tokens:
        raise TokenizerError(f"the tokenizer gives id {largest}, the model has {n_tokens} ids")
    return Probe(sequences, origin)


@torch.inference_mode()
def logits_one_by_one(model: MambaLM, probe: Probe) -> Tensor:
    """Logits of each sequence read alone, one after the other (tokens, V)."""
    rows = [model(torch.tensor([sequence])) for sequence in probe.sequences]
    return torch.cat([row[0] for row in rows])


@torch.inference_mode()
def logits_as_batch(model: MambaLM, probe: Probe) -> Tensor:
    """Logits of all sequences read as one padded batch, without the padding's (tokens, V)."""
    input_ids, mask = _pad(probe.sequences)
    # the head gets no padding, whose logits would be as large again
    hook = model.lm_head.register_forward_pre_hook(lambda _, arguments: (arguments[0][mask],))
    try:
        return torch.as_tensor(model(input_ids, mask))
    finally:
        hook.remove()


def steps_of(probe: Probe) -> int:
    """How many of the last tokens are read one by one, so that the shortest sequence keeps one to begin with."""
    return min(_STEPS, min(len(sequence) for sequence in probe.sequences) - 1)


@torch.inference_mode()
def logits_by_steps(model: MambaLM, probe: Probe) -> tuple[Tensor, Tensor]:
    """The last positions' logits by a padded prefill and single steps, and by one pass over the whole sequences.

    Returns:
        Stepped and whole logits, both (sequences, steps + 1, V).
    """
    steps = steps_of(probe)
    input_ids, mask = _pad([sequence[:-steps] for sequence in probe.sequences])
    logits, state = model.prefill(input_ids, attention_mask=mask)
    stepped = [logits]
    for position in range(-steps, 0):
        logits, state = model.step(torch.tensor([sequence[position] for sequence in probe.sequences]), state)
        stepped.append(logits)
    whole = [model(torch.tensor([sequence]))[0, -steps - 1 :] for sequence in probe.sequences]
    return torch.stack(stepped, dim=1), torch.stack(whole)


def require_parity(
    what: str, exported: Tensor, expected: Tensor, *, hint: str = "", tolerance: float | None = None
) -> Parity:
    """Compares logits.

    Args:
        what: a key of `TOLERANCES`.
        exported: (..., V).
        expected: of the same shape and dtype.
        hint: what else is known, for the error.
        tolerance: limit on the error relative to the largest logit; None takes that of `TOLERANCES`.

    Raises:
        VerificationError: the difference exceeds the tolerance, or a logit is not finite.
    """
    tolerance = TOLERANCES[what] if tolerance is None else tolerance
    if not all(bool(rows.isfinite().all()) for rows in expected):
        raise VerificationError(f"{what}: the expected logits are not all finite, so nothing can be compared")
    largest = max(float(expected.max()), -float(expected.min()))
    vocabulary = expected.shape[-1]
    pairs = zip(
        exported.reshape(-1, vocabulary).split(_ROWS), expected.reshape(-1, vocabulary).split(_ROWS), strict=True
    )
    errors = torch.stack([(a - b).abs().max() for a, b in pairs])  # NaN where a logit is
    parity = Parity(
        max_abs_error=float(errors.max()),
        largest_logit=largest,
        tolerance=tolerance,
        tokens=expected.shape[:-1].numel(),
    )
    if not parity.holds:
        values = "embedding" if what == "onnx_embedding" else "logit"
        raise VerificationError(
            f"{what}: the exported model's {values}s differ from {_REFERENCES[what]} by {parity.max_abs_error:.3g}, "
            f"expected at most {tolerance:g} of the largest {values} {largest:.4g}; nothing was written{hint}"
        )
    return parity


def _spread(texts: list[str]) -> list[str]:
    """Texts, or parts of them, from all over a source."""
    if len(texts) < len(_LENGTHS):
        texts = [text[i * len(text) // len(_LENGTHS) :] for text in texts for i in range(len(_LENGTHS))]
    return texts[:: max(1, len(texts) // len(_LENGTHS))]


def _cut_to_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    sequences: list[tuple[int, ...]] = []
    for text in texts:
        length = _LENGTHS[len(sequences)]
        ids = tokenizer.encode(text[: length * _CHARACTERS_PER_TOKEN])[:length]
        if len(ids) >= 2:
            sequences.append(tuple(ids))
        if len(sequences) == len(_LENGTHS):
            break
    return tuple(sequences)


def _pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L), bool: even rows padded on the left, odd rows on the right."""
    longest = max(len(sequence) for sequence in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        begin = longest - len(sequence) if row % 2 == 0 else 0
        input_ids[row, begin : begin + len(sequence)] = torch.tensor(sequence)
        mask[row, begin : begin + len(sequence)] = True
    return input_ids, mask
