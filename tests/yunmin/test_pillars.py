"""What the pillars learned survives its files, and damaged files are refused by layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import random_pillars, small_config
from yunmin.errors import CheckpointError
from yunmin.pillars import (
    PILLARS_FILE,
    SCAN_ORDER_FILE,
    SCAN_ORDER_INVERSE_FILE,
    Pillars,
    load_pillars,
    save_pillars,
    write_scan_order,
)

CONFIG = small_config(d_inner=(40, 24), d_state=(5, 8))


def test_pillars_read_back_the_same(tmp_path: Path) -> None:
    pillars = random_pillars(CONFIG, masked=True)
    pillars.training["gate_logits.0"] = torch.randn(40)
    save_pillars(tmp_path, pillars)
    loaded = load_pillars(tmp_path, CONFIG)
    for name in ("channel_gates", "state_gates", "scan_order"):
        assert all(map(torch.equal, getattr(loaded, name), getattr(pillars, name)))
    for name in ("weight_masks", "training"):
        mine, other = getattr(loaded, name), getattr(pillars, name)
        assert set(mine) == set(other)
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_a_folder_without_pillars_has_the_identity(tmp_path: Path) -> None:
    pillars = load_pillars(tmp_path, CONFIG)
    assert all(gate.eq(1).all() for gate in pillars.channel_gates + pillars.state_gates)
    assert torch.equal(pillars.scan_order[1], torch.arange(24))
    assert not pillars.weight_masks


def test_scan_order_and_its_inverse_are_inverse_and_mark_what_was_cut(tmp_path: Path) -> None:
    orders = [torch.tensor([3, 0, 4]), torch.tensor([1, 0])]
    write_scan_order(tmp_path, orders, starting_widths=[5, 2])
    order, inverse = (np.load(tmp_path / name) for name in (SCAN_ORDER_FILE, SCAN_ORDER_INVERSE_FILE))
    assert order.dtype == inverse.dtype == np.int64
    assert order.tolist() == [[3, 0, 4], [1, 0, -1]]
    assert inverse.tolist() == [[1, -1, -1, 0, 2], [1, 0, -1, -1, -1]]


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"channel_gate.1": torch.ones(40)}, r"channel_gate of layer 1: expected shape \(24,\), found \(40,\)"),
        ({"state_gate.0": None}, r"state_gate of layer 0: expected shape \(5,\), found nothing"),
        ({"mask.backbone.layers.0.mixer.A_log": torch.ones(40, 5)}, "which is no projection of this model"),
        ({"mask.backbone.layers.1.mixer.out_proj.weight": torch.ones(3)}, r"expected \(24, 24\), found \(3,\)"),
    ],
)
def test_gates_and_masks_that_do_not_fit_are_refused(
    tmp_path: Path, changed: dict[str, torch.Tensor | None], named: str
) -> None:
    save_pillars(tmp_path, random_pillars(CONFIG, masked=True))
    tensors = load_file(tmp_path / PILLARS_FILE) | changed
    save_file({n: t for n, t in tensors.items() if t is not None}, tmp_path / PILLARS_FILE)
    with pytest.raises(CheckpointError, match=named):
        load_pillars(tmp_path, CONFIG)


def test_truncated_pillars_are_refused(tmp_path: Path) -> None:
    save_pillars(tmp_path, Pillars.identity(CONFIG))
    path = tmp_path / PILLARS_FILE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_pillars(tmp_path, CONFIG)


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (None, "missing"),
        (np.zeros((2, 40), dtype=np.int64), "row 0 is no permutation of 40 channels"),
        (np.zeros((2, 39), dtype=np.int64), r"expected int64 \(2, 40\), found int64 \(2, 39\)"),
        (np.zeros((2, 40)), "found float64"),
        (np.array([{}]), "expected an int64 array"),
        (b"not numpy", "expected an int64 array"),
    ],
    ids=str,
)
def test_a_damaged_scan_order_is_refused(tmp_path: Path, rows: object, named: str) -> None:
    save_pillars(tmp_path, Pillars.identity(CONFIG))
    path = tmp_path / SCAN_ORDER_FILE
    if rows is None:
        path.unlink()
    elif isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        np.save(path, rows)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=named):
        load_pillars(tmp_path, CONFIG)
