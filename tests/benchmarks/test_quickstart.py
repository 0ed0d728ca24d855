"""The quickstart: its configuration, its table, and in small its whole path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quickstart import COMPACT, DENSE, comparison, main, next_commands
from training.config_file import load_config
from training.sparsity import kept_channels
from yunmin.artifact import load_artifact

CONFIG = Path(__file__).parents[2] / "benchmarks" / "quickstart.yaml"
SMALL = """
project_name: quickstart
data: {data}
validation_share: 0.1
d_model: 32
n_layers: 2
vocab_size: 300
sequence_length: 32
batch_size: 4
max_steps: 20
learning_rate: 3.0e-3
target_sparsity: 0.375
channel_multiple: 8
tensorboard: false
"""


def test_configuration_is_valid_and_keeps_320_of_512_channels() -> None:
    config = load_config(CONFIG)
    inner = config.expand * config.d_model
    assert inner == 512
    assert kept_channels(inner, config.target_sparsity, config.channel_multiple) == 320
    dense = load_config(CONFIG, DENSE.overrides)
    assert not dense.enable_masking
    assert not dense.enable_peft
    assert dense.max_steps == config.max_steps


def test_table_puts_dense_first_and_divides_compact_by_dense() -> None:
    def model(scale: int) -> dict[str, Any]:
        names = ("parameters", "artifact_bytes", "flops_per_token", "state_bytes")
        sizes: dict[str, Any] = dict.fromkeys(names, 1000 * scale)
        speeds = {"prefill_tokens_per_s": 1000.0 / scale, "decode_tokens_per_s": 100.0 / scale}
        return sizes | {"summary": {"8": speeds}}

    speed = {"models": [model(1), model(2)], "settings": {"prompt_tokens": [8]}}
    table = comparison(speed, [{"token_perplexity": 30.0}, {"token_perplexity": 20.0}])
    rows = {" ".join(line.split()) for line in table.splitlines()}
    assert "parameters 2,000 1,000 0.500" in rows
    assert "validation perplexity 20.00 30.00 1.500" in rows
    assert "decode tokens/s 50 100 2.000" in rows


def test_next_commands_quote_what_a_shell_would_split() -> None:
    commands = next_commands(Path("my results"), Path("c.yaml"))
    assert commands[0] == "yunmin inspect 'my results/compact'"
    assert all(command.startswith("yunmin ") for command in commands)


@pytest.mark.slow
def test_whole_path_in_small_and_a_second_time_without_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(30):
        lines = [f"the {number}th document counts {number + line} sheep and {line} goats\n" for line in range(60)]
        (texts / f"{number}.txt").write_text("".join(lines))
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(SMALL.format(data=texts))
    argv = ["--config", str(config), "--out", str(out)]
    assert main(argv) == 0
    first = capfd.readouterr().out
    assert "Dense against compact" in first
    assert "validation perplexity" in first
    widths = {v.name: load_artifact(out / v.name)[0].config.d_inner for v in (COMPACT, DENSE)}
    assert widths == {"compact": (40, 40), "dense": (64, 64)}
    assert json.loads((out / "latency" / "latency.json").read_text())["benchmark"] == "latency"
    assert main(argv) == 0
    second = capfd.readouterr().out
    assert "yunmin train" not in second.partition("Go on with:")[0]
    assert "Dense against compact" in second
