"""Model repositories: what Triton reads in them, and the graph run with its states fed back as Triton does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.cli import main as export_main
from export.onnx_graph import emit
from export.triton import write_repository
from export.triton.repository import check_repository
from serving.state_cli import main as state_main
from tests.export.fixtures import small_config, write_source
from tests.models import random_ids
from tests.triton_models import cut_config, write_tiny_artifact
from yunmin.cli import run
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError, StateError, VerificationError
from yunmin.language_model import LanguageModel, load

PROMPT = [5, 7, 11, 13, 17]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(write_tiny_artifact(tmp_path_factory.mktemp("triton") / "artifact"), device="cpu", runtime="torch")


@pytest.fixture(scope="module")
def repository(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    model.save_state(folder / "support.safetensors", model.snapshot(PROMPT))
    write_repository(folder / "repo", model.folder, initial_states={"support": folder / "support.safetensors"})
    return folder / "repo"


def parsed(folder: Path) -> Any:
    """A config.pbtxt, by the schema that Triton has."""
    from google.protobuf import text_format  # type: ignore[import-untyped]
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


class FedBack:
    """Runs one sequence as Triton's implicit state does: states paired by sorted name, the first from its config."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        self.config = parsed(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "1" / self.config.default_model_filename, options)
        states = self.config.sequence_batching.state
        pairs = zip(
            sorted(s.input_name for s in states), sorted(s.output_name for s in states), strict=True
        )  # server#8586
        self.output_of = dict(pairs)
        self.state = {s.input_name: self._first(folder, s) for s in states}

    def _first(self, folder: Path, state: Any) -> np.ndarray:
        (initial,) = state.initial_state
        assert list(initial.dims) == list(state.dims)
        if initial.WhichOneof("state_data") == "zero_data":
            return np.zeros((1, *initial.dims), np.float32)
        data = (folder / "initial_state" / initial.data_file).read_bytes()
        return np.frombuffer(data, "<f4").reshape(1, *initial.dims)

    def __call__(self, token_ids: list[int]) -> np.ndarray:
        names = [self.config.output[0].name, *self.output_of.values()]
        feed = {self.config.input[0].name: np.array([token_ids], np.int64), **self.state}
        logits, *states = self.session.run(names, feed)
        self.state = dict(zip(self.output_of, states, strict=True))
        return np.asarray(logits)


def test_a_sequence_fed_back_equals_the_whole_sequence(repository: Path, model: LanguageModel) -> None:
    ids = random_ids(model.config, 1, 23)[0].tolist()
    whole, _ = model.runtime.score(ids)
    run = FedBack(repository / "mamba_onnx")
    position = 0
    for length in (7, 1, 1, 2, 11, 1):
        logits = run(ids[position : position + length])
        position += length
        assert logits.shape == (1, 1, model.config.vocab_size)
        torch.testing.assert_close(torch.from_numpy(logits[0, 0]), whole[position - 1], rtol=0, atol=1e-4)


def test_states_of_many_layers_are_stacked_in_the_order_of_the_layers(tmp_path: Path) -> None:
    """Not in that of their names, by which layer 10 comes before layer 2."""
    widths = tuple(range(8, 20))
    config = MambaConfig(vocab_size=300, d_model=12, d_inner=widths, d_state=widths[::-1], dt_rank=2)
    model = load(write_tiny_artifact(tmp_path / "artifact", config), device="cpu", runtime="torch")
    model.save_state(tmp_path / "deep.safetensors", model.snapshot(PROMPT))
    write_repository(tmp_path / "repo", model.folder, initial_states={"deep": tmp_path / "deep.safetensors"})
    expected, _ = model.runtime.prefill([*PROMPT, 19, 23])
    run = FedBack(tmp_path / "repo" / "mamba_onnx_deep")
    run([19])
    torch.testing.assert_close(torch.from_numpy(run([23])[0, 0]), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]], ids=["fp32", "int8"])
