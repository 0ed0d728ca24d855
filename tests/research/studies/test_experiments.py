"""Experiments: what their keys depend on, that none is done twice, and that a stopped one ends as if never stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from research.studies import experiments
from research.studies.experiments import CALLS_FILE, Experiment, Interrupted, Laboratory, read_result
from research.studies.measures import Measures
from research.studies.texts import Split, split_text
from tests.models import TEXT
from tests.training.runs import interrupt_after
from yunmin.corpus import read_documents
from yunmin.errors import ConfigError, DataError, DivergenceError

SMALL: dict[str, Any] = {
    "sequence_length": 16,
    "batch_size": 4,
    "max_steps": 12,
    "validation_tokens": 64,
    "learning_rate": 1e-2,
}
BASE: dict[str, Any] = {
    **SMALL,
    "d_model": 32,
    "n_layers": 1,
    "vocab_size": 280,
    "scan_mode": "none",
    "enable_masking": False,
    "enable_peft": False,
}
PILLARS: dict[str, Any] = {**SMALL, "channel_multiple": 16, "target_sparsity": 0.5, "peft_r": 2}


def write_texts(folder: Path) -> Split:
    folder.mkdir(parents=True)
    source = folder / "source.jsonl"
    source.write_text("".join(f'{{"text": "number {i}: {" ".join(TEXT.split()[i : i + 60])}"}}\n' for i in range(60)))
    return split_text([str(source)], folder / "texts", tune_share=0.1, test_share=0.1)


def experiment(texts: Split, **changes: Any) -> Experiment:
    own = {"data": str(texts.train), "validation_data": str(texts.tune)}
    base = Experiment({**BASE, **own}, label="base")
    return Experiment({**PILLARS, **own, **changes}, start=base, label="all")


def laboratory(folder: Path, texts: Split) -> Laboratory:
    return Laboratory(folder, Measures(str(texts.test), test_tokens=100, window=32, int4=True, prompt_tokens=8))


def test_what_diverged_is_not_trained_again(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    place, wanted = laboratory(tmp_path / "experiments", texts), experiment(texts)
    assert place.failure(wanted) is None
    place.give_up(wanted, "the loss is nan")
    assert place.failure(dataclasses.replace(wanted, label="again")) == "the loss is nan"
    with pytest.raises(DivergenceError, match="all: the loss is nan"):
        place.run(wanted)
    assert place.result(wanted) is None


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Laboratory, Split, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("laboratory")
    texts = write_texts(folder / "texts")
    found = laboratory(folder / "experiments", texts)
    return found, texts, found.run(experiment(texts))


def test_a_result_says_what_was_trained_cut_and_measured(done: tuple[Laboratory, Split, dict[str, Any]]) -> None:
    found, texts, result = done
    assert list(result["validation_perplexity"]) == ["dense", "gates", "hard_gates", "recover", "adapters"]
    assert result["layers"]["channel_sparsity"] == [0.5]
    assert result["cost"]["state_bytes"] == result["dense_cost"]["state_bytes"] / 2
    assert result["adapted_parameters"] == result["trainable_parameters"]["adapters"]
    assert sum(len(names) for names in result["layers"]["allocation"].values()) == 4
    assert result["test"]["tokens"] == result["int4"]["tokens"] == 100
    assert result["test"]["source"] == "test.jsonl"
    assert result["latency"]["prompt_tokens"] == 8
    base = found.result(experiment(texts).start)  # type: ignore[arg-type]
    assert base is not None
    assert result["start"] == base["key"]
    assert (base["layers"]["allocation"], base["cost"]) == (None, base["dense_cost"])


def test_a_finished_experiment_is_read(
    done: tuple[Laboratory, Split, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, texts, result = done
    monkeypatch.setattr(experiments, "train", None)
    monkeypatch.setattr(experiments, "resume", None)
    again = laboratory(found.folder, texts)
    assert again.run(dataclasses.replace(experiment(texts), label="another name")) == result
    assert again.result(experiment(texts, seed=1)) is None


def test_another_way_to_measure_trains_nothing_that_was_kept(
    done: tuple[Laboratory, Split, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, texts, _ = done
    monkeypatch.setattr(experiments, "train", None)
    base = experiment(texts).start
    assert base is not None
    other = Laboratory(found.folder, Measures(str(texts.tune), test_tokens=50, window=32))
    result = other.run(base, keep=True)
    assert (result["test"]["tokens"], result["test"]["source"]) == (50, "tune.jsonl")
    before = found.result(base)
    assert before is not None
    assert result["validation_perplexity"] == before["validation_perplexity"]


def test_keys_depend_on_contents_and_settings_not_on_places(
    done: tuple[Laboratory, Split, dict[str, Any]], tmp_path: Path
) -> None:
    found, texts, _ = done
    elsewhere = write_texts(tmp_path / "texts")
    key = found.key(experiment(texts))
    assert laboratory(tmp_path, elsewhere).key(experiment(elsewhere)) == key
    assert found.key(experiment(texts, log_interval=3)) == key  # records change nothing that is learned
    others = [
        experiment(texts, seed=1),
        experiment(texts, peft_r=3),
        dataclasses.replace(experiment(texts), start=None),
    ]
    assert len({key, *map(found.key, others)}) == 4
    elsewhere.train.write_text(elsewhere.train.read_text() + '{"text": "one more"}\n')
    assert laboratory(tmp_path, elsewhere).key(experiment(elsewhere)) != key


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"run_name": "mine"}, "run_name: a study decides it"), ({"pefft_r": 4}, "all: unknown key 'pefft_r'")],
)
def test_impossible_experiments_are_refused_before_anything_runs(
    done: tuple[Laboratory, Split, dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    found, texts, _ = done
    with pytest.raises(ConfigError, match=message):
        found.key(experiment(texts, **changes))


@pytest.mark.slow
def test_a_stopped_experiment_ends_as_one_that_never_stopped(
    done: tuple[Laboratory, Split, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, texts, whole = done
    stopped = laboratory(tmp_path, texts)
    stopped.run(experiment(texts).start, keep=True)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        interrupt_after(7, patch)
        with pytest.raises(Interrupted, match="all stopped after step 7 of 12"):
            stopped.run(experiment(texts))
    assert stopped.result(experiment(texts)) is None
    calls = read_result(stopped.folder / whole["key"] / CALLS_FILE)
    assert calls is not None
    result = stopped.run(experiment(texts))
    assert result["seconds"]["train"] > calls["seconds"] > 0
    assert result["training_memory_bytes"] >= calls["training_memory_bytes"]
    for part in ("key", "validation_perplexity", "test", "int4", "trainable_parameters", "layers"):
        assert result[part] == whole[part], part


def test_the_three_texts_share_no_document_and_are_the_same_again(tmp_path: Path) -> None:
    first, second = write_texts(tmp_path / "a"), write_texts(tmp_path / "b")
    parts = [read_documents(str(path)) for path in (first.train, first.tune, first.test)]
    assert [len(part) for part in parts] == [48, 6, 6]
    assert len({document for part in parts for document in part}) == 60
    assert first.test.read_bytes() == second.test.read_bytes()


def test_a_text_too_short_for_three_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(DataError, match="1 documents leave none for"):
        split_text([str(tmp_path / "short.txt")], tmp_path)
