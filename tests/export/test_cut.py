"""Making up for a cut: what the kept channels can give is given, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from export.cut import cut_and_fit, cut_channels, fitted_readers, observed
from export.texts import Text
from tests.export.fixtures import small_config
from tests.models import random_ids, random_tensors
from yunmin.axes import layer_prefix
from yunmin.checkpoint import Checkpoint
from yunmin.errors import CheckpointError
from yunmin.model import MambaLM

CONFIG = small_config().with_widths(d_inner=(48, 40))
TEXT = Text(random_ids(CONFIG, 1, 4096)[0], "text")
KEPT = [torch.arange(32), torch.arange(40)]


def _checkpoint(tensors: dict[str, Tensor] | None = None) -> Checkpoint:
    return Checkpoint(CONFIG, random_tensors(CONFIG) if tensors is None else tensors, None, Path("nowhere"))


def _fitted(checkpoint: Checkpoint, kept: list[Tensor] = KEPT) -> Checkpoint:
    return cut_and_fit(checkpoint, kept, observed(checkpoint, TEXT, for_fit=True))


def _first_layer(checkpoint: Checkpoint) -> Tensor:
    """What the first layer adds to the residual stream."""
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    seen: list[Tensor] = []
    model.backbone.blocks[0].mixer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    with torch.no_grad():
        model(TEXT.sequences())
    return seen[0]


def _error(checkpoint: Checkpoint, cut: Checkpoint) -> float:
    return float((_first_layer(checkpoint) - _first_layer(cut)).square().mean())


def test_channels_that_repeat_kept_ones_are_cut_without_loss() -> None:
    tensors = random_tensors(CONFIG)
    mixer = f"{layer_prefix(0)}mixer."
    inner, again = CONFIG.d_inner[0], torch.arange(32, 48)
    for name in ("conv1d.weight", "conv1d.bias", "dt_proj.weight", "dt_proj.bias", "A_log", "D"):
        tensors[mixer + name] = tensors[mixer + name].index_copy(0, again, tensors[mixer + name][:16])
    for name in [name for name in tensors if name.startswith(f"{mixer}in_proj")]:
        rows = tensors[name].view(2, inner, -1)
        tensors[name] = rows.index_copy(1, again, rows[:, :16]).reshape(tensors[name].shape)
    checkpoint = _checkpoint(tensors)
    plain, fitted = cut_channels(checkpoint, KEPT), _fitted(checkpoint)
    assert _error(checkpoint, fitted) < 1e-3 * _error(checkpoint, plain)


def test_what_a_layer_gives_is_closer_than_without() -> None:
    checkpoint = _checkpoint()
    assert _error(checkpoint, _fitted(checkpoint)) < 0.8 * _error(checkpoint, cut_channels(checkpoint, KEPT))


def test_only_what_reads_cut_channels_changes() -> None:
    checkpoint = _checkpoint()
    before = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    fitted, plain = _fitted(checkpoint), cut_channels(checkpoint, KEPT)
    changed = {name for name, tensor in fitted.tensors.items() if not torch.equal(tensor, plain.tensors[name])}
    assert changed == {f"{layer_prefix(0)}mixer.{name}.weight" for name in ("x_proj", "out_proj")}
    assert fitted.config == plain.config
    assert all(torch.equal(checkpoint.tensors[name], tensor) for name, tensor in before.items())
    whole = [torch.arange(width) for width in CONFIG.d_inner]
    same = _fitted(checkpoint, whole)
    assert all(torch.equal(same.tensors[name], tensor) for name, tensor in checkpoint.tensors.items())


def test_channels_that_never_speak_are_no_obstacle() -> None:
    tensors = random_tensors(CONFIG)
    mixer = f"{layer_prefix(0)}mixer."
    for name in ("conv1d.weight", "conv1d.bias"):
        tensors[mixer + name] = tensors[mixer + name].index_fill(0, torch.arange(20), 0.0)
    fitted = _fitted(_checkpoint(tensors))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fitted.tensors.values())


def test_few_tokens_do_little_harm() -> None:
    checkpoint = _checkpoint()
    plain = _error(checkpoint, cut_channels(checkpoint, KEPT))
    for tokens in (2, 20, 32, 40, 64):
        text = Text(TEXT.token_ids[-tokens:], "little text")
        fitted = cut_and_fit(checkpoint, KEPT, observed(checkpoint, text, for_fit=True))
        assert _error(checkpoint, fitted) < 1.1 * plain


@pytest.mark.parametrize("projection", ["x_proj", "out_proj"])
def test_masked_weights_stay_zero(projection: str) -> None:
    tensors = random_tensors(CONFIG)
    name = f"{layer_prefix(0)}mixer.{projection}.weight"
    mask = torch.rand(tensors[name].shape, generator=torch.Generator().manual_seed(2)) < 0.5
    tensors[name] = tensors[name] * mask
    checkpoint = _checkpoint(tensors)
    fitted, plain = _fitted(checkpoint), cut_channels(checkpoint, KEPT)
    assert torch.equal(fitted.tensors[name], plain.tensors[name])
    other = f"{layer_prefix(0)}mixer.{'out_proj' if projection == 'x_proj' else 'x_proj'}.weight"
    assert not torch.equal(fitted.tensors[other], plain.tensors[other])
    assert fitted_readers(checkpoint, KEPT) == (("out_proj",) if projection == "x_proj" else ("x_proj",))
    assert fitted_readers(checkpoint, [torch.arange(32)] * 2) == ("x_proj", "out_proj")  # in the other layer


def test_weights_that_underflew_are_no_mask() -> None:
    tensors = random_tensors(CONFIG)
    name = f"{layer_prefix(0)}mixer.out_proj.weight"
    tensors[name][0, 0] = tensors[name][3, 7] = 0.0
    checkpoint = _checkpoint(tensors)
    assert not torch.equal(_fitted(checkpoint).tensors[name], cut_channels(checkpoint, KEPT).tensors[name])


def test_activations_that_are_not_finite_are_told() -> None:
    tensors = random_tensors(CONFIG)
    tensors[f"{layer_prefix(0)}mixer.in_proj.weight"][5] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.x_proj: its inputs on the calibration text"):
        _fitted(_checkpoint(tensors))