def test_the_command_writes_models_that_begin_at_zero_and_after_a_state(tmp_path: Path, quantize: list[str]) -> None:
    source = str(write_source(tmp_path / "source", small_config()))
    assert run(export_main, [source, str(tmp_path / "artifact"), *quantize, "--tokens", "64", "--json"]) == 0
    (tmp_path / "system.txt").write_text("def read(self")
    support = str(tmp_path / "support.safetensors")
    built = ["build", str(tmp_path / "artifact"), "--prompt-file", str(tmp_path / "system.txt"), support]
    assert run(state_main, built) == 0
    triton = ["--triton", str(tmp_path / "repo"), "--triton-initial-state", support]
    assert run(export_main, [source, str(tmp_path / "again"), *quantize, "--tokens", "64", *triton, "--json"]) == 0

    model = load(tmp_path / "repo" / "mamba" / "1" / "artifact", device="cpu", runtime="torch")
    tail = model.encode("):\n")
    for name, begin in (("mamba_onnx", []), ("mamba_onnx_support", model.encode("def read(self"))):
        sequence = FedBack(tmp_path / "repo" / name)
        for i, token_id in enumerate(tail):
            expected, _ = model.runtime.prefill([*begin, *tail[: i + 1]])
            limit = (1e-2 if quantize else 1e-4) * float(expected.abs().max())
            found = torch.from_numpy(sequence([token_id])[0, 0])
            torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("repo", "states", "message"),
    [
        ("out", [], "expected a folder apart from the artifact's"),
        ("out/repo", [], "expected a folder apart from the artifact's"),
        (".", [], "expected a folder apart from the artifact's"),
        ("file/repo", [], "is a file"),
        ("repo", ["nowhere"], "nowhere: expected a file of `yunmin state build`, found none"),
        ("repo", ["a/s.safetensors"], "a/s.safetensors: expected a saved state"),
        ("repo", ["a/s.safetensors", "b/s.safetensors"], "expected another name than that of"),
        (None, ["a/s.safetensors"], "expected --triton with it"),
    ],
)
def test_what_cannot_become_a_repository_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], repo: str | None, states: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "s.safetensors").write_bytes(b"")
    given = [] if repo is None else ["--triton", str(tmp_path / repo)]
    given += [word for state in states for word in ("--triton-initial-state", str(tmp_path / state))]
    assert run(export_main, [str(tmp_path / "no source"), str(tmp_path / "out"), *given]) != 0
    assert message in capsys.readouterr().err


def test_a_saved_state_is_where_its_model_begins(repository: Path, model: LanguageModel) -> None:
    expected, _ = model.runtime.prefill([*PROMPT, 19, 23])
    logits = FedBack(repository / "mamba_onnx_support")([19, 23])
    torch.testing.assert_close(torch.from_numpy(logits[0, 0]), expected, rtol=0, atol=1e-4)


def test_the_configuration_names_what_the_graph_has(repository: Path) -> None:
    for name in ("mamba_onnx", "mamba_onnx_support"):
        run = FedBack(repository / name)
        config = run.config
        assert (config.name, config.backend) == (name, "onnxruntime")
        wide = {tensor.name: tensor for tensor in (*run.session.get_inputs(), *run.session.get_outputs())}
        states = config.sequence_batching.state
        told = {t.name: list(t.dims) for t in (*config.input, *config.output)}
        told |= {s.input_name: list(s.dims) for s in states} | {s.output_name: list(s.dims) for s in states}
        assert told.keys() == wide.keys() - {"num_logits_to_keep"}
        for tensor, dims in told.items():  # Triton wants them equal, the batch left out
            assert dims == [d if isinstance(d, int) else -1 for d in wide[tensor].shape[1:]], tensor
        assert all(run.output_of[s.input_name] == s.output_name for s in states)


def test_the_text_model_is_decoupled_and_holds_the_artifact(repository: Path, model: LanguageModel) -> None:
    config = parsed(repository / "mamba")
    assert (config.name, config.backend, config.max_batch_size) == ("mamba", "python", 0)
    assert config.model_transaction_policy.decoupled
    assert all(tensor.optional for tensor in config.input)
    copy = load(repository / "mamba" / "1" / "artifact", device="cpu", runtime="torch")
    assert copy.fingerprint == model.fingerprint
    compile((repository / "mamba" / "1" / "model.py").read_text(), "model.py", "exec")


def test_a_state_of_another_model_is_refused_and_nothing_written(model: LanguageModel, tmp_path: Path) -> None:
    other = load(write_tiny_artifact(tmp_path / "other", seed=1), device="cpu", runtime="torch")
    other.save_state(tmp_path / "state.safetensors", other.snapshot(PROMPT))
    with pytest.raises(StateError, match="another model"):
        write_repository(tmp_path / "repo", model.folder, initial_states={"s": tmp_path / "state.safetensors"})
    assert not (tmp_path / "repo").exists()


def test_a_graph_that_computes_something_else_leaves_no_repository(
    model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_stack = emit._stack
    monkeypatch.setattr(emit, "_stack", lambda graph, stacks, by_layer: true_stack(graph, stacks, by_layer[::-1]))
    with pytest.raises(VerificationError, match="onnx"):
        write_repository(tmp_path / "repo", model.folder)
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_a_repository_and_nothing_else(model: LanguageModel, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    write_repository(repo, model.folder)
    with pytest.raises(ArtifactError, match="--force replaces a repository"):
        write_repository(repo, model.folder)
    write_repository(repo, model.folder, force=True)
    with pytest.raises(ArtifactError, match="holds 'mamba'"):
        write_repository(repo, model.folder, name="other", force=True)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds 'notes\.txt'"):
        write_repository(tmp_path / "files", model.folder, force=True)


def test_names_that_cannot_be_a_models_are_refused(tmp_path: Path) -> None:
    for name in ("", "a/b", "..", "-x", "a" * 65):
        with pytest.raises(ConfigError, match="Triton model name"):
            check_repository(tmp_path / "repo", tmp_path / "artifact", name=name)


def test_the_same_artifact_gives_the_same_repository(tmp_path: Path) -> None:
    artifact = write_tiny_artifact(tmp_path / "artifact", cut_config())
    for name in ("one", "two"):
        write_repository(tmp_path / name, artifact)
    for path in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path
