"""An artifact's ONNX graph: written before the proof, proven in onnxruntime, and nothing is left where it fails."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from export.cli import main as export_main
from export.onnx_graph import matrices
from export.onnx_graph.emit import EMBEDDING
from export.onnx_graph.layer import LayerWriter
from export.onnx_graph.matrices import Matrices
from export.onnx_graph.probe_session import ProbeSession
from export.options import Options
from export.pipeline import export
from export.verify import make_probe
from export.wide import in_float64
from tests.export.fixtures import small_config, write_source, write_trained_run
from tests.models import random_tensors
from yunmin.artifact import load_artifact
from yunmin.cli import run
from yunmin.commands.inspect import main as inspect_main
from yunmin.errors import ConfigError, VerificationError
from yunmin.model import MambaLM
from yunmin.runtime.onnx_contract import Flavour, Precision

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("flavour", ["ort", "portable"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
def test_graph_of_a_cut_artifact_is_proven_and_recorded(tmp_path: Path, flavour: Flavour, precision: Precision) -> None:
    source = write_trained_run(tmp_path / "run", small_config(uniform=False))
    options = Options(onnx=True, onnx_flavour=flavour, onnx_precision=precision)
    manifest = export(source, tmp_path / "out", options=options)
    assert "onnx/model.onnx" in manifest.files
    graph = manifest.provenance["onnx"]
    assert (graph["flavour"], graph["precision"], graph["opset"]) == (flavour, precision, 21)
    assert manifest.parity["onnx"].relative_error <= 1e-4
    assert manifest.parity["onnx_steps"].tokens == 3 * (1 + 32 + 5)
    is_rounded = flavour == "ort" and precision in ("int8", "int4")
    assert ("onnx_int8_activations" in manifest.parity) == is_rounded
    load_artifact(tmp_path / "out")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_graph_takes_the_artifacts_own_precision(tmp_path: Path, quantize: str) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    arguments = [str(source), str(tmp_path / "out"), "--quantize", quantize, "--onnx", "--json"]
    assert run(export_main, arguments) == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["provenance"]["onnx"]["precision"] == quantize


def test_graph_that_computes_something_else_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    true_pairs = matrices._pairs
    monkeypatch.setattr(matrices, "_pairs", lambda nibbles: true_pairs(nibbles.flip(0)))
    with pytest.raises(VerificationError, match=r"^onnx: .*nothing was written"):
        export(source, tmp_path / "out", options=Options(onnx=True, onnx_precision="int4"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("seed", [0, 3])
def test_graph_that_serves_something_else_is_refused_however_much_rounding_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False, seed=seed)
    true_run = ProbeSession._run

    def zeros(session: ProbeSession, *arguments: Any) -> tuple[torch.Tensor, Any]:
        logits, states = true_run(session, *arguments)
        return (logits if session.is_exact else 0 * logits), states

    monkeypatch.setattr(ProbeSession, "_run", zeros)
    with pytest.raises(VerificationError, match=r"^onnx_int8_activations"):
        export(source, tmp_path / "out", options=Options(onnx=True, onnx_precision="int8"))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_what_rounding_changes_in_a_graph_is_told(tmp_path: Path, precision: Precision, capsys: Captured) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    arguments = [str(source), str(tmp_path / "out"), "--onnx", "--onnx-precision", precision]
    assert run(export_main, arguments) == 0
    assert "rounding takes its logits up to" in capsys.readouterr().out
    assert "Rounding of weights or activations takes its logits up to" in (tmp_path / "out/README.md").read_text()
    graph = json.loads((tmp_path / "out/manifest.json").read_text())["provenance"]["onnx"]
    assert 1e-5 < graph["change"] < 1
    assert {"Scan", "If", "Squeeze"} <= graph["operators"].keys()


def test_embedding_rows_that_no_text_reads_are_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tied=False)
    source = write_source(tmp_path / "source", config, tokenizer=False)
    read = set(itertools.chain(*make_probe(None, config.n_tokens).sequences))
    unread = max(set(range(config.vocab_size)) - read)
    true_table = Matrices._stored_table

    def changed(matrices: Matrices, name: str) -> str:
        stored = true_table(matrices, name)
        if name == EMBEDDING:
            table, element_type, dims = matrices._graph.weights[stored]
            table = table.clone()
            table[unread] += 1e-3
            matrices._graph.weights[stored] = (table, element_type, dims)
        return stored

    monkeypatch.setattr(Matrices, "_stored_table", changed)
    with pytest.raises(VerificationError, match=r"^onnx_embedding"):
        export(source, tmp_path / "out", options=Options(onnx=True))


def test_scan_that_mixes_rows_up_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    true_body = LayerWriter._step_body

    def mixing(writer: LayerWriter, decay_rates: str, layer: int) -> onnx.GraphProto:
        """The first row's decay is everyone's."""
        body = true_body(writer, decay_rates, layer)
        first = onnx.helper.make_node("Slice", ["delta", writer.graph.ints(0), writer.graph.ints(1)], ["first"])
        body.node[0].input[0] = "first"
        body.node.insert(0, first)
        return body

    monkeypatch.setattr(LayerWriter, "_step_body", mixing)
    with pytest.raises(VerificationError, match=r"^onnx_steps"):
        export(source, tmp_path / "out", options=Options(onnx=True))


def test_graph_that_onnxruntime_cannot_run_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    true_zeros = ProbeSession._zeros
    monkeypatch.setattr(
        ProbeSession, "_zeros", lambda *of: {name: state[:, :, :1] for name, state in true_zeros(*of).items()}
    )
    with pytest.raises(VerificationError, match=r"^onnx: onnxruntime cannot run the graph: .*nothing was written"):
        export(source, tmp_path / "out", options=Options(onnx=True))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_card_and_inspect_tell_of_the_graph(tmp_path: Path, capsys: Captured) -> None:
    source = write_source(tmp_path / "source", small_config(), tokenizer=False)
    assert run(export_main, [str(source), str(tmp_path / "out"), "--onnx"]) == 0
    assert "onnx/model.onnx: ort, fp32" in capsys.readouterr().out
    assert "## ONNX" in (tmp_path / "out/README.md").read_text()
    assert run(inspect_main, [str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "onnx.flavour" in shown
    assert "onnx/model.onnx" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"onnx_precision": "int8"}, "--onnx, which was not asked for"),
        ({"onnx": True, "quantize": "int8", "onnx_precision": "int4"}, "--quantize int8: expected --onnx-precision"),
        ({"onnx": True, "max_increase": 0.1, "onnx_precision": "int4"}, "--max-perplexity-increase"),
        ({"format": "hf", "onnx": True}, "--onnx is of an artifact"),
        ({"format": "gguf", "quantize": "int8"}, "--quantize int8 is of an artifact"),
        ({"format": "hf", "triton": "repository"}, "--triton repository is of an artifact"),
        ({"format": "hf", "gguf_type": "f32"}, "--gguf-type f32: expected --format gguf"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Options(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["hf", "mamba_ssm"])
def test_other_format_is_written_from_the_proven_weights(tmp_path: Path, kind: str) -> None:
    config = small_config()
    # of cut widths, mamba_ssm takes only multiples of d_model
    source = write_trained_run(tmp_path / "run", config) if kind == "hf" else write_source(tmp_path / "source", config)
    assert run(export_main, [str(source), str(tmp_path / "out"), "--format", kind]) == 0
    assert (tmp_path / "out/config.json").is_file()


def _scan_along_the_first_axis(graph: onnx.GraphProto) -> None:
    """Transposes around each `Scan`, in place: `onnx.reference` implements no other axis than the first."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "If":
                _scan_along_the_first_axis(attribute.g)
        if node.op_type != "Scan":
            nodes.append(node)
            continue
        after: list[onnx.NodeProto] = []
        values = {attribute.name: attribute for attribute in node.attribute}
        for kind, names in (("scan_input_axes", node.input), ("scan_output_axes", node.output)):
            axes = values[kind].ints
            first = len(names) - len(axes)
            for i, axis in enumerate(list(axes)):
                assert axis == 1
                axes[i] = 0
                name = names[first + i]
                names[first + i] = f"{name}.time_first"
                pair = [name, names[first + i]]
                source, target = pair if kind == "scan_input_axes" else pair[::-1]
                transpose = onnx.helper.make_node("Transpose", [source], [target], perm=[1, 0, 2])
                (nodes if kind == "scan_input_axes" else after).append(transpose)
        nodes += [node, *after]
    del graph.node[:]
    graph.node.extend(nodes)


