"""The emitted ONNX graph in onnxruntime: equal to the torch network, whatever the widths, the batch and the cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch

from export.onnx_graph import external, matrices
from export.onnx_graph.emit import OPSET, GraphOptions, write_graph
from export.onnx_graph.weights import GraphWeights, reference_checkpoint
from tests.models import random_tensors
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError
from yunmin.model import MambaLM
from yunmin.quantization.layout import Quantization
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.rounding import round_tensors
from yunmin.runtime.onnx_contract import Flavour, GraphFacts, Precision

FLAVOURS: tuple[Flavour, ...] = ("ort", "portable")
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")

Array = npt.NDArray[Any]


def checkpoint(**options: Any) -> Checkpoint:
    """Three layers of unequal, odd widths."""
    values: dict[str, Any] = {"vocab_size": 130, "d_model": 40, "n_layers": 3, "d_state": 5, "dt_rank": 3}
    config = MambaConfig.create(**values | options).with_widths(d_inner=(80, 65, 33), d_state=(5, 8, 3))
    return Checkpoint(config, random_tensors(config, seed=1), None, Path("model"))


@pytest.fixture
def float_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of quantized weights leave activations as they are, so that nothing is approximate."""
    monkeypatch.setattr(matrices, "INT8_ACTIVATIONS", 1)


def opened(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # of a DequantizeLinear before a MatMul, onnxruntime makes MatMulNBits, which rounds activations unless told not to
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def zero_states(session: onnxruntime.InferenceSession, batch: int) -> dict[str, Array]:
    return {
        value.name: np.zeros((batch, *value.shape[1:]), np.float32)
        for value in session.get_inputs()
        if value.name != "input_ids"
    }


def read(
    session: onnxruntime.InferenceSession, ids: Array, states: dict[str, Array], **extra: Array
) -> tuple[Array, dict[str, Array]]:
    """Logits, and the next states under the names of inputs."""
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, {"input_ids": ids, **states, **extra}), strict=True))
    logits = found.pop("logits")
    past = {n.replace("present.", "past_key_values.").replace("present_", "past_"): v for n, v in found.items()}
    return logits, past


def expected_logits(plain: Checkpoint, ids: Array) -> Array:
    with torch.inference_mode():
        logits: Array = MambaLM.from_tensors(plain.config, plain.tensors)(torch.from_numpy(ids)).numpy()
    return logits


def ids_of(batch: int, length: int) -> Array:
    return np.random.default_rng(length).integers(0, 130, (batch, length))


