"""Memory given back early: pages of mapped files leave it, and no value changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from yunmin.memory import release_pages, trim_heap

_MIB = 1 << 20


def resident(kind: str) -> int:
    """MiB of this process, `RssFile` or `RssAnon`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) >> 10


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is released")
def test_pages_of_a_mapped_file_leave_memory_and_come_back(tmp_path: Path) -> None:
    values = torch.arange(16 * _MIB, dtype=torch.float32)  # 64 MiB
    save_file({"x": values}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(mapped, values)
    before = resident("RssFile")
    release_pages([mapped])
    assert resident("RssFile") <= before - 60
    assert torch.equal(mapped, values)


def test_what_was_written_or_lies_elsewhere_is_kept(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(_MIB)}, tmp_path / "x.safetensors")
    mapped, own = load_file(tmp_path / "x.safetensors")["x"], torch.arange(_MIB)
    mapped[12345] = 7.0
    release_pages([mapped, mapped[5:], own, own.view(2, -1).T, torch.empty(0), torch.empty(3)])
    assert mapped[12345] == 7.0
    assert int(mapped.count_nonzero()) == 1
    assert torch.equal(own, torch.arange(_MIB))


def test_trimming_the_heap_changes_nothing() -> None:
    kept = [torch.full((1000,), float(i)) for i in range(50)]
    del kept[::2]
    trim_heap()
    assert [float(tensor[0]) for tensor in kept] == [float(i) for i in range(1, 50, 2)]
