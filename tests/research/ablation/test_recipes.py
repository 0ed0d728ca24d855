"""What each experiment of a study is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from research.ablation.grid import distinct, planned
from research.ablation.recipes import Recipes
from research.ablation.settings import Settings, default_settings
from research.ablation.sources import prepare_texts
from research.studies.experiments import Laboratory
from tests.models import write_model
from tests.research.ablation.fakes import tiny_recipes, tiny_settings
from training.config import ARCHITECTURE_KEYS
from training.phases import plan_phases
from yunmin.corpus import read_documents, texts_of
from yunmin.errors import TokenizerError
from yunmin.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> Recipes:
    return tiny_recipes(tmp_path_factory.mktemp("study"))


def test_all_start_from_their_seeds_base_read_the_same_text_and_take_as_many_steps(recipes: Recipes) -> None:
    for setting in distinct(planned(recipes.settings.grid, range(2))):
        experiment = recipes.experiment(setting)
        config = experiment.config()
        assert experiment.start == recipes.base(setting.seed)
        assert config.seed == setting.seed
        assert config.data == (str(recipes.texts.task.train),)
        assert config.validation_data == (str(recipes.texts.task.tune),)
        assert config.max_steps == recipes.steps == 12
        assert not set(ARCHITECTURE_KEYS) & experiment.training.keys()


def test_pillars_are_switched_by_the_combination_alone(recipes: Recipes) -> None:
    for setting in distinct(planned(recipes.settings.grid, [0])):
        config = recipes.experiment(setting).config()
        assert (config.scan_mode != "none") == setting.uses("scan")
        assert config.enable_masking == setting.uses("masking")
        assert config.enable_peft == setting.uses("peft")
        if setting.uses("masking"):
            assert (config.masking_tau, config.target_sparsity) == (0.5, setting.point["sparsity"])
        if setting.uses("peft"):
            assert (config.peft_r, config.peft_alpha, config.lora_share, config.ia3_share) == (2, 4, 0.2, 0.2)


def test_peft_alone_trains_nothing_but_adapters_and_the_baseline_everything(recipes: Recipes) -> None:
    phases = {
        setting.combination: [str(span.phase) for span in plan_phases(recipes.experiment(setting).config(), 100)]
        for setting in distinct(planned(recipes.settings.grid, [0]))
    }
    assert phases["baseline"] == phases["scan"] == ["dense"]
    assert phases["peft"] == phases["scan+peft"] == ["adapters"]
    assert phases["masking"] == ["dense", "gates", "recover"]
    assert phases["all"] == phases["masking+peft"] == ["dense", "gates", "recover", "adapters"]


def test_no_two_different_settings_are_the_same_experiment(recipes: Recipes, tmp_path: Path) -> None:
    laboratory = Laboratory(tmp_path, recipes.measures)
    settings = distinct(planned(recipes.settings.grid, range(2)))
    keys = {laboratory.key(recipes.experiment(setting)) for setting in settings}
    assert len(keys | {laboratory.key(base) for seed in (0, 1) if (base := recipes.base(seed))}) == len(settings) + 2


def test_steps_are_epochs_over_the_text_in_the_models_own_tokens(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path, training={**tiny_settings(tmp_path).training, "max_steps": None}, epochs=3)
    recipes = Recipes(settings, prepare_texts(settings, tmp_path / "texts"))
    base = texts_of(read_documents(str(recipes.texts.base)))
    tokenizer = Tokenizer.train(base, 280)  # three documents: of so few the end is held out, which has no other words
    tokens = sum(1 + len(tokenizer.encode(text)) for text in texts_of(read_documents(str(recipes.texts.task.train))))
    assert recipes.steps == pytest.approx(3 * tokens / 16 / 2, rel=0.1)


def test_texts_share_no_document_and_do_not_change_when_the_sources_do(tmp_path: Path) -> None:
    settings = tiny_settings(tmp_path)
    texts = prepare_texts(settings, tmp_path / "texts")
    parts = [set(read_documents(str(p))) for p in (texts.base, texts.task.train, texts.task.tune, texts.task.test)]
    assert all(parts)
    assert len(set().union(*parts)) == sum(map(len, parts))
    (tmp_path / "documents" / "00.txt").write_text("something else\n")
    assert prepare_texts(settings, tmp_path / "texts") == texts
    assert [set(read_documents(str(p))) for p in (texts.base, texts.task.train)] == parts[:2]


def test_without_sources_documentation_is_the_task_and_code_the_base(tmp_path: Path) -> None:
    texts = prepare_texts(default_settings("pilot"), tmp_path)
    from pydoc_data.topics import topics

    task = [d.text for p in (texts.task.train, texts.task.tune, texts.task.test) for d in read_documents(str(p))]
    assert sorted(task) == sorted(set(topics.values()))
    assert all("def " in d.text or "import " in d.text or len(d.text) < 5000 for d in read_documents(str(texts.base)))
    assert len(read_documents(str(texts.base))) <= 80


def test_a_task_that_takes_the_whole_library_leaves_its_training_text_to_the_base(tmp_path: Path) -> None:
    texts = prepare_texts(tiny_settings(tmp_path, data=("stdlib",)), tmp_path / "texts")
    task = set(read_documents(str(texts.task.train)))
    assert set(read_documents(str(texts.base))) <= task


def test_a_checkpoint_takes_the_place_of_base_models(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = write_model(tmp_path / "model", tokenizer=tokenizer)
    recipes = tiny_recipes(tmp_path, checkpoint=str(model))
    assert recipes.base(0) is None
    experiment = recipes.experiment(distinct(planned(recipes.settings.grid, [0]))[0])
    assert (experiment.start, experiment.training["checkpoint"]) == (None, str(model))
    assert recipes.model.d_model == 24
    assert not recipes.texts.base.exists()
    bare = tiny_recipes(tmp_path, checkpoint=str(write_model(tmp_path / "bare")), training={"sequence_length": 16})
    with pytest.raises(TokenizerError, match="a study needs a tokenizer"):
        _ = bare.steps


def test_settings_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    for settings in (default_settings("research"), tiny_settings(tmp_path, trials=7, checkpoint="x")):
        settings.write(tmp_path)
        assert Settings.read(tmp_path) == settings
