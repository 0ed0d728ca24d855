"""Orders of the channels: none changes the function, and the one for quantization loses least."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from export.cli import main as export_main
from export.compact import compact_model, read_source
from export.options import Options
from export.order import ORDERS, OrderKind, permuted, reordered
from export.pipeline import export
from export.statistics import input_statistics
from export.texts import Text
from export.wide import in_float64
from tests.export.fixtures import random_pillars, write_source, write_trained_run
from tests.models import random_ids, random_model
from yunmin.artifact import load_artifact
from yunmin.axes import layer_prefix
from yunmin.cli import run
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.quantization.order import Grouped

IDS = torch.arange(60).view(2, 30)
TEXT_IDS = Text(torch.arange(900) % 250, "test")


def _config(*, uniform: bool = True) -> MambaConfig:
    """Wider than one group of int4 weights."""
    config = MambaConfig.create(
        vocab_size=300, d_model=48, n_layers=2, d_state=6, dt_rank=3, use_bias=True, tie_word_embeddings=uniform
    )
    return config if uniform else config.with_widths(d_inner=(96, 70), d_state=(6, 9))


def _ignore(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained_run(tmp_path_factory.mktemp("run"), _config())


@pytest.mark.parametrize("kind", ORDERS)
@pytest.mark.parametrize("uniform", [True, False])
def test_no_order_changes_the_function(tmp_path: Path, kind: OrderKind, uniform: bool) -> None:
    config = _config(uniform=uniform)
    compact = compact_model(read_source(write_source(tmp_path / "source", config, pillars=random_pillars(config))))
    other = reordered(compact, kind, TEXT_IDS, _ignore)
    assert other.config == compact.config
    with torch.inference_mode():
        expected = in_float64(MambaLM.from_tensors(compact.config, compact.tensors))(IDS)
        found = in_float64(MambaLM.from_tensors(other.config, other.tensors))(IDS)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for layer in range(2):
        assert sorted(other.channels[layer].tolist()) == sorted(compact.channels[layer].tolist())
    assert sorted(other.residual.tolist()) == list(range(48))
    if kind == "identity":
        assert all(c.tolist() == sorted(c.tolist()) for c in other.channels)
    if kind in ("random", "correlation", "quantization"):
        assert other.residual.tolist() != list(range(48))


def test_permuting_back_gives_the_same_tensors(run_folder: Path) -> None:
    compact = compact_model(read_source(run_folder))
    other = reordered(compact, "random", None, _ignore)
    inner = [_positions(a, b) for a, b in zip(other.channels, compact.channels, strict=True)]
    back = permuted(other, inner, torch.argsort(other.residual))
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in compact.tensors.items())
    assert back.residual.tolist() == list(range(48))


def _positions(present: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Where each wanted channel lies now."""
    place = {channel: position for position, channel in enumerate(present.tolist())}
    return torch.tensor([place[channel] for channel in wanted.tolist()])


def test_quantization_order_lowers_the_error_of_int4_groups(tmp_path: Path) -> None:
    source = read_source(write_source(tmp_path / "source", _config()))
    compact = compact_model(source, torch.float32)
    # channels of unlike size, as trained models have them
    scale = torch.exp(torch.randn(96, generator=torch.Generator().manual_seed(3)))
    tensors = {
        n: t * scale if n.endswith(("x_proj.weight", "out_proj.weight")) else t for n, t in compact.tensors.items()
    }
    compact = type(compact)(compact.config, tensors, compact.channels, compact.residual)

    def error(kind: OrderKind) -> float:
        ordered = reordered(compact, kind, TEXT_IDS, _ignore).tensors
        names = [f"{layer_prefix(i)}mixer.{p}.weight" for i in range(2) for p in ("x_proj", "out_proj")]
        return sum(Grouped(ordered[name]).error() for name in names)

    assert error("quantization") < 0.8 * min(error("random"), error("identity"))


def test_artifact_in_another_order_is_proven_and_tells_it(run_folder: Path, tmp_path: Path) -> None:
    options = Options(quantize="int4", order="quantization", measured_tokens=600, calibration_tokens=1024)
    manifest = export(run_folder, tmp_path / "out", options=options)
    assert manifest.provenance["order"] == "quantization"
    assert manifest.parity["float64"].relative_error < 1e-10
    assert "residual_order.npy" in manifest.files
    assert sorted(np.load(tmp_path / "out/residual_order.npy").tolist()) == list(range(48))
    order = np.load(tmp_path / "out/scan_order.npy")
    plain = compact_model(read_source(run_folder))
    assert [sorted(row) for row in order.tolist()] == [sorted(c.tolist()) for c in plain.channels]
    assert order.tolist() != [c.tolist() for c in plain.channels]


def test_channels_put_back_in_their_starting_order_count_as_not_reordered(run_folder: Path, tmp_path: Path) -> None:
    assert export(run_folder, tmp_path / "trained").provenance["reordered_layers"] > 0
    manifest = export(run_folder, tmp_path / "out", options=Options(order="identity"))
    assert manifest.provenance["reordered_layers"] == 0


def test_float32_artifact_takes_an_order_too(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export_main, [str(run_folder), str(tmp_path / "out"), "--order", "random", "--json"]) == 0
    provenance = json.loads(capsys.readouterr().out)["provenance"]
    assert (provenance["order"], provenance["reordered_layers"]) == ("random", 2)
    checkpoint, manifest = load_artifact(tmp_path / "out")
    assert manifest.parity["float32"].holds
    assert manifest.perplexity == {}
    assert checkpoint.quantization.format == "none"


def test_statistics_are_those_of_the_inputs_seen() -> None:
    model = random_model()
    ids = random_ids(model.config, 9, 7)
    name = "backbone.layers.1.mixer.x_proj"
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(ids)
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    found = input_statistics(model, ids, second_moments=("in_proj", "x_proj"))[name]
    torch.testing.assert_close(found.mean, x.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.mean_squares, x.square().mean(0), rtol=1e-5, atol=1e-6)
    assert found.second_moments is not None
    torch.testing.assert_close(found.covariance(), torch.cov(x.T, correction=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.second_moments.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.tokens == len(x)
