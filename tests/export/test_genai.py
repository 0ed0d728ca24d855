"""ONNX Runtime GenAI generates from an exported artifact's graph what we generate."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import yunmin
from export.cli import main as export_main
from export.onnx_graph.genai import genai_config, main
from tests.export import genai_peer
from tests.models import TEXT, random_tensors
from tests.peer_venv import peer_python
from yunmin.checkpoint import load_checkpoint, write_checkpoint
from yunmin.cli import run
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError
from yunmin.tokenizer import Tokenizer

PROMPT = [5, 6, 7]
COUNT = 60
PACKAGES = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0")
Captured = pytest.CaptureFixture[str]


def _config(**changes: object) -> MambaConfig:
    fields: dict[str, object] = {"vocab_size": 304, "d_model": 24, "n_layers": 3, "d_state": 5}
    return MambaConfig.create(**{**fields, "dt_rank": 3, "eos_token_ids": (0,), **changes})  # type: ignore[arg-type]


def _export(folder: Path, *options: str) -> Path:
    """Exports a model whose padding ids have the best logits, and whose text never ends by itself."""
    source = folder / "source"
    source.mkdir()
    config = _config(tie_word_embeddings=False, use_bias=True).with_widths(d_inner=[40] * 3, d_state=[3] * 3)
    tokenizer = Tokenizer.train([TEXT], 300)
    tokenizer.save(source)
    tensors = random_tensors(config, seed=1)
    tensors["lm_head.weight"][tokenizer.vocab_size :] *= 10
    tensors["lm_head.weight"][0] = 0.0
    write_checkpoint(source, config, tensors)
    assert run(export_main, [str(source), str(folder / "artifact"), "--onnx", *options]) == 0
    return folder / "artifact"


def test_the_graph_has_the_last_logits_of_the_tokens_that_exist(tmp_path: Path) -> None:
    artifact = _export(tmp_path)
    assert run(main, [str(artifact), str(tmp_path / "genai")]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "genai" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds: dict[str, np.ndarray] = {"input_ids": np.array([PROMPT])}
    for value in session.get_inputs()[1:]:
        feeds[value.name] = np.zeros((1, *value.shape[1:]), np.float32)
    (logits,) = session.run(["logits"], feeds)
    assert logits.shape == (1, 1, load_checkpoint(artifact).config.n_tokens)
    expected = yunmin.load(artifact, runtime="torch").generate(PROMPT, max_tokens=1, temperature=0.0)
    assert int(logits[0, 0].argmax()) == expected.token_ids[0]


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "precision"), [("ort", "fp32"), ("ort", "int8"), ("portable", "int8")])
def test_genai_generates_our_greedy_tokens(tmp_path: Path, flavour: str, precision: str) -> None:
    python = peer_python("genai", *PACKAGES)
    artifact = _export(tmp_path, "--onnx-flavour", flavour, "--onnx-precision", precision)
    assert run(main, [str(artifact), str(tmp_path / "genai")]) == 0
    command = [str(python), genai_peer.__file__, str(tmp_path / "genai"), json.dumps(PROMPT), str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    model = yunmin.load(artifact, runtime="torch" if precision == "fp32" else "onnx")
    expected = model.generate(PROMPT, max_tokens=COUNT, temperature=0.0).token_ids
    assert len(expected) == COUNT
    assert len(set(expected)) > COUNT // 4  # no loop that any model would fall into
    assert json.loads(done.stdout) == [[*PROMPT, *expected]] * 2


def test_an_artifact_without_a_graph_is_refused_and_an_existing_folder_left_alone(
    tmp_path: Path, capsys: Captured
) -> None:
    artifact = _export(tmp_path)
    (tmp_path / "taken").mkdir()
    capsys.readouterr()
    assert run(main, [str(artifact), str(tmp_path / "taken")]) == 1
    assert "taken: exists already" in capsys.readouterr().err
    assert list((tmp_path / "taken").iterdir()) == []
    assert run(export_main, [str(tmp_path / "source"), str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert run(main, [str(tmp_path / "plain"), str(tmp_path / "genai")]) == 1
    assert "has no ONNX graph; export it with --onnx" in capsys.readouterr().err
    assert not (tmp_path / "genai").exists()


def test_a_model_whose_text_never_ends_is_refused() -> None:
    with pytest.raises(ConfigError, match="eos_token_id"):
        genai_config(_config(eos_token_ids=()))


def test_layers_of_unequal_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layer 2.*d_inner"):
        genai_config(_config().with_widths(d_inner=[48, 48, 32]))
