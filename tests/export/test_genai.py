"""ONNX Runtime GenAI generates from an artifact's graph what we generate."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import yunmin
from export.onnx_graph import genai
from export.onnx_graph.emit import GraphOptions, write_graph
from export.onnx_graph.genai import genai_config, write_genai
from tests.export import genai_peer
from yunmin.axes import expected_shapes
from yunmin.checkpoint import load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError
from yunmin.tokenizer import Tokenizer

PROMPT = [5, 6, 7]


def _config(**changes: object) -> MambaConfig:
    fields: dict[str, object] = {"vocab_size": 304, "d_model": 24, "n_layers": 3, "d_state": 5}
    return MambaConfig.create(**{**fields, "dt_rank": 3, "eos_token_ids": (0,), **changes})  # type: ignore[arg-type]


@pytest.fixture
def artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a graph whose padding ids have the best logits."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    tokenizer = Tokenizer.train(["def main(argument): return argument\n"] * 4, 300)
    tokenizer.save(folder)
    config = _config(n_tokens=tokenizer.vocab_size, tie_word_embeddings=False).with_widths(
        d_inner=[40] * 3, d_state=[3] * 3
    )
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.6 if len(shape) > 1 else 0.3)
        for name, shape in expected_shapes(config).items()
    }
    tensors["lm_head.weight"][config.n_tokens :] *= 10
    tensors["lm_head.weight"][0] = 0.0
    write_checkpoint(folder, config, tensors)
    (folder / "onnx").mkdir()
    write_graph(folder / "onnx" / "model.onnx", load_checkpoint(folder), GraphOptions())
    monkeypatch.setattr(genai, "read_manifest", lambda folder: None)  # it is not a whole artifact
    return folder


def _expected(artifact: Path, n: int) -> list[int]:
    return list(yunmin.load(artifact, runtime="torch").generate(PROMPT, max_tokens=n, temperature=0.0).token_ids)


def test_the_graph_has_the_last_logits_of_the_tokens_that_exist(artifact: Path, tmp_path: Path) -> None:
    write_genai(tmp_path / "genai", artifact)
    session = onnxruntime.InferenceSession(tmp_path / "genai" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {"input_ids": np.array([PROMPT])}
    for value in session.get_inputs()[1:]:
        feeds[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
    (logits,) = session.run(["logits"], feeds)
    assert logits.shape == (1, 1, load_checkpoint(artifact).config.n_tokens)
    assert int(logits[0, 0].argmax()) == _expected(artifact, 1)[0]


@pytest.mark.slow
def test_genai_generates_our_greedy_tokens(artifact: Path, tmp_path: Path) -> None:
    python = os.environ.get("YUNMIN_GENAI_PYTHON") or sys.executable
    if python == sys.executable and importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("needs onnxruntime-genai: install it, or name a Python that has it by YUNMIN_GENAI_PYTHON")
    write_genai(tmp_path / "genai", artifact)
    command = [python, genai_peer.__file__, str(tmp_path / "genai"), json.dumps(PROMPT), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [PROMPT + _expected(artifact, 60)] * 2


def test_an_artifact_without_a_graph_is_refused(tmp_path: Path, artifact: Path) -> None:
    (artifact / "onnx" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="--onnx"):
        write_genai(tmp_path / "genai", artifact)
    assert not (tmp_path / "genai").exists()


def test_a_model_whose_text_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        genai_config(_config(eos_token_ids=()))


def test_layers_of_unequal_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 2.*d_inner"):
        genai_config(_config().with_widths(d_inner=[48, 48, 32]))
