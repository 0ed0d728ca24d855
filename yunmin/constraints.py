"""Structured output: text that must match a JSON schema, a regular expression, one of some choices, or a grammar.

The work is done by `llguidance`, which says after each token which ones may follow.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import tokenizers
from numpy.typing import NDArray

from yunmin.errors import MissingExtraError, RequestError, YunminError
from yunmin.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Kind = Literal["json_schema", "json_object", "regex", "choice", "grammar"]

# compiling takes time that grows with more than the square of the length, and nothing can stop it: a second at most
# for what people write, for these lengths a few
MAX_SOURCE_LENGTH: Mapping[Kind, int] = {
    "json_schema": 64 * 1024,
    "json_object": 0,
    "regex": 16 * 1024,
    "choice": 256 * 1024,
    "grammar": 16 * 1024,
}
_KEPT = 64  # compiled constraints for each tokenizer
_END = "<|end of constrained text|>"
# a model may go on with spaces for ever where a schema allows any number of them
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,16}"


@dataclass(frozen=True)
class Constraint:
    """What a text must match, from its first character to its last.

    Attributes:
        kind: what `source` is. "json_object" is any JSON object, "choice" a JSON list of strings, "regex" is in the
            syntax of Rust's `regex` crate, without look-around, "grammar" in Lark's (as llguidance extends it) or
            llama.cpp's GBNF.
        source: empty for "json_object".

    Raises:
        RequestError: unknown kind, or a source that is too long or no JSON where it has to be; the field it names is
            the kind.
    """

    kind: Kind
    source: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise RequestError("constraint", f"expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not isinstance(self.source, str):
            raise RequestError(self.kind, f"must be a string, got {type(self.source).__name__}")
        if len(self.source) > (most := MAX_SOURCE_LENGTH[self.kind]):
            raise RequestError(self.kind, f"at most {most} characters, got {len(self.source)}")
        if self.kind in ("json_schema", "choice"):
            _read_json(self.kind, self.source)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Constraint:
        """JSON that a schema, given as Python objects, accepts."""
        return cls("json_schema", json.dumps(schema))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Constraint:
        """One of some strings."""
        return cls("choice", json.dumps(list(choices)))


class Matcher:
    """What one sequence may still say.

    Args:
        matcher: of llguidance, at the beginning of the text.
        kind: of the constraint, for errors.
        end_id: stands for the end of the text in masks, and is none of the model's.
        size: ids that masks speak about.
        eos_ids: that end the text where it may end.
    """

    def __init__(self, matcher: LLMatcher, kind: str, end_id: int, size: int, eos_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._kind = kind
        self._end_id = end_id
        self._eos_ids = tuple(eos_ids)
        self._mask = np.zeros(-(-size // 32), np.uint32)
        self._address = self._mask.ctypes.data

    def allowed(self) -> NDArray[np.uint32] | None:
        """A bit for each id that may come next, overwritten by the next call; None where the text can only end.

        Raises:
            YunminError: the grammar takes too much work, or leads to what no token of the model can say.
        """
        self._matcher.unsafe_compute_mask_ptr(self._address, self._mask.nbytes)
        self._check()
        may_end = bool(self._mask[self._end_id // 32] >> np.uint32(self._end_id % 32) & np.uint32(1))
        self._set(self._end_id, False)
        for token_id in self._eos_ids:
            self._set(token_id, may_end)
        if not self._mask.any():
            if may_end:
                return None
            raise YunminError(f"{self._kind}: no token of the model can continue the text")
        return self._mask

    def accept(self, token_id: int) -> bool:
        """Goes on with an allowed token that is not an end; returns whether the text is complete and must end there."""
        self._matcher.consume_token(token_id)
        self._check()
        return self._matcher.is_stopped()

    def _set(self, token_id: int, bit: bool) -> None:
        flag = np.uint32(1 << token_id % 32)
        if bit:
            self._mask[token_id // 32] |= flag
        else:
            self._mask[token_id // 32] &= ~flag

    def _check(self) -> None:
        if self._matcher.is_error():
            raise YunminError(f"{self._kind}: {_one_line(self._matcher.get_error())}")


@dataclass(frozen=True)
class _Adapted:
    """A tokenizer as llguidance wants it, with a token of its own for the end of the text.

    The model's own end-of-text ids are no help: it may have none, or several, or one that is text to the tokenizer.
    """

    tokenizer: LLTokenizer
    end_id: int
    size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, n_tokens: int) -> _Adapted:
        extended = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        extended.add_special_tokens([_END])
        end_id = extended.token_to_id(_END)
        assert end_id is not None
        size = max(n_tokens, end_id + 1)
        return cls(_llguidance().LLTokenizer(extended.to_str(), n_vocab=size, eos_token=end_id), end_id, size)


class CompiledConstraint:
    """A constraint for one tokenizer; any number of sequences may begin with it."""

    def __init__(self, constraint: Constraint, adapted: _Adapted) -> None:
        self._adapted = adapted
        self._kind = constraint.kind
        self._beginning = _matcher(constraint, adapted.tokenizer)

    def begin(self, eos_ids: Sequence[int]) -> Matcher:
        """A matcher at the beginning of the text.

        Args:
            eos_ids: ids that the text may end with; empty where only its grammar ends it.
        """
        return Matcher(self._beginning.deep_copy(), self._kind, self._adapted.end_id, self._adapted.size, eos_ids)


def compile_constraint(constraint: Constraint, tokenizer: Tokenizer | None, n_tokens: int) -> CompiledConstraint:
    """Compiles a constraint, or finds it among those compiled last. May take a second, without the interpreter's lock.

    Args:
        constraint: what the text must match.
        tokenizer: of the model.
        n_tokens: ids of the model that are no padding.

    Raises:
        RequestError: the source is wrong, asks for what is not supported, or there is no tokenizer that fits; the field
            it names is the constraint's kind.
        MissingExtraError: llguidance is not installed.
    """
    if tokenizer is None:
        raise RequestError(constraint.kind, "needs a tokenizer, and this model has none")
    return _compiler_of(tokenizer).compile(constraint, tokenizer, n_tokens)


def is_compiled(constraint: Constraint, tokenizer: Tokenizer | None, n_tokens: int) -> bool:
    """Whether `compile_constraint` with the same arguments would find it among those compiled last."""
    return tokenizer is not None and _compiler_of(tokenizer).has(constraint, n_tokens)


def _compiler_of(tokenizer: Tokenizer) -> _Compiler:
    with _LOCK:
        compiler = _COMPILERS.get(tokenizer)
        if compiler is None:
            compiler = _COMPILERS[tokenizer] = _Compiler()
        return compiler


class _Compiler:
    """The constraints compiled for one tokenizer."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adapted: dict[int, _Adapted] = {}
        self._compiled: OrderedDict[tuple[Constraint, int], CompiledConstraint] = OrderedDict()

    def has(self, constraint: Constraint, n_tokens: int) -> bool:
        with self._lock:
            return (constraint, n_tokens) in self._compiled

    def compile(self, constraint: Constraint, tokenizer: Tokenizer, n_tokens: int) -> CompiledConstraint:
        key = (constraint, n_tokens)
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key]
            if n_tokens not in self._adapted:
                if tokenizer.vocab_size > n_tokens:  # llguidance might insist on one of the tokens beyond
                    sizes = f"the tokenizer has {tokenizer.vocab_size} tokens, the model {n_tokens}"
                    raise RequestError(constraint.kind, f"needs a model that has all tokens of its tokenizer: {sizes}")
                self._adapted[n_tokens] = _Adapted.of(tokenizer, n_tokens)
            adapted = self._adapted[n_tokens]
        compiled = CompiledConstraint(constraint, adapted)  # others need not wait meanwhile
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return compiled


