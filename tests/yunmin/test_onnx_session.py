"""Which graphs the onnx runtime opens, when it opens them again, and which saved states it takes."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

import yunmin
from export.onnx_graph.emit import GraphOptions, write_graph
from tests.greedy import require_same_greedy
from tests.models import random_tensors, small_config, write_model
from tests.onnx_artifacts import checkpoint_of, onnx_runtime_of, record, write_onnx_artifact
from tests.quantization.fixtures import write_quantized
from yunmin.errors import ArtifactError, ConfigError, MissingExtraError, StateError
from yunmin.language_model import LanguageModel
from yunmin.runtime.onnx_contract import Flavour
from yunmin.runtime.onnx_session import Binding, GraphSession
from yunmin.threads import get_threads, set_threads

GRAPH = "onnx/model.onnx"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_artifact(tmp_path_factory.mktemp("onnx") / "artifact", small_config())


@pytest.fixture
def threads() -> Any:
    before = get_threads()
    yield set_threads
    set_threads(before)


def edit_graph(folder: Path, edit: Callable[[Any], object]) -> None:
    """Changes an artifact's graph, and the manifest accordingly."""
    model = onnx.load(folder / GRAPH)
    edit(model)
    (folder / GRAPH).write_bytes(model.SerializeToString())
    record(folder, small_config())


def test_another_number_of_threads_opens_the_graph_again_once(
    folder: Path, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def watched(*arguments: Any) -> GraphSession:
        opened.append(arguments[-1])
        return GraphSession(*arguments)

    monkeypatch.setattr("yunmin.runtime.onnx_runtime.GraphSession", watched)
    threads(1)
    runtime = onnx_runtime_of(folder)
    logits, state = runtime.prefill([1, 2, 3])
    runtime.step([4], state)
    for count in (2, 2, 1):
        threads(count)
        torch.testing.assert_close(runtime.prefill([1, 2, 3])[0], logits)
        runtime.step([4], state)
    assert opened == [1, 2, 1]


def test_a_graph_is_let_go_when_another_number_of_threads_opens_it_again(
    folder: Path, threads: Callable[[int], None]
) -> None:
    threads(1)
    runtime = onnx_runtime_of(folder)
    pool, other = runtime.new_state(4), runtime.new_state(1)
    for count in (4, 3, 1):
        runtime.step([1] * count, pool.first_rows(count))
    runtime.step([1], other)
    before = weakref.ref(runtime._session.ort)
    threads(2)
    runtime.step([1], pool.first_rows(1))
    gc.collect()
    assert before() is None


def test_the_bindings_of_steps_that_come_again_and_again_are_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, made = onnx_runtime_of(folder), []

    def watched(session: GraphSession, count: int, *places: Any) -> Binding:
        made.append(count)
        return Binding(session, count, *places)

    monkeypatch.setattr("yunmin.runtime.onnx_session.Binding", watched)
    pool = runtime.new_state(80)
    for count in range(2, 80):
        for size in (1, 1, count):
            runtime.step([1] * size, pool.first_rows(size))
    assert made.count(1) == 2


def test_load_refuses_what_has_no_graph_it_can_run(tmp_path: Path) -> None:
    config = small_config()
    plain = write_model(tmp_path / "plain", config)
    bare = write_onnx_artifact(tmp_path / "bare", config, None)
    stacked = write_onnx_artifact(tmp_path / "stacked", config, GraphOptions(states="stacked"))
    good = write_onnx_artifact(tmp_path / "good", config)
    refused = {
        plain: "export it with --onnx",
        bare: r"expected onnx/model.onnx for the onnx runtime, found none; export the artifact with --onnx",
        stacked: "expected states by layer, found stacked ones",
    }
    for folder, message in refused.items():
        with pytest.raises(ConfigError, match=message):
            yunmin.load(folder, runtime="onnx")
    for device, message in {
        "cuda": "has no CUDAExecutionProvider; install onnxruntime-gpu",
        "meta": "runs on a CPU or on CUDA, not on 'meta'",
        "gpu": "device 'gpu' cannot be used",
    }.items():
        if device != "cuda" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            with pytest.raises(ConfigError, match=message):
                yunmin.load(good, device=device, runtime="onnx")
    graph = good / GRAPH
    graph.with_name("model.onnx.data").write_bytes(b"unknown")
    with pytest.raises(ArtifactError, match=r"expected a record of onnx/model\.onnx\.data in the manifest"):
        yunmin.load(good, runtime="onnx")
    graph.with_name("model.onnx.data").unlink()
    for content, message in {
        b"no graph": r"model\.onnx: onnxruntime [0-9.]+ refuses it: ",
        _identity_graph(): "expected a graph of yunmin's format 2, found None",
    }.items():
        graph.write_bytes(content)
        with pytest.raises(ArtifactError, match="wrong hash"):
            yunmin.load(good, runtime="onnx")
        record(good, config)
        with pytest.raises(ArtifactError, match=message):
            yunmin.load(good, runtime="onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_eps": 0.5}, r"norm_eps: expected 1e-05 as the artifact has it, found 0\.5"),
        ({"d_model": 31}, "d_model: expected 24 as the artifact has it, found 31"),
        ({"d_inner": (40, 48)}, r"d_inner: expected \(40, 40\) as the artifact has it, found \(40, 48\)"),
        ({"dt_rank": 5}, "dt_rank: expected 3"),
        ({"n_tokens": 200}, "n_tokens: expected 300"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: expected False"),
        ({"eos_token_ids": (3,)}, r"eos_token_ids: expected \(\)"),
        ({"use_bias": False}, "use_bias: expected True"),
    ],
)
def test_the_graph_of_another_model_is_refused_by_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = replace(small_config(), **change)
    good = write_onnx_artifact(tmp_path / "good", small_config())
    other = write_onnx_artifact(tmp_path / "other", config, tensors=random_tensors(config, 9))
    (good / GRAPH).write_bytes((other / GRAPH).read_bytes())
    record(good, small_config())
    with pytest.raises(ArtifactError, match=rf"model\.onnx: {message}"):
        yunmin.load(good, runtime="onnx")