def test_onnx_reference_agrees(tmp_path: Path) -> None:
    """The operators' own definition, in numpy, on the portable graph: a sequence, and then a single token."""
    config = small_config(uniform=False)
    source = write_source(tmp_path / "source", config, tokenizer=False)
    export(source, tmp_path / "out", options=Options(onnx=True, onnx_flavour="portable"))
    ids = np.array([make_probe(None, config.n_tokens).sequences[3]], np.int64)
    graph = onnx.load(tmp_path / "out/onnx/model.onnx")
    _scan_along_the_first_axis(graph.graph)
    feeds: dict[str, Any] = {"input_ids": ids, "num_logits_to_keep": np.array(0, np.int64)}
    for value in graph.graph.input:
        if value.name.startswith("past"):
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
            feeds[value.name] = np.zeros((1, *dims), np.float32)
    evaluator, last = ReferenceEvaluator(graph), ids[:, -1:]
    sequence = dict(zip(evaluator.output_names, cast("list[Any]", evaluator.run(None, feeds)), strict=True))
    past = {name.replace("present.", "past_key_values."): value for name, value in sequence.items()}
    (step, *_) = cast("list[Any]", evaluator.run(["logits"], {**feeds, **past, "input_ids": last}))
    with torch.inference_mode():
        expected = MambaLM.from_tensors(config, random_tensors(config))(torch.from_numpy(np.hstack([ids, last])))
    found = np.concatenate([sequence["logits"], step], axis=1)
    assert float(np.abs(found - expected.numpy()).max()) <= 1e-4 * float(expected.abs().max())


def test_float64_one_module_at_a_time_equals_float64() -> None:
    config = small_config(uniform=False, tied=False)
    ids = torch.arange(22).view(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.inference_mode():
        whole = MambaLM.from_tensors(config, random_tensors(config)).double()(ids, mask)
        found = in_float64(MambaLM.from_tensors(config, random_tensors(config)))(ids, mask)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, whole, rtol=1e-13, atol=1e-13)
