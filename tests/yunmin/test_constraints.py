"""Structured output: whatever a random model would rather say, what it finishes matches the constraint."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import yunmin
from tests.models import small_config, trained_tokenizer, write_model
from yunmin.config import MambaConfig
from yunmin.constraints import MAX_SOURCE_LENGTH, Constraint, compile_constraint
from yunmin.errors import MissingExtraError, RequestError, YunminError
from yunmin.generate import Generation
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams, sampling_params_from
from yunmin.tokenizer import Tokenizer

TOKENIZER = trained_tokenizer()
EOS = 0
PUNCTUATION = "".join(map(chr, range(1, 127))) + "ü🙂"
LETTER = {name: TOKENIZER.encode(name)[0] for name in "ab"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """With 20 ids of padding."""
    assert TOKENIZER.eos_id == EOS
    config = small_config(vocab_size=320, n_tokens=300, eos_token_ids=(EOS,))
    return yunmin.load(write_model(tmp_path_factory.mktemp("constraints") / "model", config, tokenizer=TOKENIZER))


def say(config: MambaConfig, regex: str, **params: Any) -> tuple[str, str]:
    """Text and finish reason of a model that finds all tokens equally good."""
    sampling = sampling_params_from({"constraint": Constraint("regex", regex), **params})
    generation = Generation(sampling, [5], config, TOKENIZER)
    text = ""
    while generation.finish_reason is None:
        text += generation.advance(torch.zeros(config.vocab_size)).text
    return text, generation.finish_reason


def regexes(depth: int = 3) -> st.SearchStrategy[str]:
    """Of bounded length, in the syntax that Python and Rust share."""
    leaves = st.sampled_from(["a", "b", "xy", "[a-f]", "[^a-z\n]", "\\.", "[0-9]", "ü", "東", "[🙂-🙊]", " "])
    if depth == 0:
        return leaves
    inner = regexes(depth - 1)
    return st.one_of(
        leaves,
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        inner.map(lambda part: f"({part})?"),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(lambda t: f"({t[0]}){{{t[1]},{t[1] + t[2]}}}"),
    )


def schemas(depth: int = 2) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["name", "größe", "x y", '"'])
    values = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text(max_size=4))
    leaves = st.one_of(
        st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": "string", "pattern": "^[a-c]{1,4}$"}]),
        st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
            lambda t: {"type": "integer", "minimum": t[0], "maximum": t[0] + t[1]}
        ),
        st.tuples(st.integers(0, 3), st.integers(0, 3)).map(
            lambda t: {"type": "string", "minLength": t[0], "maxLength": t[0] + t[1]}
        ),
        st.lists(values, min_size=1, max_size=3).map(lambda options: {"enum": options}),
    )
    if depth == 0:
        return leaves
    inner = schemas(depth - 1)

    def as_object(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.one_of(
        leaves,
        st.builds(as_object, st.dictionaries(names, inner, max_size=3), st.sets(names)),
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda t: {"type": "array", "items": t[0], "minItems": t[1], "maxItems": t[1] + t[2]}
        ),
        st.lists(inner, min_size=2, max_size=2).map(lambda options: {"anyOf": options}),
    )


def is_valid(value: Any, schema: dict[str, Any]) -> bool:
    """The part of JSON Schema that `schemas` uses."""
    if "anyOf" in schema:
        return any(is_valid(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        options: list[Any] = schema["enum"]
        return any(value == option and type(value) is type(option) for option in options)
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(is_valid(item, schema["properties"][name]) for name, item in value.items())
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(is_valid(item, schema["items"]) for item in value)
        )
    if kind == "string":
        return (
            isinstance(value, str)
            and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 99)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return type(value) is {"boolean": bool, "null": type(None)}[kind]


@settings(max_examples=150, deadline=None)
@given(regexes(), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 3.0]))
def test_the_whole_text_matches_its_regex(model: LanguageModel, regex: str, seed: int, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 2000, "seed": seed, "temperature": temperature}
    completion = model.generate("Say: ", constraint=Constraint("regex", regex), **options)
    assert completion.finish_reason == "stop"
    assert re.fullmatch(regex, completion.text), (regex, completion.text)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(completion.token_ids) == completion.text
    assert EOS not in completion.token_ids


@settings(max_examples=150, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_the_whole_text_is_json_that_its_schema_accepts(model: LanguageModel, schema: Any, seed: int) -> None:
    constraint = Constraint.json_schema(schema)
    completion = model.generate("JSON: ", constraint=constraint, max_tokens=2000, seed=seed)
    assert completion.finish_reason == "stop"
    assert is_valid(json.loads(completion.text), schema), (schema, completion.text)
    assert completion == model.generate("JSON: ", constraint=constraint, max_tokens=2000, seed=seed)


def test_the_checker_of_these_tests_refuses_what_is_wrong() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    assert is_valid({"a": True}, schema)
    wrong: list[Any] = [{}, {"a": 1}, {"a": True, "b": 1}, [], 3]
    assert not any(is_valid(value, schema) for value in wrong)
    assert not is_valid(True, {"type": "integer", "minimum": 0, "maximum": 3})


def test_any_json_object_is_one(model: LanguageModel) -> None:
    finished = 0
    for seed in range(10):
        completion = model.generate("JSON: ", constraint=Constraint("json_object"), max_tokens=400, seed=seed)
        if completion.finish_reason == "stop":
            finished += 1
            assert isinstance(json.loads(completion.text), dict)
    assert finished


def test_choices_and_grammars_are_followed(model: LanguageModel) -> None:
    choices = ["yes", "no", "nonsense, “indeed”", "東京"]
    found = {model.generate("?", constraint=Constraint.choice(choices), seed=seed).text for seed in range(60)}
    assert found == set(choices)
    lark = Constraint("grammar", 'start: "(" start ")" | "x"')
    gbnf = Constraint("grammar", 'root ::= "(" root ")" | "x"')
    for constraint in (lark, gbnf):
        for seed in range(10):
            completion = model.generate("?", constraint=constraint, seed=seed, max_tokens=300)
            assert completion.finish_reason == "stop"
            assert re.fullmatch(r"(\(*)x(\)*)", completion.text)
            assert completion.text.count("(") == completion.text.count(")")


def test_the_end_of_text_is_allowed_only_where_the_text_may_end(model: LanguageModel) -> None:
    wish: dict[str, Any] = {"constraint": Constraint("regex", "ab?"), "temperature": 0}
    assert model.generate("?", logit_bias={EOS: 100}, **wish).text == "a"
    assert model.generate("?", logit_bias={EOS: -100}, **wish).text == "ab"
    assert model.generate("?", logit_bias={EOS: 100}, ignore_eos=True, **wish).text == "ab"


def test_every_end_of_text_id_counts_also_one_that_is_text_and_none_is_needed(model: LanguageModel) -> None:
    several = dataclasses.replace(model.config, eos_token_ids=(EOS, LETTER["a"]))
    assert {say(several, "[ab]{3}", seed=seed) for seed in range(10)} == {("bbb", "stop")}
    assert say(several, "[ab]{3}c?", logit_bias={LETTER["a"]: 100}) == ("bbb", "stop")
    none = dataclasses.replace(model.config, eos_token_ids=())
    assert {say(none, "ac?", seed=seed) for seed in range(10)} == {("ac", "stop")}


def test_what_is_complete_ends_without_another_step(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    params = SamplingParams(constraint=Constraint("regex", "a"), temperature=0)
    generation = Generation(params, [5], model.config, model.tokenizer)
    piece = generation.advance(torch.zeros(320))
    assert (piece.token_id, piece.text, piece.finish_reason) == (LETTER["a"], "a", "stop")
    empty = model.generate("?", constraint=Constraint("regex", ""), seed=0)
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", (), "stop")


def test_max_tokens_and_stop_strings_end_a_text_before_it_is_complete(model: LanguageModel) -> None:
    constraint = Constraint("regex", "[a-e]{40}")
    short = model.generate("?", constraint=constraint, max_tokens=5, seed=0)
    assert (len(short.token_ids), short.finish_reason) == (5, "length")
    stopped = model.generate("?", constraint=constraint, stop="e", seed=0, max_tokens=100)
    whole = model.generate("?", constraint=constraint, seed=0, max_tokens=100)
    assert len(whole.text) == 40
    assert stopped.text == whole.text[: whole.text.index("e")]
    assert stopped.finish_reason == "stop"


def test_a_constraint_leaves_a_fitting_greedy_text_as_it_is(model: LanguageModel) -> None:
    free = model.generate("The quick", temperature=0, max_tokens=30, logprobs=2)
    bound = model.generate(
        "The quick", temperature=0, max_tokens=30, logprobs=2, constraint=Constraint("regex", r"(.|\n)*")
    )
    text = free.text.rstrip("\N{REPLACEMENT CHARACTER}")
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert bound.text.startswith(text)
    assert bound.logprobs is not None
    assert free.logprobs is not None
    assert bound.logprobs[0] == free.logprobs[0]  # of the model, not of what the constraint leaves


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "no text can match it"),
        ("json_schema", "{", "must be JSON"),
        ("json_schema", "[1]", "must be a JSON object"),
        ("json_schema", "true", "must be a JSON object"),
        ("json_schema", '{"type": "objekt"}', "Invalid type: objekt"),
        ("json_schema", '{"not": {}}', "Unimplemented keys"),
        ("json_schema", '{"$ref": "http://localhost/x"}', "does not fetch"),
        ("json_schema", '{"$defs": {"x": {"$ref": "#/$defs/x"}}, "$ref": "#/$defs/x"}', "no text can match it"),
        ("json_schema", " " * 300_000, "at most 65536 characters"),
        ("choice", "[]", "must be a list of non-empty strings"),
        ("choice", '["a", 1]', "must be a list of non-empty strings"),
        ("grammar", "start: foo", "unknown name"),
        ("grammar", "", "grammar: "),
        ("regex", 5, "must be a string"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(model: LanguageModel, kind: Any, source: Any, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        model.generate("?", constraint=Constraint(kind, source))
    assert caught.value.field == kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_source_that_would_take_long_to_compile_is_refused_by_its_length() -> None:
    for kind in ("regex", "grammar", "json_schema"):
        with pytest.raises(RequestError, match=f"{kind}: at most {MAX_SOURCE_LENGTH[kind]} characters"):
            Constraint(kind, "a" * (MAX_SOURCE_LENGTH[kind] + 1))


def test_what_breaks_a_limit_with_its_first_token_is_refused_beforehand(tokenizer: Tokenizer) -> None:
    branches = [{"type": "object", "properties": {f"a{n}": {"type": "integer"}}} for n in range(800)]
    with pytest.raises(RequestError, match=r"json_schema: .*max is 2000"):
        compile_constraint(Constraint.json_schema({"anyOf": branches}), tokenizer, 300)


def test_one_of_thousands_of_choices_is_said_whatever_characters_it_has(model: LanguageModel) -> None:
    for choices in ([f"option {n}" for n in range(5000)], [PUNCTUATION, PUNCTUATION]):
        found = model.generate("x", max_tokens=300, seed=3, constraint=Constraint.choice(choices))
        assert found.finish_reason == "stop"
        assert found.text in choices


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(RequestError, match="constraint: expected one of json_schema, "):
        Constraint("xml")  # type: ignore[arg-type]


def test_a_constraint_needs_a_tokenizer_that_fits(tmp_path: Path) -> None:
    without = yunmin.load(write_model(tmp_path / "without"))
    smaller = yunmin.load(write_model(tmp_path / "smaller", small_config(n_tokens=299), tokenizer=TOKENIZER))
    for model, message in ((without, "needs a tokenizer, "), (smaller, "the tokenizer has 300 tokens, the model 299")):
        with pytest.raises(RequestError, match=f"regex: .*{message}"):
            model.generate([1], constraint=Constraint("regex", "a"))


def test_without_llguidance_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"structured output needs .*'llguidance'.*yunmin\[serve\]"):
        compile_constraint(Constraint("regex", "a"), trained_tokenizer(), 300)


def test_a_constraint_is_compiled_once_for_a_tokenizer(tokenizer: Tokenizer) -> None:
    first = compile_constraint(Constraint("regex", "a+"), tokenizer, 300)
    assert compile_constraint(Constraint("regex", "a+"), tokenizer, 300) is first
    assert compile_constraint(Constraint("regex", "a+"), trained_tokenizer(), 300) is not first
    assert compile_constraint(Constraint("regex", "a+"), tokenizer, 310) is not first


def test_the_compiled_constraints_kept_are_bounded(tokenizer: Tokenizer) -> None:
    first = compile_constraint(Constraint("regex", "first"), tokenizer, 300)
    for n in range(70):
        compile_constraint(Constraint("regex", f"x{n}"), tokenizer, 300)
    assert compile_constraint(Constraint("regex", "first"), tokenizer, 300) is not first


def test_sequences_of_one_constraint_do_not_affect_one_another(model: LanguageModel) -> None:
    constraint = Constraint.json_schema({"type": "array", "items": {"type": "integer"}, "maxItems": 5})

    def answer(seed: int) -> str:
        return model.generate("?", constraint=constraint, seed=seed, max_tokens=30).text

    expected = [answer(seed) for seed in range(24)]
    results: dict[int, str] = {}

    def work(part: int) -> None:
        results.update({seed: answer(seed) for seed in range(part, 24, 4)})

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[seed] for seed in range(24)] == expected


def test_a_matcher_that_fails_says_so_in_one_line() -> None:
    matcher = compile_constraint(Constraint("regex", "a{5}"), TOKENIZER, 300).begin([EOS])
    assert not matcher.accept(LETTER["a"])
    with pytest.raises(YunminError, match=r"^regex: [^\n]+$"):
        matcher.accept(LETTER["b"])
    with pytest.raises(YunminError, match=r"^regex: [^\n]+$"):
        matcher.allowed()