_LOCK = threading.Lock()
_COMPILERS: weakref.WeakKeyDictionary[Tokenizer, _Compiler] = weakref.WeakKeyDictionary()


def _matcher(constraint: Constraint, tokenizer: LLTokenizer) -> LLMatcher:
    llguidance, kind = _llguidance(), constraint.kind
    limits = llguidance.LLParserLimits(verbose_errors=False)
    try:
        if kind in ("json_schema", "json_object"):
            schema = '{"type": "object"}' if kind == "json_object" else constraint.source
            options = {"whitespace_pattern": _WHITESPACE}  # a schema's own "x-guidance" goes before them
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=options)
        elif kind == "choice":  # as one regular expression, since a grammar has room for some hundreds only
            choices = dict.fromkeys(json.loads(constraint.source))
            grammar = llguidance.grammar_from("regex", "|".join(re.escape(text) for text in choices))
        else:
            grammar = llguidance.grammar_from(kind, constraint.source)
    except ValueError as error:
        raise RequestError(kind, _one_line(str(error))) from None
    matcher: LLMatcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise RequestError(kind, _one_line(matcher.get_error()))
    trial = matcher.deep_copy()
    allowed = np.frombuffer(trial.compute_bitmask(), np.uint8)
    if not trial.is_error():  # the limits of a grammar's size are looked at with the first token
        trial.consume_token(int(np.unpackbits(allowed, bitorder="little").argmax()))
    if trial.is_error():
        raise RequestError(kind, f"no text can match it, or it takes too much work ({_one_line(trial.get_error())})")
    return matcher


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise MissingExtraError("llguidance", "serve", "structured output") from None
    return llguidance


def _read_json(kind: str, source: str) -> None:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise RequestError(kind, f"must be JSON, {error}") from None
    if kind == "json_schema" and not isinstance(value, dict):
        raise RequestError(kind, f"must be a JSON object, got {source[:40]!r}")
    is_list = isinstance(value, list) and value and all(isinstance(item, str) and item for item in value)
    if kind == "choice" and not is_list:
        raise RequestError(kind, "must be a list of non-empty strings")


def _one_line(message: str) -> str:
    """What llguidance says, without the drawings in between."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for n, line in enumerate(lines) if n == 0 or line.startswith("error:")]
    return " ".join(told) or "refused without a reason"
