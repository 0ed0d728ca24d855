"""Pieces of text concatenate to the whole decode, whatever the ids and wherever a stop string falls."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.models import trained_tokenizer
from yunmin.text_stream import TextStream
from yunmin.tokenizer import END_OF_TEXT, Tokenizer

TOKENIZER = trained_tokenizer(400)
END = TOKENIZER.eos_id
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def pieces_of(
    ids: Iterable[int], stop: Sequence[str] = (), context: Sequence[int] = (), tokenizer: Tokenizer = TOKENIZER
) -> list[str]:
    stream = TextStream(tokenizer, stop, context)
    pieces = []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


def byte_ids(data: bytes) -> list[int]:
    """One token per byte, so that every character falls apart."""
    # GPT-2's table: bytes that print stand for themselves, the others follow from 256 on
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in shown]
    symbols = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    ids = [TOKENIZER.backend.token_to_id(symbols[b]) for b in data]
    assert None not in ids
    return [i for i in ids if i is not None]


ids_of_any_kind = st.lists(
    st.one_of(st.integers(0, TOKENIZER.vocab_size - 1), st.integers(0, 400), st.just(END), st.integers(100, 256)),
    max_size=60,
)


@settings(max_examples=400, deadline=None)
@given(ids_of_any_kind)
@example(byte_ids("👩".encode())[:2] + [END] * 6 + byte_ids("👩".encode())[2:])
@example(byte_ids(b"\xe2\x80\x99\xff\xff\xe2\x80"))
@example(byte_ids("\N{REPLACEMENT CHARACTER}a\N{REPLACEMENT CHARACTER}".encode()))
def test_pieces_of_any_ids_concatenate_to_the_decode(ids: list[int]) -> None:
    assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.booleans())
def test_pieces_of_text_are_whole_characters(text: str, by_bytes: bool) -> None:
    ids = byte_ids(text.encode()) if by_bytes else TOKENIZER.encode(text)
    pieces = pieces_of(ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)
    if REPLACEMENT not in text:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    data = "é€👍".encode()
    assert pieces_of(byte_ids(data)) == ["", "é", "", "", "€", "", "", "", "👍", ""]


def test_text_that_ends_within_a_character_shows_it_as_replacement_at_the_end_only() -> None:
    assert pieces_of(byte_ids("a€".encode()[:-1])) == ["a", "", "", REPLACEMENT]


@settings(max_examples=300, deadline=None)
@given(ids_of_any_kind, ids_of_any_kind)
def test_with_a_context_of_whole_characters_pieces_are_the_text_that_follows(
    context: list[int], ids: list[int]
) -> None:
    known = TOKENIZER.decode(context)
    if known.endswith(REPLACEMENT):
        return
    assert known + "".join(pieces_of(ids, context=context)) == TOKENIZER.decode(context + ids)


def test_a_character_begun_in_the_context_belongs_to_the_stream() -> None:
    ids = byte_ids("x€y".encode())
    assert "".join(pieces_of(ids[2:], context=ids[:2])) == "€y"


def test_special_tokens_never_show() -> None:
    assert END is not None
    ids = [END, *TOKENIZER.encode("one"), END, *TOKENIZER.encode("two"), END]
    assert "".join(pieces_of(ids)) == "onetwo"
    assert END_OF_TEXT not in TOKENIZER.decode(ids)


def test_leading_spaces_of_a_metaspace_tokenizer_survive() -> None:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(["one two three"] * 3, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("one two three two")
    assert "".join(pieces_of(ids, tokenizer=tokenizer)) == tokenizer.decode(ids) == "one two three two"
    assert "".join(pieces_of(ids[1:], context=ids[:1], tokenizer=tokenizer)) == " two three two"


def cut_at_first_complete_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The definition, letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(st.text("abcé", max_size=30), st.lists(st.text("abcé", min_size=1, max_size=5), max_size=4), st.data())
def test_stop_strings_cut_at_the_same_place_however_the_text_falls_into_tokens(
    text: str, stop: list[str], data: st.DataObject
) -> None:
    ids = byte_ids(text.encode()) if data.draw(st.booleans()) else TOKENIZER.encode(text)
    expected, is_cut = cut_at_first_complete_stop(text, stop)
    stream = TextStream(TOKENIZER, stop)
    shown = ""
    for token_id in ids:
        shown += stream.push(token_id)
        assert expected.startswith(shown)
    shown += stream.finish()
    assert (shown, stream.stopped) == (expected, is_cut)


def test_what_may_become_a_stop_string_is_held_back_and_released() -> None:
    stream = TextStream(TOKENIZER, ["\n\nQ:"])
    held = [stream.push(i) for i in byte_ids(b"a\n\n")]
    assert held == ["a", "", ""]
    assert stream.push(byte_ids(b"b")[0]) == "\n\nb"


@pytest.mark.parametrize("byte", [0xFF, 0x80, 0xE2, 0xF0])
def test_a_long_run_of_malformed_bytes_is_exact_and_not_quadratic(byte: int) -> None:
    ids = byte_ids(bytes([byte]) * 3000)
    decoded = 0

    class Counting(Tokenizer):
        def decode(self, token_ids: Sequence[int]) -> str:
            nonlocal decoded
            decoded += len(token_ids)
            return super().decode(token_ids)

    assert "".join(pieces_of(ids, tokenizer=Counting(TOKENIZER.backend))) == TOKENIZER.decode(ids)
    assert decoded < 300 * len(ids)


def test_long_random_streams_are_exact() -> None:
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(TOKENIZER.vocab_size) for _ in range(400)]
        assert "".join(pieces_of(ids)) == TOKENIZER.decode(ids)
