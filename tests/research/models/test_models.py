"""A model here and the same one behind a URL give the same texts and the same probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette

import research.models.local
import yunmin
from research.models.local import LocalModel
from research.models.model import Scored, TextModel, open_model
from research.models.remote import RemoteModel
from research.models.remote_tokenizer import cut_text
from research.perplexity import evaluate_perplexity
from tests.models import TEXT, random_pillars, small_config, trained_tokenizer, write_model
from tests.research.served import remote, served
from yunmin.errors import ConfigError, DataError, RequestError, TokenizerError
from yunmin.language_model import LanguageModel

TOKENIZER = trained_tokenizer(290)
PROMPTS = ["def scan(", "The quick brown fox jumps", "", "Grüße aus Köln: naïve"]
EOS = TOKENIZER.encode("<|endoftext|>")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """Its vocabulary has padding, which no probability may go to."""
    config = small_config(vocab_size=304, n_tokens=290)
    return yunmin.load(write_model(tmp_path_factory.mktemp("model"), config, tokenizer=TOKENIZER), device="cpu")


@pytest.fixture(scope="module")
def app(model: LanguageModel) -> Iterator[Starlette]:
    with served(model) as found:
        yield found


@pytest.fixture(params=["here", "behind a URL"])
def text_model(request: pytest.FixtureRequest, model: LanguageModel, app: Starlette) -> TextModel:
    return LocalModel(model, batch_size=3) if request.param == "here" else remote(app, concurrency=3)


def by_hand(model: LanguageModel, ids: list[int], first: int = 1) -> Scored:
    """Token by token, over the ids that the tokenizer knows."""
    found, greedy = [], []
    logits, state = model.prefill(ids[:1])
    for position, token_id in enumerate(ids[1:], 1):
        known = logits[: TOKENIZER.vocab_size].double()
        if position >= first:
            found.append(float(torch.log_softmax(known, 0)[token_id]))
            greedy.append(bool(known[token_id] == known.max()))
        logits, state = model.step(token_id, state)
    return Scored(np.array(found), np.array(greedy))


def test_completions_are_what_each_prompt_gives_alone(text_model: TextModel, model: LanguageModel) -> None:
    found = text_model.complete(PROMPTS, max_tokens=9)
    prompts = [prompt or EOS for prompt in PROMPTS]
    assert found == [[model.generate(prompt, max_tokens=9, temperature=0).text] for prompt in prompts]


def test_each_sample_of_each_prompt_draws_with_a_seed_of_its_own(text_model: TextModel, model: LanguageModel) -> None:
    found = text_model.complete(PROMPTS[:2], max_tokens=12, temperature=0.9, top_p=0.95, seed=5, n=10)
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95}
    for index, (prompt, samples) in enumerate(zip(PROMPTS, found, strict=False)):
        seeds = range(5 + 10 * index, 15 + 10 * index)
        assert samples == [model.generate(prompt, seed=seed, **options).text for seed in seeds]


def test_a_stop_string_ends_a_completion_and_is_no_part_of_it(text_model: TextModel) -> None:
    ((whole,),) = text_model.complete(["The quick"], max_tokens=30)
    stop = whole[len(whole) // 2]
    ((cut,),) = text_model.complete(["The quick"], max_tokens=30, stop=[stop])
    assert cut == whole.partition(stop)[0]


def test_probabilities_are_those_of_reading_token_by_token(text_model: TextModel, model: LanguageModel) -> None:
    ids = TOKENIZER.encode(TEXT)
    sequences, first = [ids[:40], ids[3:5], ids[7:70], ids[:9], ids[1:60]], [1, 1, 60, 5, 20]
    for found, sequence, begin in zip(text_model.score(sequences, first), sequences, first, strict=True):
        expected = by_hand(model, sequence, begin)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)
        assert found.greedy.tolist() == expected.greedy.tolist()


def test_a_greedy_continuation_is_greedy_and_another_is_not(text_model: TextModel, model: LanguageModel) -> None:
    prompt = TOKENIZER.encode("The quick")
    chosen = list(model.generate(prompt, max_tokens=6, temperature=0).token_ids)
    other = [*chosen[:-1], (chosen[-1] + 1) % TOKENIZER.vocab_size]
    found = text_model.score([[*prompt, *chosen], [*prompt, *other]], [len(prompt)] * 2)
    assert found[0].greedy.tolist() == [True] * 6
    assert found[1].greedy.tolist() == [True] * 5 + [False]


def test_a_long_sequence_is_read_on_from_its_state(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [TOKENIZER.encode(TEXT), TOKENIZER.encode(TEXT)[:8], TOKENIZER.encode(TEXT)[:9]]
    first = [30, 1, 8]
    whole = LocalModel(model).score(sequences, first)
    monkeypatch.setattr(research.models.local, "_CHUNK", 7)
    for found, expected in zip(LocalModel(model).score(sequences, first), whole, strict=True):
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)
        assert found.greedy.tolist() == expected.greedy.tolist()


def test_a_checkpoint_with_gates_is_scored_and_generates_as_it_was_trained(tmp_path: Path) -> None:
    config = small_config(n_tokens=290)
    folder = write_model(tmp_path / "trained", config, tokenizer=TOKENIZER, pillars=random_pillars(config))
    trained = yunmin.load(folder, device="cpu")
    assert trained.runtime.name == "torch"
    sequences = [TOKENIZER.encode(TEXT)[:20], TOKENIZER.encode(TEXT)[5:40]]
    for scored, sequence in zip(LocalModel(trained).score(sequences), sequences, strict=True):
        np.testing.assert_allclose(scored.logprobs, by_hand(trained, sequence).logprobs, atol=1e-4)
    (found,) = LocalModel(trained).complete(["def"], max_tokens=8)
    assert found == [trained.generate("def", max_tokens=8, temperature=0).text]


def test_a_place_from_which_nothing_is_scored_is_refused(model: LanguageModel) -> None:
    with pytest.raises(DataError, match="of 3 tokens from 3"):
        LocalModel(model).score([[1, 2, 3]], [3])


@pytest.mark.parametrize(("window", "stride", "most"), [(64, 64, None), (32, 8, None), (33, 20, 77)])
def test_perplexity_behind_a_url_equals_that_here(
    model: LanguageModel, app: Starlette, window: int, stride: int, most: int | None
) -> None:
    texts = [TEXT, "a second text, with its own words\n", "dritter Text – größer 速い"]
    here, there = (
        evaluate_perplexity(found, texts, window=window, stride=stride, max_tokens=most)
        for found in (model, remote(app))
    )
    assert {name: here[name] for name in ("tokens", "bytes", "words")} == {
        name: there[name] for name in ("tokens", "bytes", "words")
    }
    for name in ("token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert there[name] == pytest.approx(here[name], rel=1e-4)
        assert there["intervals"][name] == pytest.approx(here["intervals"][name], rel=1e-4)


def test_a_server_that_reads_less_than_the_window_says_so(model: LanguageModel) -> None:
    with served(model, MAX_PROMPT_TOKENS="60") as app:
        found = remote(app)
        assert list(found.tokenizer.encoding(TEXT * 3).ids) == TOKENIZER.encode(TEXT * 3)  # in pieces
        assert evaluate_perplexity(found, [TEXT], window=59, stride=59)["tokens"] > 100
        with pytest.raises(DataError, match=r"reads at most 60 tokens at once .* got 61; .* smaller --window"):
            evaluate_perplexity(found, [TEXT], window=60, stride=60)


@given(st.text(alphabet=st.sampled_from("abz09  \n'._é速👍"), max_size=80), st.integers(12, 40))
def test_ids_of_pieces_are_those_of_the_whole_text(text: str, most_bytes: int) -> None:
    try:
        pieces = cut_text(text, most_bytes)
    except DataError:
        return  # no place to cut at
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= most_bytes for piece in pieces)
    assert [i for piece in pieces for i in TOKENIZER.encode(piece)] == TOKENIZER.encode(text)


def test_text_without_a_blank_to_cut_at_is_refused() -> None:
    with pytest.raises(DataError, match="10 bytes without a blank"):
        cut_text("a" * 11, 10)


def test_places_of_tokens_are_found_behind_a_url(app: Starlette) -> None:
    text = "速い naïve the 🙂"
    expected, found = TOKENIZER.encoding(text), remote(app).tokenizer.encoding(text)
    assert [found.offsets[i][1] for i in range(len(expected.ids))] == [end for _, end in expected.offsets]


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    bare = yunmin.load(write_model(tmp_path / "bare"), device="cpu")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        LocalModel(bare)
    with served(bare) as app, pytest.raises(TokenizerError, match="no tokenizer"):
        remote(app)


def test_impossible_sampling_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="temperature: must be a number"):
        LocalModel(model).complete(["a"], max_tokens=3, temperature=-1.0)


@pytest.mark.parametrize(
    "url", ["http://", "http://host:x", "http://name:secret@host:80", "https://host/v1?key=secret"]
)
def test_a_url_that_is_none_of_a_server_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ConfigError, match="expected a server's URL") as caught:
        open_model(url)
    assert "secret" not in str(caught.value)


def test_urls_may_end_in_the_path_of_the_api(app: Starlette) -> None:
    import httpx

    for url in ("http://test/v1/", "http://test/v1/completions", "http://test"):
        assert RemoteModel(url, transport=httpx.ASGITransport(app)).name == "http://test"
