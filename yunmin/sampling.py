"""From logits to a token id."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from yunmin.errors import RequestError, YunminError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Attributes:
        max_tokens: upper limit of generated tokens.
        temperature: 0 takes the best token; else the logits are divided by it.
        top_k: keep the k best; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probabilities reach p.
        min_p: drop tokens less probable than min_p times the best.
        repetition_penalty: > 1 makes tokens seen before less likely (Keskar et al. 2019).
        seed: of this sequence's own generator; None draws one.
        stop: strings that end generation; not part of the text.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, low=1)
        _require_int("top_k", self.top_k, low=0)
        if self.seed is not None:
            _require_int("seed", self.seed, low=0, high=2**63 - 1)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", "must be above 0 and at most 1, got 0")
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        stop: object = self.stop  # a caller without a type checker may give a plain string
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError("stop", "must be a list of non-empty strings")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise RequestError("stop", f"at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters")


_FIELDS = frozenset(field.name for field in fields(SamplingParams))


class Sampler:
    """Draws one sequence's tokens with a random generator of its own.

    Args:
        params: how to choose.
        n_tokens: ids from here on are padding of the vocabulary and never chosen.
        sampler_state: uint8, from `state()`, to go on where another sampler stopped.
    """

    def __init__(self, params: SamplingParams, n_tokens: int, sampler_state: Tensor | None = None) -> None:
        self.params = params
        self.n_tokens = n_tokens
        self.generator = torch.Generator()
        if sampler_state is not None:
            self.generator.set_state(sampler_state)
        elif params.seed is not None:
            self.generator.manual_seed(params.seed)
        else:
            self.generator.seed()

    def state(self) -> Tensor:
        return self.generator.get_state()

    def choose(self, logits: Tensor, history: Collection[int]) -> int:
        """Chooses the next token.

        Args:
            logits: (V,), any float dtype, any device.
            history: ids that the repetition penalty applies to.

        Returns:
            A token id below `n_tokens`.

        Raises:
            YunminError: the logits hold NaN or infinity.
        """
        p = self.params
        scores = logits[: self.n_tokens].float().cpu()
        if not bool(torch.isfinite(scores).all()):
            raise YunminError("the model gave logits that are not finite")
        if p.repetition_penalty != 1.0 and history:
            seen = torch.tensor(sorted(set(history)), dtype=torch.int64)
            chosen = scores[seen]
            penalty = p.repetition_penalty
            scores = scores.index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))
        if p.temperature == 0:
            return int(scores.argmax())
        # in float64, and relative to the best, so that no temperature can overflow
        scores = (scores.double() - scores.max()) / p.temperature
        count = min(p.top_k, scores.numel()) if p.top_k else scores.numel()
        best, ids = torch.topk(scores, count) if count < scores.numel() else torch.sort(scores, descending=True)
        probabilities = torch.softmax(best, 0)
        before = probabilities.cumsum(0) - probabilities  # mass of the better tokens
        kept = (before < p.top_p) & (probabilities >= p.min_p * probabilities[0])
        kept[0] = True
        cumulative = (probabilities * kept).cumsum(0)
        draw = torch.rand(1, generator=self.generator, dtype=torch.float64) * cumulative[-1]
        position = min(int(torch.searchsorted(cumulative, draw, right=True)), int(kept.nonzero().max()))
        return int(ids[position])


def sampling_params_from(values: dict[str, Any]) -> SamplingParams:
    """`SamplingParams` from a request's fields, `stop` as a string or a list; None means the default."""
    unknown = sorted(set(values) - _FIELDS)
    if unknown:
        raise RequestError(unknown[0], f"unknown parameter, expected one of {', '.join(sorted(_FIELDS))}")
    given = {name: value for name, value in values.items() if value is not None}
    if "stop" in given:
        stop = given["stop"]
        if not isinstance(stop, str) and not isinstance(stop, Sequence):
            raise RequestError("stop", f"must be a string or a list of strings, got {stop!r}")
        given["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    return SamplingParams(**given)


def _require_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"in {low}..{high}"
        raise RequestError(name, f"must be an integer {limit}, got {value!r}")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # a number by then; false for NaN
        raise RequestError(name, f"must be a number in {low:g}..{high:g}, got {value!r}")