def relative(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_graph_equals_the_network_its_weights_stand_for(tmp_path: Path, flavour: Flavour, precision: Precision) -> None:
    source = checkpoint(use_bias=True)
    write_graph(tmp_path / "m.onnx", source, GraphOptions(flavour, precision))
    session = opened(tmp_path / "m.onnx")
    for batch, length in ((1, 1), (3, 2), (1, 7), (2, 65)):
        ids = ids_of(batch, length)
        logits, _ = read(session, ids, zero_states(session, batch), num_logits_to_keep=np.array(0))
        expected = expected_logits(reference_checkpoint(source, precision), ids)
        assert logits.shape == expected.shape
        assert relative(logits, expected) < 1e-5


@pytest.mark.usefixtures("float_activations")
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("options", [{"tie_word_embeddings": False}, {"use_conv_bias": False}, {"d_conv": 2}])
def test_every_architecture_option_is_kept(
    tmp_path: Path, flavour: Flavour, precision: Precision, options: dict[str, Any]
) -> None:
    source = checkpoint(**options)
    write_graph(tmp_path / "m.onnx", source, GraphOptions(flavour, precision))
    session = opened(tmp_path / "m.onnx")
    ids = ids_of(2, 9)
    logits, _ = read(session, ids, zero_states(session, 2), num_logits_to_keep=np.array(0))
    assert relative(logits, expected_logits(reference_checkpoint(source, precision), ids)) < 1e-5


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_chunks_and_steps_equal_the_whole_sequence(tmp_path: Path, flavour: Flavour) -> None:
    write_graph(tmp_path / "m.onnx", checkpoint(), GraphOptions(flavour))
    session = opened(tmp_path / "m.onnx")
    ids = ids_of(3, 20)
    whole, last = read(session, ids, zero_states(session, 3), num_logits_to_keep=np.array(0))
    states = zero_states(session, 3)
    position = 0
    for length in (1, 7, 2, 1, 1, 8):
        position += length
        logits, states = read(session, ids[:, position - length : position], states)
        assert relative(logits[:, 0], whole[:, position - 1]) < 1e-5
    assert all(relative(states[name], last[name]) < 1e-5 for name in last)


def test_a_batch_equals_its_single_sequences(tmp_path: Path) -> None:
    write_graph(tmp_path / "m.onnx", checkpoint(), GraphOptions(precision="int8"))
    session = opened(tmp_path / "m.onnx")
    ids = ids_of(3, 11)
    together, _ = read(session, ids, zero_states(session, 3))
    for row in range(3):
        alone, _ = read(session, ids[row : row + 1], zero_states(session, 1))
        assert relative(together[row : row + 1], alone) < 1e-5


@pytest.mark.parametrize("kept", [0, 1, 3, 9])
def test_as_many_last_logits_as_wanted_are_kept_and_one_by_default(tmp_path: Path, kept: int) -> None:
    write_graph(tmp_path / "m.onnx", checkpoint(), GraphOptions())
    session = opened(tmp_path / "m.onnx")
    ids = ids_of(1, 7)
    every, _ = read(session, ids, zero_states(session, 1), num_logits_to_keep=np.array(0))
    some, _ = read(session, ids, zero_states(session, 1), num_logits_to_keep=np.array(kept))
    default, _ = read(session, ids, zero_states(session, 1))
    assert some.shape[1] == (min(kept, 7) or 7)
    assert relative(some, every[:, -some.shape[1] :]) < 1e-6
    assert relative(default, every[:, -1:]) < 1e-6


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_stacked_states_are_the_layers_states_behind_one_another(tmp_path: Path, flavour: Flavour) -> None:
    source = checkpoint()
    write_graph(tmp_path / "layers.onnx", source, GraphOptions(flavour))
    write_graph(tmp_path / "stacked.onnx", source, GraphOptions(flavour, states="stacked"))
    apart, stacked = opened(tmp_path / "layers.onnx"), opened(tmp_path / "stacked.onnx")
    ids = ids_of(2, 6)
    expected, layers = read(apart, ids, zero_states(apart, 2))
    logits, stacks = read(stacked, ids, zero_states(stacked, 2))
    assert relative(logits, expected) < 1e-6
    for kind in ("conv", "recurrent"):
        parts = [layers[f"past_key_values.{i}.{kind}_state"].reshape(2, -1) for i in range(3)]
        assert relative(stacks[f"past_{kind}_states"], np.concatenate(parts, axis=1)) < 1e-6
    inputs = sorted(v.name for v in stacked.get_inputs() if v.name.startswith("past"))
    outputs = sorted(v.name for v in stacked.get_outputs() if v.name.startswith("present"))
    assert [name.removeprefix("past") for name in inputs] == [name.removeprefix("present") for name in outputs]


@pytest.mark.parametrize("step", [1e-12, 1e-6, 1e-3, 30.0])
@pytest.mark.parametrize("rate", [1e-3, 1.0, 1e4])
def test_tiny_and_huge_decays_stay_exact(tmp_path: Path, step: float, rate: float) -> None:
    source = checkpoint()
    tensors = dict(source.tensors)
    for name in tensors:
        if name.endswith("dt_proj.bias"):
            tensors[name] = torch.full_like(tensors[name], float(np.log(np.expm1(step))))
        if name.endswith("x_proj.weight") and step < 1e-6:  # inputs so large that the tiny steps count
            tensors[name] = torch.cat([tensors[name][:3], tensors[name][3:] / step**0.5])
        if name.endswith("A_log"):
            tensors[name] = torch.full_like(tensors[name], float(np.log(rate)))
    extreme = Checkpoint(source.config, tensors, None, source.folder)
    write_graph(tmp_path / "m.onnx", extreme, GraphOptions())
    session = opened(tmp_path / "m.onnx")
    ids = ids_of(1, 40)
    logits, states = read(session, ids, zero_states(session, 1), num_logits_to_keep=np.array(0))
    wide = Checkpoint(source.config, {name: t.double() for name, t in tensors.items()}, None, source.folder)
    assert relative(logits, expected_logits(wide, ids)) < 1e-5
    assert all(np.isfinite(state).all() for state in states.values())


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["conv", "recurrent"])
def test_a_state_with_nan_gives_nan_whatever_rounds_activations(
    tmp_path: Path, flavour: Flavour, precision: Precision, kind: str
) -> None:
    write_graph(tmp_path / "m.onnx", checkpoint(), GraphOptions(flavour, precision))
    session = opened(tmp_path / "m.onnx")
    states = zero_states(session, 2)
    states[f"past_key_values.1.{kind}_state"][1, 1, 7] = np.nan
    for length in (1, 3):
        logits, _ = read(session, ids_of(2, length), states)
        assert np.isfinite(logits[0]).all()
        assert np.isnan(logits[1]).all()