@pytest.mark.parametrize("content", ["null", "3", '"x"', "[1]", "{", "{}"])
def test_a_config_in_the_metadata_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    def edit(model: Any) -> None:
        next(entry for entry in model.metadata_props if entry.key == "yunmin.config").value = content

    folder = write_onnx_artifact(tmp_path / "artifact", small_config())
    edit_graph(folder, edit)
    with pytest.raises(ArtifactError, match=r"model\.onnx: its config: expected "):
        yunmin.load(folder, runtime="onnx")


def _rename_ids(model: Any) -> None:
    model.graph.input[0].name = "ids"
    for node in model.graph.node:
        node.input[:] = ["ids" if name == "input_ids" else name for name in node.input]


def _replace_logits(model: Any, operator: str, repeats: int, **attributes: Any) -> Any:
    """Computes the logits from those that were; returns what is declared of them."""
    last = next(node for node in model.graph.node if "logits" in node.output)
    last.output[0] = "before"
    model.graph.node.append(onnx.helper.make_node(operator, ["before"] * repeats, ["logits"], **attributes))
    return next(value for value in model.graph.output if value.name == "logits").type.tensor_type


def _widen_logits(model: Any) -> None:
    _replace_logits(model, "Concat", 2, axis=-1).shape.dim[2].dim_value = 600


def _lengthen_logits(model: Any) -> None:
    _replace_logits(model, "Cast", 1, to=onnx.TensorProto.DOUBLE).elem_type = onnx.TensorProto.DOUBLE


