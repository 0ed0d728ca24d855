"""The loop: it learns, keeps moments, follows its schedule, validates, and stops where it must."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import yunmin
from tests.models import TEXT, random_ids, small_config, trained_tokenizer, write_adapters, write_model
from tests.training.runs import small_run
from training.checkpointing import checkpoints_of
from training.config_file import load_config
from training.phases import plan_phases
from training.run import resolved, train
from training.schedule import rate_factor, rate_factor_in_run
from training.start import continue_from, start_from
from training.trainer import TrainingResult
from yunmin.axes import expected_shapes
from yunmin.checkpoint import load_checkpoint
from yunmin.errors import ConfigError, TokenizerError, TrainingError
from yunmin.model import MambaLM
from yunmin.perplexity import perplexity


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 30, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> TrainingResult:
    """A run on text, long enough to learn from."""
    options = {"data": str(text_file), "vocab_size": 290, "max_steps": 120, "learning_rate": 1e-2, "dense_share": 0.7}
    return train(small_run(tmp_path_factory.mktemp("learned"), **options, validation_interval=30, tensorboard=True))


def _lines(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_the_loss_falls_and_its_parts_add_up(learned: TrainingResult) -> None:
    lines = _lines(learned.run, "train")
    assert lines[0]["cross_entropy"] == pytest.approx(math.log(290), abs=0.5)
    assert lines[-1]["cross_entropy"] < lines[0]["cross_entropy"] - 1.5
    for line in lines:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["regularization"], rel=1e-5)
        assert (line["regularization"] != 0) == (line["phase"] == "gates" and line["target"] > 0)


def test_validation_runs_at_intervals_and_at_the_end_of_each_phase(learned: TrainingResult) -> None:
    lines = _lines(learned.run, "validation")
    ends = {span.phase: span.stop for span in plan_phases(load_config(learned.run / "config.yaml"), 120)}
    assert {(line["at"], line["step"]) for line in lines if line["at"] != "interval"} == {
        *ends.items(),
        ("hard_gates", ends["gates"]),  # type: ignore[index]
    }
    assert {line["step"] for line in lines if line["at"] == "interval"} == {30, 60, 90} - set(ends.values())
    assert learned.validations == {line["at"]: line["perplexity"] for line in lines if line["at"] != "interval"}
    assert all(1 < value < 100 for value in learned.validations.values())


def test_a_checkpoint_computes_the_validation_perplexity_of_its_step(learned: TrainingResult) -> None:
    config = load_config(learned.run / "config.yaml")
    model = yunmin.load(learned.run, device="cpu")
    held_out = continue_from(config, load_checkpoint(learned.checkpoint)).data.validation
    measured = perplexity(model.runtime.forward, held_out, window=config.sequence_length, stride=config.sequence_length)
    assert measured.token_perplexity == pytest.approx(learned.validations["adapters"], rel=1e-5)
    assert model.generate("def scan(", max_tokens=8, temperature=0).token_ids


def test_a_checkpoint_loads_in_transformers_with_the_same_logits(learned: TrainingResult) -> None:
    from transformers import AutoTokenizer, MambaForCausalLM

    theirs, loading = MambaForCausalLM.from_pretrained(learned.checkpoint, output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    own = load_checkpoint(learned.checkpoint)
    ids = random_ids(own.config, 2, 17)
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        logits = MambaLM.from_tensors(own.config, own.tensors)(ids)
    assert float((logits - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    tokenizer = AutoTokenizer.from_pretrained(learned.checkpoint)
    assert own.tokenizer is not None
    assert tokenizer(TEXT)["input_ids"] == own.tokenizer.encode(TEXT)
    assert tokenizer.eos_token_id == own.tokenizer.eos_id == own.config.eos_token_ids[0]


def test_the_tokenizer_is_trained_on_training_text_only(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcabcabd " * 300)
    (tmp_path / "held.txt").write_text("xyzzy " * 300)
    options = {"data": str(tmp_path / "train.txt"), "validation_data": str(tmp_path / "held.txt"), "vocab_size": 300}
    start = start_from(small_run(tmp_path, **options))
    tokens = json.loads(start.tokenizer_files["tokenizer.json"])["model"]["vocab"]
    assert any("abc" in token for token in tokens)
    assert not any("xy" in token for token in tokens)


def test_gates_end_exactly_and_tensorboard_has_events(learned: TrainingResult) -> None:
    pillars = load_file(learned.checkpoint / "pillars.safetensors")
    kept = [int((pillars[f"channel_gate.{layer}"] > 0).sum()) for layer in range(2)]
    assert kept == [24, 24]
    assert list((learned.run / "tensorboard").glob("events.*"))
    assert learned.trainable_parameters["adapters"] < 0.2 * learned.trainable_parameters["dense"]


def test_moments_survive_from_dense_to_recovery_and_adapters_start_afresh(tmp_path: Path) -> None:
    run = train(small_run(tmp_path)).run
    steps = {}
    for checkpoint, done in zip(checkpoints_of(run), (6, 12, 18, 6), strict=True):
        state = load_file(checkpoint / "optimizer.safetensors")
        steps[checkpoint.name] = {int(t) for name, t in state.items() if name.startswith("step.")}
        weights = {
            int(state[f"step.{n}"]) for n in expected_shapes(load_checkpoint(checkpoint).config) if f"step.{n}" in state
        }
        assert weights == (set() if checkpoint.name == "checkpoint-24" else {done})
    assert steps == {"checkpoint-6": {6}, "checkpoint-12": {12, 6}, "checkpoint-18": {18}, "checkpoint-24": {6}}


def test_the_rate_warms_up_falls_as_a_cosine_and_ends_at_its_floor() -> None:
    factors = [rate_factor(step, 101, 0.1, 0.2) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.6)
    assert factors[100] == pytest.approx(0.2)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert [rate_factor(0, 1, 0.0, 0.1), rate_factor(0, 1, 0.9, 0.1)] == [1.0, 0.5]


def test_the_weights_phases_share_a_schedule_and_the_adapters_have_their_own(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    spans = plan_phases(config, 24)
    in_run = [rate_factor_in_run(step, spans, config) for step in range(24)]
    assert in_run[:18] == [rate_factor(step, 18, 0.05, 0.1) for step in range(18)]
    assert in_run[18:] == [rate_factor(step, 6, 0.05, 0.1) for step in range(6)]
    train(small_run(tmp_path, log_interval=1))
    logged = [line["learning_rate"] for line in _lines(tmp_path / "run", "train")]
    assert logged == pytest.approx([config.learning_rate * factor for factor in in_run])


def test_a_loss_that_is_not_finite_names_step_and_batch_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    config = small_run(tmp_path, checkpoint_interval=2, adapter_learning_rate=1e30)
    with pytest.raises(TrainingError) as raised:
        train(config)
    message = str(raised.value)
    assert message.startswith("step 20: the loss is ")
    for part in ("in batch 19 of epoch 0 (sequences [", "of documents ", f"{tmp_path / 'run' / 'checkpoint-18'}"):
        assert part in message
    assert yunmin.load(tmp_path / "run", device="cpu").generate([1, 2], max_tokens=2).token_ids
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        train(small_run(tmp_path / "other", learning_rate=1e30))


def test_fine_tuning_takes_model_and_tokenizer_from_the_checkpoint(tmp_path: Path, text_file: Path) -> None:
    tokenizer = trained_tokenizer()
    folder = write_model(tmp_path / "model", small_config(), tokenizer=tokenizer)
    config = load_config(None, [f"checkpoint={folder}", f"data={text_file}"])
    start = start_from(config)
    assert all(torch.equal(t, load_checkpoint(folder).tensors[name]) for name, t in start.model.tensors().items())
    assert start.tokenizer_files == {p.name: p.read_bytes() for p in folder.glob("tokenizer*")}
    text = text_file.read_text(encoding="utf-8")
    held_out = tokenizer.decode(start.data.validation.tolist())
    assert held_out
    assert text.endswith(held_out)
    assert "d_model" not in resolved(config)


@pytest.mark.parametrize(
    ("key", "value", "there"),
    [
        ("d_model", 32, "24"),
        ("n_layers", 3, "2"),
        ("vocab_size", 1000, "300"),
        ("d_state", 16, "5"),
        ("expand", 2, "1.66667"),
    ],
)
def test_model_keys_that_contradict_the_checkpoint_are_refused(
    key: str, value: int, there: str, model_folder: Path, text_file: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{key}: the checkpoint .* has {there}, got {value}"):
        start_from(load_config(None, [f"checkpoint={model_folder}", f"data={text_file}", f"{key}={value}"]))


def test_a_checkpoint_with_adapters_or_without_tokenizer_is_no_start_for_text(tmp_path: Path, text_file: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = load_config(None, [f"checkpoint={folder}", f"data={text_file}"])
    with pytest.raises(TokenizerError, match=r"expected a tokenizer\.json"):
        start_from(config)
    write_adapters(folder, small_config())
    with pytest.raises(ConfigError, match="start from its export"):
        start_from(config)


def test_distillation_pulls_the_recovering_model_towards_its_start(tmp_path: Path) -> None:
    config = small_config(d_inner=(48, 48), tie_word_embeddings=True)
    folder = tmp_path / "model"
    write_model(folder, config, tokenizer=trained_tokenizer())
    of_fresh_models = ("d_model", "n_layers", "vocab_size", "d_state")
    divergence = {}
    for weight in (0.0, 20.0):
        run = small_run(tmp_path / f"{weight}", weight_mask="none", target_state_sparsity=0, max_steps=60)
        values = {k: v for k, v in run.model_dump(exclude_unset=True).items() if k not in of_fresh_models}
        run = type(run)(**values | {"checkpoint": str(folder), "distillation_weight": weight})
        result = train(run)
        logged = [line["distillation"] for line in _lines(result.run, "train") if line["phase"] == "recover"]
        assert all((value > 0) == (weight > 0) for value in logged)
        others = [line["distillation"] for line in _lines(result.run, "train") if line["phase"] != "recover"]
        assert not any(others)
        divergence[weight] = _divergence(folder, result.run / "checkpoint-45")
    assert divergence[20.0] < divergence[0.0]


def _divergence(start: Path, end: Path) -> float:
    ids = random_ids(small_config(), 4, 24)
    with torch.no_grad():
        own, teacher = (torch.log_softmax(yunmin.load(f, device="cpu").runtime.forward(ids), -1) for f in (end, start))
    return float((teacher.exp() * (teacher - own)).sum(-1).mean())


def test_the_written_configuration_is_complete_and_reads_back(learned: TrainingResult, text_file: Path) -> None:
    written = yaml.safe_load((learned.run / "config.yaml").read_text())
    config = load_config(learned.run / "config.yaml")
    assert written.keys() == type(config).model_fields.keys()
    assert written["data"] == [str(text_file)]
    assert resolved(config) == written


def test_an_existing_run_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=r"run exists; continue it with --resume .*/run, or choose another name"):
        train(small_run(tmp_path))
    assert not list((tmp_path / "run").iterdir())


def test_failing_early_leaves_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 steps cannot hold the 4 phases"):
        train(small_run(tmp_path, max_steps=2))
    assert not (tmp_path / "run").exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(small_run(tmp_path, keep_checkpoints=2, checkpoint_interval=5)).run
    assert [p.name for p in checkpoints_of(run)] == ["checkpoint-20", "checkpoint-24"]
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_training_leaves_the_callers_random_state_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    train(small_run(tmp_path, max_steps=8))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({"enable_masking": False, "enable_peft": False}, {"dense"}),
        ({"enable_masking": False}, {"dense", "adapters"}),
        ({"enable_peft": False, "recover_share": 0}, {"dense", "gates"}),
        ({"recover_share": 0}, {"dense", "gates", "adapters"}),
    ],
)
def test_pillars_can_be_left_out(options: dict[str, Any], phases: set[str], tmp_path: Path) -> None:
    result = train(small_run(tmp_path, **options))
    assert result.steps == 24
    assert set(result.validations) - {"hard_gates"} == phases
    assert ("hard_gates" in result.validations) == ("gates" in phases)
    yunmin.load(result.run, device="cpu").generate([1], max_tokens=2)
