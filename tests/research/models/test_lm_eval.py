"""Tasks of the lm-eval harness give the figures that one computes by hand from the model's logits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import yunmin
from tests.models import TEXT, trained_tokenizer, write_model
from tests.research.served import remote, served
from yunmin.cli import main
from yunmin.language_model import LanguageModel

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the harness and what it imports
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
TOKENIZER = trained_tokenizer()
DOCUMENTS: list[dict[str, Any]] = [
    {"question": "The quick brown", "choices": ["fox", "dog", "state in inputs"], "gold": 0},
    {"question": "for value in ", "choices": ["inputs", "she"], "gold": 0},
    {"question": "Grüße aus", "choices": ["Köln", "naïve café", "速い"], "gold": 1},
]
HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
metadata: {{version: 1}}
"""
TASKS = {
    "own_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "own_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "own_answer": """output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["s"], max_gen_toks: 12}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def model(folder: Path) -> LanguageModel:
    return yunmin.load(folder, device="cpu")


def log_likelihood(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor([[*context, *continuation]])
    logs = torch.log_softmax(model.runtime.forward(ids)[0].double(), -1)[len(context) - 1 : -1]
    greedy = logs.argmax(-1).tolist() == continuation
    return float(logs.gather(1, torch.tensor(continuation)[:, None]).sum()), greedy


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given) for given in arguments]


@pytest.fixture(params=["here", "behind a URL"])
def harness_model(request: pytest.FixtureRequest, model: LanguageModel) -> Iterator[Any]:
    from research.models.lm_eval_model import HarnessModel
    from research.models.local import LocalModel

    if request.param == "here":
        yield HarnessModel(LocalModel(model))
    else:
        with served(model) as app:
            yield HarnessModel(remote(app))


def test_every_kind_of_request_is_what_the_logits_say(harness_model: Any, model: LanguageModel) -> None:
    eos = TOKENIZER.encode("<|endoftext|>")
    pairs = [("The quick", " brown fox"), ("for value ", "in inputs"), ("", "Grüße"), (TEXT, "x"), ("The quick", "")]
    split = [
        (TOKENIZER.encode("The quick"), TOKENIZER.encode(" brown fox")),
        (TOKENIZER.encode("for value"), TOKENIZER.encode(" in inputs")),  # blanks belong to what follows
        (eos, TOKENIZER.encode("Grüße")),
        (TOKENIZER.encode(TEXT.rstrip()), TOKENIZER.encode("\nx")),
    ]
    found = harness_model.loglikelihood(requests(*pairs))
    expected = [log_likelihood(model, *ids) for ids in split]
    assert [value for value, _ in found[:4]] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] + [True]
    assert found[4][0] == 0.0
    best = model.generate(eos, max_tokens=1, temperature=0).text
    if TOKENIZER.encode(best) == list(model.generate(eos, max_tokens=1, temperature=0).token_ids):
        assert harness_model.loglikelihood(requests(("", best)))[0][1]

    rolling = harness_model.loglikelihood_rolling(requests((TEXT * 2,), ("",), ("x",)))
    wanted = [log_likelihood(model, eos, TOKENIZER.encode(text))[0] for text in (TEXT * 2, "x")]
    assert rolling == pytest.approx([wanted[0], 0.0, wanted[1]], rel=1e-5)

    asked = [("The quick", {"until": ["q"], "max_gen_toks": 20}), ("def", {"max_gen_toks": 3, "do_sample": False})]
    asked += [("x", {"max_gen_toks": 9, "do_sample": True})] * 2
    texts = harness_model.generate_until(requests(*asked))
    assert texts[2:] == [model.generate("x", max_tokens=9, seed=seed).text for seed in (0, 1)]
    assert texts[0] == model.generate("The quick", max_tokens=20, temperature=0, stop=["q"]).text
    assert texts[1] == model.generate("def", max_tokens=3, temperature=0).text


def test_a_continuation_that_joins_its_context_is_scored_from_where_the_ids_differ(
    harness_model: Any, model: LanguageModel
) -> None:
    eos = TOKENIZER.encode("<|endoftext|>")
    brown = TOKENIZER.encode("The quick brown fo")
    assert len(brown) < len(TOKENIZER.encode("The quick brown f"))  # " fo" is one token
    found = harness_model.loglikelihood(requests(("The quick brown f", "o"), (" ", "x")))
    expected = [log_likelihood(model, brown[:-1], brown[-1:]), log_likelihood(model, eos, TOKENIZER.encode(" x"))]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_way_to_generate_that_there_is_not_is_refused(harness_model: Any) -> None:
    with pytest.raises(yunmin.errors.RequestError, match="num_beams is not supported"):
        harness_model.generate_until(requests(("x", {"num_beams": 4})))


@pytest.mark.slow  # imports the harness, and datasets
def test_local_tasks_give_the_figures_by_hand(
    folder: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import datasets
    from lm_eval import evaluator

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # asks pip and the compiler, for seconds
    answers = [model.generate(d["question"], max_tokens=12, temperature=0, stop=["s"]).text for d in DOCUMENTS]
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(
            json.dumps(d | {"answer": a if n != 1 else "?"}) + "\n"
            for n, (d, a) in enumerate(zip(DOCUMENTS, answers, strict=True))
        )
    )
    for name, text in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + text)
    samples = tmp_path / "samples.jsonl"
    argv = ["eval", str(folder), "--lm-eval", ",".join(TASKS), "--lm-eval-include", str(tmp_path)]
    assert main([*argv, "--json", "--samples", str(samples)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)

    right = 0
    for document in DOCUMENTS:
        context = TOKENIZER.encode(document["question"].rstrip())
        values = [
            log_likelihood(model, context, TOKENIZER.encode(f"{document['question']} {choice}")[len(context) :])[0]
            for choice in document["choices"]
        ]
        right += values.index(max(values)) == document["gold"]
    assert result["tasks"]["own_choice"]["acc"] == pytest.approx(right / 3)
    eos = TOKENIZER.encode("<|endoftext|>")
    nats = -sum(log_likelihood(model, eos, TOKENIZER.encode(d["question"]))[0] for d in DOCUMENTS)
    n_bytes = sum(len(d["question"].encode()) for d in DOCUMENTS)
    assert result["tasks"]["own_text"]["byte_perplexity"] == pytest.approx(math.exp(nats / n_bytes), rel=1e-4)
    assert result["tasks"]["own_answer"]["exact_match"] == pytest.approx(2 / 3)
    assert result["examples"] == dict.fromkeys(TASKS, 3)
    assert len(samples.read_text().splitlines()) == 9
    assert captured.err == ""

    assert main([*argv[:2], "--lm-eval", "own_text,none_such", "--lm-eval-include", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("yunmin: error: --lm-eval-include: expected a folder")