def _drop_a_state(model: Any) -> None:
    del model.graph.output[-1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_rename_ids, r"input 'ids': expected none, found tensor\(int64\) of shape \(any, any\)"),
        (_widen_logits, r"output 'logits': expected tensor\(float\) of shape \(any, any, 300\), found .* 600\)"),
        (_lengthen_logits, r"output 'logits': expected tensor\(float\) .*, found tensor\(double\)"),
        (_drop_a_state, r"output 'present\.1\.recurrent_state': expected .* \(any, 5, 40\), found none"),
    ],
)
def test_a_graph_with_other_inputs_or_outputs_is_refused(
    tmp_path: Path, edit: Callable[[Any], object], message: str
) -> None:
    folder = write_onnx_artifact(tmp_path / "artifact", small_config())
    edit_graph(folder, edit)
    with pytest.raises(ArtifactError, match=rf"model\.onnx: {message}"):
        yunmin.load(folder, runtime="onnx")


def test_a_number_of_the_cpu_makes_no_difference(folder: Path) -> None:
    runtime = yunmin.load(folder, device="cpu:1", runtime="onnx").runtime
    assert runtime.device == torch.device("cpu")
    _, state = runtime.prefill([1])
    runtime.step([2], state)


def test_a_graph_that_changes_after_loading_is_not_opened_again(tmp_path: Path, threads: Callable[[int], None]) -> None:
    threads(1)
    folder = write_onnx_artifact(tmp_path / "artifact", small_config())
    runtime = onnx_runtime_of(folder)
    (folder / GRAPH).write_bytes(b"another")
    runtime.prefill([1])
    threads(2)
    with pytest.raises(ArtifactError, match=r"model\.onnx: wrong hash"):
        runtime.prefill([1])


def test_a_missing_onnxruntime_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("yunmin.runtime.onnx_runtime", "yunmin.runtime.onnx_session"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"'onnxruntime': pip install 'yunmin\[onnx\]'"):
        yunmin.load(folder, runtime="onnx")


@pytest.mark.parametrize("stored", ["none", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_saved_states_move_between_the_runtimes_of_the_same_weights(
    tmp_path: Path, stored: Any, precision: Any
) -> None:
    config, folder = small_config(d_model=64), tmp_path / "artifact"
    if stored == "none":
        write_model(folder, config)
    else:
        write_quantized(folder, config, stored)
    (folder / "onnx").mkdir()
    write_graph(folder / GRAPH, checkpoint_of(folder), GraphOptions(precision=precision))
    record(folder, config)
    path, models = tmp_path / "state.safetensors", {}
    for name in ("native", "torch", "onnx"):
        models[name] = yunmin.load(folder, device="cpu", runtime=name)
    for name, model in models.items():
        snapshot = model.snapshot([1, 2, 3])
        model.generate(snapshot, max_tokens=9, temperature=0)  # does not write over it
        model.save_state(path, snapshot)
        for other, restoring in models.items():
            if (stored, precision) == ("none", "int8") and (name == "onnx") != (other == "onnx"):
                with pytest.raises(StateError, match="another model"):
                    restoring.load_state(path)
                continue
            found = restoring.generate(restoring.load_state(path), max_tokens=9, temperature=0).token_ids
            if stored == "none" or name == other:  # integers round activations, each runtime in its own way
                expected = restoring.generate([1, 2, 3], max_tokens=9, temperature=0).token_ids
                require_same_greedy(found, expected, partial(_logits_after, restoring))


def _logits_after(model: LanguageModel, ids: Sequence[int]) -> Tensor:
    return model.prefill([1, 2, 3, *ids])[0]


def test_the_fingerprint_does_not_depend_on_how_a_graph_computes(tmp_path: Path) -> None:
    found = set()
    flavours: tuple[Flavour, ...] = ("ort", "portable")
    for flavour in flavours:
        folder = write_onnx_artifact(tmp_path / flavour, small_config(), GraphOptions(flavour))
        found.add(yunmin.load(folder, device="cpu", runtime="onnx").fingerprint)
    assert len(found) == 1


def _identity_graph() -> bytes:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "other", [value], [result])
    opset = onnx.helper.make_opsetid("", 21)
    content: bytes = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return content
