"""`yunmin train` as a person uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.runs import SMALL
from training.cli import main
from training.config import RECORD_KEYS, TrainingConfig
from training.config_file import load_config, parse_config
from training.run import to_yaml
from yunmin.cli import run as run_command
from yunmin.errors import ConfigError


def _arguments(output_dir: Path, **options: Any) -> list[str]:
    values = SMALL | {"output_dir": str(output_dir)} | options
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "training", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def test_the_result_is_one_json_object_and_the_log_goes_to_stderr(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*_arguments(tmp_path, max_steps=8), "--json"]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["run"] == str(tmp_path / "run")
    assert (result["steps"], result["total_steps"], result["interrupted"]) == (8, 8, False)
    assert set(result["validation_perplexity"]) == {"dense", "gates", "hard_gates", "recover", "adapters"}
    assert set(result["trainable_parameters"]) == {"dense", "gates", "recover", "adapters"}
    for shown in ("lr ", "= ce ", "+ reg ", "tokens/s", "left", "of 5,104 parameters (100.00%)", "peak memory", "keep"):
        assert shown in output.err


def test_the_end_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_arguments(tmp_path, max_steps=8)) == 0
    assert f"yunmin export {tmp_path / 'run'} " in capsys.readouterr().out


def test_help_shows_every_key_with_its_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, field in TrainingConfig.model_fields.items():
        assert field.description, name
        assert any(line.startswith(f"  {name}=") and field.description in line for line in lines), name
    assert any(line.startswith("  yunmin train --resume") for line in lines)


def test_the_defaults_are_the_documented_ones() -> None:
    config = parse_config({})
    expected = {
        "d_model": 256,
        "n_layers": 4,
        "vocab_size": 1000,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "num_epochs": 10,
        "peft_r": 16,
        "peft_alpha": 32,
        "peft_dropout": 0.1,
        "enable_ia3": True,
        "masking_tau": 0.5,
        "target_sparsity": 0.3,
        "scan_update_frequency": 1000,
        "data": ("synthetic",),
        "output_dir": "training_outputs",
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert set(RECORD_KEYS) < set(TrainingConfig.model_fields)


def test_printed_configuration_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 3e-4\ndata: a.txt\nrun_name: 2024\n")
    assert main(["--config", str(file), "--print-config", "d_model=64", "data=[stdlib, b.txt]"]) == 0
    printed = capsys.readouterr().out
    values = yaml.safe_load(printed)
    assert (values["learning_rate"], values["d_model"], values["run_name"]) == (3e-4, 64, "2024")
    assert values["data"] == ["stdlib", "b.txt"]
    file.write_text(printed)
    assert to_yaml(load_config(file)) == printed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "command line: unknown key 'learning_rat', did you mean 'learning_rate'?"),
        ("qqq=1", "command line: unknown key 'qqq'; yunmin train --help lists all keys"),
        ("d_model=0", "command line: d_model: Input should be greater than or equal to 1, got 0"),
        ("learning_rate=.nan", "command line: learning_rate: Input should be a finite number, got nan"),
        ("scan_mode=sometimes", "command line: scan_mode: Input should be 'none', 'static' or 'dynamic'"),
        ("d_model", "'d_model': expected key=value"),
        ("data=[", "data: '[' is no YAML value"),
        ("mask_n=4", "configuration: mask_n must be below mask_m, got 4 of 4"),
        ("distillation_weight=1", "configuration: distillation_weight needs a checkpoint to distil from"),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(None, [override])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml: expected a YAML file, found no such file"),
        (["--resume", "missing"], "missing: expected a run folder with config.yaml, or a checkpoint in one"),
        (["data=missing.txt"], "missing.txt: expected a text file, a .jsonl file or a folder, found no such path"),
        (["data=[stdlib, synthetic]"], "data: 'synthetic' cannot be mixed with other sources, got stdlib, synthetic"),
        (["checkpoint=missing"], "missing: expected a checkpoint folder or a Hub id, found no such folder"),
        (["device=nonsense"], "device: 'nonsense' cannot be used"),
        (["data=stdlib", "vocab_size=100", "max_documents=25"], "vocab_size must be at least 257"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_a_failure(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(main, arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("yunmin: error: ")
    assert message in output.err
    assert len(output.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_resume_and_config_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--resume", "run", "--config", "a.yaml"])
    assert stopped.value.code == 2
    assert "expected no --config" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(number: signal.Signals, tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, max_steps=40, log_interval=1, keep_checkpoints=2)
    process = _start([*arguments, "--json"])
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 7/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    result = json.loads(out)
    assert result["interrupted"]
    assert 7 <= result["steps"] < 40
    assert Path(result["checkpoint"]).name == f"checkpoint-{result['steps']}"
    assert f"yunmin train --resume {tmp_path / 'run'}" in err.splitlines()[-1]
    resumed = _start(["--resume", str(tmp_path / "run"), "log_interval=100", "--json"])
    out, err = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, err
    whole = _start([*_arguments(tmp_path / "whole", max_steps=40), "--json"])
    whole_out, err = whole.communicate(timeout=120)
    assert whole.returncode == 0, err
    ours, theirs = (Path(json.loads(text)["checkpoint"]) for text in (out, whole_out))
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(ours / name), load_file(theirs / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_weights_and_biases_works_without_a_network(mode: str, tmp_path: Path) -> None:
    process = _start([*_arguments(tmp_path, max_steps=8, wandb=True), "--json"], WANDB_MODE=mode, WANDB_SILENT="true")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["steps"] == 8
    assert bool(list((tmp_path / "run").glob("wandb/offline-run-*"))) == (mode == "offline")
