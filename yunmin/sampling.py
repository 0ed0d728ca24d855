"""What a request may say about how tokens are chosen and when to stop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from yunmin.constraints import Constraint
from yunmin.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 256
MAX_STOP_IDS = 128
MAX_BIASES = 1024
MAX_LOGPROBS = 20
# fields of `SamplingParams` that say how tokens are chosen and what ends them: a request of any protocol may set these
CHOICE_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; `yunmin.sampler.Sampler` says in which order things are done.

    Attributes:
        max_tokens: upper limit of generated tokens; 0 only reads the prompt.
        temperature: 0 takes the best token; else the logits are divided by it.
        top_k: keep the k best; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probabilities reach p.
        min_p: drop tokens less probable than min_p times the best.
        repetition_penalty: > 1 makes tokens seen before, in the prompt or since, less likely (Keskar et al. 2019).
        presence_penalty: subtracted from the logit of each token that was generated before.
        frequency_penalty: subtracted once for each time it was.
        logit_bias: pairs of a token id and what is added to its logit.
        seed: of this sequence's own generator; None draws one.
        stop: strings that end generation; not part of the text.
        stop_token_ids: ids that end generation as the end of text does; not part of it.
        ignore_eos: end-of-text ids are tokens like others.
        logprobs: how many alternatives to give with the log-probability of each token; None gives neither.
        constraint: what the whole text must match; where it does and nothing may follow, generation ends.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, low=0)
        _require_int("top_k", self.top_k, low=0)
        if self.seed is not None:
            _require_int("seed", self.seed, low=0, high=2**63 - 1)
        _require_number("temperature", self.temperature, 0.0, 100.0)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", "must be above 0 and at most 1, got 0")
        _require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._require_biases()
        stop: object = self.stop  # a caller without a type checker may give a plain string
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise RequestError("stop", "must be a list of non-empty strings")
        if len(self.stop) > MAX_STOP_STRINGS or any(len(s) > MAX_STOP_LENGTH for s in self.stop):
            raise RequestError("stop", f"at most {MAX_STOP_STRINGS} strings of at most {MAX_STOP_LENGTH} characters")
        if len(self.stop_token_ids) > MAX_STOP_IDS:
            raise RequestError("stop_token_ids", f"at most {MAX_STOP_IDS} ids, got {len(self.stop_token_ids)}")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, low=0, what="ids must be integers")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"must be true or false, got {self.ignore_eos!r}")
        if self.logprobs is not None:
            _require_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        constraint: object = self.constraint
        if constraint is not None and not isinstance(constraint, Constraint):
            raise RequestError("constraint", f"must be a yunmin.constraints.Constraint, got {constraint!r}")

    def _require_biases(self) -> None:
        if len(self.logit_bias) > MAX_BIASES:
            raise RequestError("logit_bias", f"at most {MAX_BIASES} ids, got {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias:
            _require_int("logit_bias", token_id, low=0, what="ids must be integers")
            _require_number("logit_bias", bias, -100.0, 100.0, what=f"the bias of id {token_id} must be a number")
        if len({token_id for token_id, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias", "each id may be named once")


_FIELDS = frozenset(field.name for field in fields(SamplingParams))


def sampling_params_from(values: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams` from a request's fields, where None means the default.

    `stop` may be one string or a list, `stop_token_ids` a list, `logit_bias` a mapping (whose keys may be strings, as
    in JSON) or a list of pairs.

    Raises:
        RequestError: an unknown field or an impossible value; names it.
    """
    unknown = sorted(set(values) - _FIELDS)
    if unknown:
        raise RequestError(unknown[0], f"unknown parameter, expected one of {', '.join(sorted(_FIELDS))}")
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = (given["stop"],)
    for name, kind in (("stop", "a string or a list of strings"), ("stop_token_ids", "a list of token ids")):
        if name in given:
            given[name] = _as_tuple(name, given[name], kind)
    if "logit_bias" in given:
        given["logit_bias"] = _as_biases(given["logit_bias"])
    return SamplingParams(**given)


def _as_tuple(name: str, value: object, kind: str) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise RequestError(name, f"must be {kind}, got {value!r}")
    return tuple(value)


def _as_biases(value: object) -> tuple[tuple[Any, Any], ...]:
    kind = "an object of token ids and numbers"
    pairs = _as_tuple("logit_bias", list(value.items()) if isinstance(value, Mapping) else value, kind)
    biases = []
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise RequestError("logit_bias", f"must be {kind}, got {value!r}")
        key, bias = pair
        is_number = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
        biases.append((int(key) if is_number else key, bias))
    return tuple(biases)


def _require_int(
    name: str, value: object, *, low: int, high: int | None = None, what: str = "must be an integer"
) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        limit = f">= {low}" if high is None else f"in {low}..{high}"
        raise RequestError(name, f"{what} {limit}, got {value!r}")


def _require_number(name: str, value: object, low: float, high: float, *, what: str = "must be a number") -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # type: ignore[operator]  # a number by then; false for NaN
        raise RequestError(name, f"{what} in {low:g}..{high:g}, got {value!r}")
