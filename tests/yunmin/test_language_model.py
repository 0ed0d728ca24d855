"""`yunmin.load(...)` and what it can do: generation equals transformers' and every way of asking agrees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import yunmin
from tests.models import hf_model, random_pillars, random_tensors, small_config, write_adapters, write_model
from yunmin.checkpoint import write_checkpoint
from yunmin.constraints import Constraint
from yunmin.errors import ConfigError, RequestError, TokenizerError, YunminError
from yunmin.generate import Completion, Generation, Piece
from yunmin.language_model import LanguageModel
from yunmin.sampler import Sampler
from yunmin.sampling import SamplingParams, sampling_params_from
from yunmin.tokenizer import Tokenizer


@pytest.fixture
def model(model_folder: Path) -> LanguageModel:
    return yunmin.load(model_folder)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}])
@pytest.mark.parametrize("eos", [None, 5, [5, 60]])
def test_greedy_generation_equals_transformers(tmp_path: Path, options: dict[str, Any], eos: Any) -> None:
    theirs = hf_model(seed=4, use_bias=True, tie_word_embeddings=False, eos_token_id=eos)
    theirs.generation_config.eos_token_id = eos
    theirs.save_pretrained(tmp_path)
    ours = yunmin.load(tmp_path)
    eos_ids = {eos} if isinstance(eos, int) else set(eos or [])
    assert set(ours.config.eos_token_ids) == eos_ids
    for prompt in ([1, 2, 3], [9], list(range(40, 60))):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        output = theirs.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False, **options)
        expected = output[0, len(prompt) :].tolist()
        completion = ours.generate(prompt, max_tokens=40, temperature=0, **options)
        ends = bool(expected) and expected[-1] in eos_ids
        assert list(completion.token_ids) == (expected[:-1] if ends else expected)
        assert completion.finish_reason == ("stop" if ends else "length")
        assert completion.prompt_tokens == len(prompt)


def test_stream_pieces_concatenate_to_the_generated_text(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    for seed in range(5):
        params: dict[str, Any] = {"max_tokens": 60, "seed": seed, "temperature": 1.5}
        completion = model.generate("Grüße ", **params)
        pieces = list(model.stream("Grüße ", **params))
        assert "".join(p.text for p in pieces) == completion.text
        assert tuple(p.token_id for p in pieces if p.token_id is not None) == completion.token_ids
        assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert completion.text == model.tokenizer.decode(completion.token_ids)


def test_a_stop_string_ends_the_text_before_it(model: LanguageModel) -> None:
    whole = model.generate("abc", max_tokens=60, seed=3)
    stop = whole.text[10:12]
    cut = model.generate("abc", max_tokens=60, seed=3, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) <= len(whole.token_ids)


def test_max_tokens_is_exact(model: LanguageModel) -> None:
    for n in (1, 2, 17):
        completion = model.generate([1, 2], max_tokens=n, seed=1)
        assert len(completion.token_ids) == n or completion.finish_reason == "stop"


def test_no_tokens_are_an_empty_completion_that_ended_by_length(model: LanguageModel) -> None:
    for prompt in ("abc", model.snapshot("abc")):
        assert model.generate(prompt, max_tokens=0) == Completion("", (), "length", len(model.encode("abc")))
        assert list(model.stream(prompt, max_tokens=0)) == [Piece(None, "", "length")]
    assert model.generate("abc", max_tokens=0, logprobs=2).logprobs == ()


def test_a_stop_id_ends_the_text_and_is_no_part_of_it(model: LanguageModel) -> None:
    whole = model.generate("abc", max_tokens=60, seed=3)
    stop_id = whole.token_ids[10]
    cut = model.generate("abc", max_tokens=60, seed=3, stop_token_ids=[stop_id])
    assert cut.token_ids == whole.token_ids[: whole.token_ids.index(stop_id)]
    assert model.tokenizer is not None
    assert cut.text == model.tokenizer.decode(cut.token_ids)
    assert cut.finish_reason == "stop"


def test_the_end_of_text_is_passed_over_where_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = yunmin.load(write_model(tmp_path, small_config(eos_token_ids=(0, 7)), tokenizer=tokenizer))
    forced: dict[str, Any] = {"max_tokens": 4, "logit_bias": {7: 100}, "temperature": 0}
    assert model.generate("abc", **forced) == Completion("", (), "stop", len(model.encode("abc")))
    assert model.generate("abc", **forced, ignore_eos=True).token_ids == (7, 7, 7, 7)
    stopped = model.generate("abc", **forced, ignore_eos=True, stop_token_ids=[7])
    assert (stopped.token_ids, stopped.finish_reason) == ((), "stop")


def test_logprobs_are_the_models_own_whatever_is_done_to_choose(model: LanguageModel) -> None:
    params: dict[str, Any] = {"max_tokens": 12, "seed": 1, "temperature": 2.0, "top_k": 9, "logit_bias": {5: 3.0}}
    plain = model.generate("abc", **params)
    completion = model.generate("abc", **params, logprobs=3)
    assert completion.token_ids == plain.token_ids
    assert (plain.logprobs, plain.top_logprobs) == (None, None)
    assert completion.logprobs is not None
    assert completion.top_logprobs is not None
    ids = [*model.encode("abc"), *completion.token_ids]
    with torch.no_grad():
        rows = torch.log_softmax(model.runtime.forward(torch.tensor([ids]))[0, -13:-1].double(), -1)
    for row, token_id, logprob, top in zip(
        rows, completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
    ):
        assert logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    pieces = list(model.stream("abc", **params, logprobs=3))
    assert tuple(p.logprob for p in pieces) == completion.logprobs
    assert tuple(p.top_logprobs for p in pieces) == completion.top_logprobs


@pytest.mark.parametrize("options", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0, "repetition_penalty": 1.5}])
def test_penalties_of_a_generation_count_its_own_tokens(model: LanguageModel, options: dict[str, Any]) -> None:
    prompt = model.encode("abcabc")
    completion = model.generate(prompt, max_tokens=25, temperature=0, **options)
    sampler = Sampler(sampling_params_from({"temperature": 0, **options}), model.config.n_tokens, prompt)
    logits, state = model.prefill(prompt)
    for token_id in completion.token_ids:
        assert sampler.choose(logits) == token_id
        sampler.record(token_id)
        logits, state = model.step(token_id, state)


def test_a_snapshot_forks_and_continues_as_the_whole_prompt_does(model: LanguageModel) -> None:
    shared = model.snapshot("The quick ")
    before = shared.state.copy()
    ids = model.encode("The quick ")
    for seed in range(3):
        params: dict[str, Any] = {"max_tokens": 20, "seed": seed}
        assert model.generate(shared, **params) == model.generate(ids, **params)
    tail = model.encode("brown")
    longer = model.snapshot(tail, after=shared)
    assert longer.token_ids == (*ids, *tail)
    assert model.generate(longer, max_tokens=20, temperature=0) == model.generate(
        ids + tail, max_tokens=20, temperature=0
    )
    assert all(map(torch.equal, before.ssm + before.conv, shared.state.ssm + shared.state.conv))


def test_prefill_and_step_are_the_models_logits(model: LanguageModel) -> None:
    logits, state = model.prefill([1, 2, 3])
    logits, state = model.step(4, state)
    logits, _ = model.prefill([5, 6], state)
    with torch.no_grad():
        expected = model.runtime.forward(torch.tensor([[1, 2, 3, 4, 5, 6]]))[0, -1]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "params", "field"),
    [
        ("", {}, "prompt"),
        ([], {}, "prompt"),
        ([300], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1.0], {}, "prompt"),
        ([True], {}, "prompt"),
        ("a", {"max_tokens": -1}, "max_tokens"),
        ("a", {"temperature": -1}, "temperature"),
        ("a", {"max_token": 1}, "max_token"),
        ("a", {"stop_token_ids": [300]}, "stop_token_ids"),
        ("a", {"logit_bias": {"300": 1}}, "logit_bias"),
        ("a", {"constraint": Constraint("regex", "(")}, "regex"),
    ],
)
def test_an_impossible_request_is_refused_before_any_piece(
    model: LanguageModel, prompt: Any, params: dict[str, Any], field: str
) -> None:
    for ask in (model.generate, model.stream):
        with pytest.raises(RequestError) as caught:
            ask(prompt, **params)
        assert caught.value.field == field


def test_an_impossible_step_is_refused(model: LanguageModel) -> None:
    with pytest.raises(RequestError, match="token ids must lie in"):
        model.step(300, model.runtime.new_state(1))


def test_without_a_tokenizer_ids_work_and_text_is_refused(tmp_path: Path) -> None:
    model = yunmin.load(write_model(tmp_path))
    completion = model.generate([1, 2], max_tokens=5, seed=0)
    assert completion.text == ""
    assert len(completion.token_ids) == 5
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json, so prompts must be token ids"):
        model.generate("text")
    with pytest.raises(RequestError, match="stop: needs a tokenizer"):
        model.generate([1], stop="x")


@pytest.mark.parametrize("runtime", ["native", "torch"])
def test_a_model_that_gives_nan_says_so(tmp_path: Path, runtime: Literal["native", "torch"]) -> None:
    config = small_config()
    tensors = random_tensors(config)
    tensors["backbone.norm_f.weight"][0] = float("nan")
    write_checkpoint(tmp_path, config, tensors)
    model = yunmin.load(tmp_path, runtime=runtime)
    with pytest.raises(YunminError, match="not finite"):
        model.generate([1], max_tokens=2)


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_refused(model_folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{device}' cannot be used"):
        yunmin.load(model_folder, device=device)


def test_the_fingerprint_sees_config_weights_gates_and_adapters(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = small_config()
    folders = {
        "plain": write_model(tmp_path / "plain"),
        "weights": write_model(tmp_path / "weights", seed=1),
        "config": write_model(tmp_path / "config", small_config(norm_eps=2e-5)),
        "gates": write_model(tmp_path / "gates", pillars=random_pillars(config)),
        "adapters": write_model(tmp_path / "adapters"),
    }
    write_adapters(folders["adapters"], config)
    prints = {name: yunmin.load(folder).fingerprint for name, folder in folders.items()}
    assert len(set(prints.values())) == len(prints)
    assert yunmin.load(folders["plain"]).fingerprint == prints["plain"]


def test_a_finished_generation_must_not_go_on(model: LanguageModel) -> None:
    generation = Generation(SamplingParams(max_tokens=1), [1], model.config, model.tokenizer)
    generation.advance(torch.zeros(300))
    with pytest.raises(AssertionError):
        generation.advance(torch.zeros(300))


def test_importing_yunmin_imports_no_torch() -> None:
    code = "import sys, yunmin; assert not {'torch', 'numpy', 'transformers'} & set(sys.modules); print(yunmin.load)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "function load" in result.stdout
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = yunmin.lod