def test_a_weight_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    source = checkpoint()
    source.tensors["backbone.layers.1.mixer.in_proj.weight"][0, 0] = 7e4
    with pytest.raises(
        ConfigError, match=r"layers\.1\.mixer\.in_proj\.weight: .*65504, which float16 holds, found 7e\+04"
    ):
        write_graph(tmp_path / "m.onnx", source, GraphOptions(precision="fp16"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_portable_graphs_pass_the_checker_with_basic_operators_only(tmp_path: Path, precision: Precision) -> None:
    path = tmp_path / "m.onnx"
    write_graph(path, checkpoint(), GraphOptions("portable", precision))
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
    assert OPSET <= 21
    assert {node.domain for node in model.graph.node} == {""}


def test_the_ort_flavour_passes_the_checker(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    write_graph(path, checkpoint(), GraphOptions("ort", "int4"))
    onnx.checker.check_model(path, full_check=True)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_input_gives_the_same_bytes(
    tmp_path: Path, flavour: Flavour, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "EXTERNAL_BYTES", 4096)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_graph(tmp_path / folder / "m.onnx", checkpoint(), GraphOptions(flavour, precision))
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_weights_lie_in_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph(tmp_path / "one.onnx", checkpoint(), GraphOptions())
    assert not (tmp_path / "one.onnx.data").exists()
    monkeypatch.setattr(external, "EXTERNAL_BYTES", 4096)
    write_graph(tmp_path / "two.onnx", checkpoint(), GraphOptions())
    assert (tmp_path / "two.onnx.data").stat().st_size > (tmp_path / "two.onnx").stat().st_size
    ids = ids_of(1, 5)
    one, two = opened(tmp_path / "one.onnx"), opened(tmp_path / "two.onnx")
    assert np.array_equal(read(one, ids, zero_states(one, 1))[0], read(two, ids, zero_states(two, 1))[0])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tied_head_is_stored_once(tmp_path: Path, flavour: Flavour, precision: Precision) -> None:
    sizes = {}
    for tied in (True, False):
        write_graph(tmp_path / "m.onnx", checkpoint(tie_word_embeddings=tied), GraphOptions(flavour, precision))
        initializers = onnx.load(tmp_path / "m.onnx").graph.initializer
        sizes[tied] = sum(len(tensor.raw_data) for tensor in initializers)
    bytes_per_weight = {"fp32": 4, "fp16": 2}.get(precision, 1)
    assert sizes[False] - sizes[True] >= 130 * 40 * bytes_per_weight


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantized_checkpoint_keeps_its_integers(tmp_path: Path, precision: Precision) -> None:
    plain = checkpoint()
    assert precision in ("int8", "int4")
    quantized = Quantization("int8" if precision == "int8" else "int4")
    # a value that rounding anew would not find again
    weights = round_tensors({name: tensor * 1.01 for name, tensor in plain.tensors.items()}, quantized)
    stored = Checkpoint(
        plain.config, pack_tensors(plain.config, plain.tensors, weights, quantized), None, plain.folder, quantized
    )
    for name, weight in weights.items():
        assert torch.equal(GraphWeights(stored, precision).quantized(name).levels, weight.levels)
    other: Precision = "int4" if precision == "int8" else "int8"
    with pytest.raises(ConfigError, match=f"stored in {precision}"):
        write_graph(tmp_path / "m.onnx", stored, GraphOptions(precision=other))


def test_a_graph_says_what_it_is(tmp_path: Path) -> None:
    source = checkpoint()
    write_graph(tmp_path / "m.onnx", source, GraphOptions("portable", "fp16"))
    metadata = opened(tmp_path / "m.onnx").get_modelmeta().custom_metadata_map
    assert GraphFacts.from_metadata(metadata, where="m.onnx") == GraphFacts(source.config, "portable", "fp16", "layers")
