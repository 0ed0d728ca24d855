"""Memory given back early: pages of mapped files leave it, and no value changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from yunmin import memory
from yunmin.memory import _OF_FILE, _PRESENT, _SWAPPED, release_pages

_MIB = 1 << 20

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere nothing is released")


def resident() -> int:
    """MiB of files in this process's memory, those of a file system in memory too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile:", "RssShmem:"))) >> 10


def test_pages_of_a_mapped_file_leave_memory_and_come_back(tmp_path: Path) -> None:
    values = torch.arange(16 * _MIB, dtype=torch.float32)  # 64 MiB
    save_file({"x": values}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["x"]
    assert torch.equal(mapped, values)
    before = resident()
    release_pages([mapped])
    assert resident() <= before - 60
    assert torch.equal(mapped, values)


def test_what_was_written_or_lies_elsewhere_is_kept(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(_MIB)}, tmp_path / "x.safetensors")
    mapped, own = load_file(tmp_path / "x.safetensors")["x"], torch.arange(_MIB)
    mapped[12345] = 7.0
    release_pages([mapped, mapped[5:], own, own.view(2, -1).T, torch.empty(0), torch.empty(3)])
    assert mapped[12345] == 7.0
    assert int(mapped.count_nonzero()) == 1
    assert torch.equal(own, torch.arange(_MIB))


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([_PRESENT | _OF_FILE, 0, _PRESENT | _OF_FILE], True),
        ([_PRESENT | _OF_FILE, _PRESENT], False),
        ([_PRESENT | _OF_FILE, _SWAPPED], False),
        ([_SWAPPED, _SWAPPED], False),
        ([0, 0], False),
    ],
)
def test_only_pages_known_to_be_a_files_are_let_go(tmp_path: Path, entries: list[int], expected: bool) -> None:
    (tmp_path / "pagemap").write_bytes(b"".join(int(entry).to_bytes(8, "little") for entry in entries))
    with (tmp_path / "pagemap").open("rb") as pages:
        assert memory._are_of_files(pages.fileno(), 0, len(entries)) == expected


def test_where_the_system_does_not_tell_nothing_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.ones(16 * _MIB)}, tmp_path / "x.safetensors")
    mapped = load_file(tmp_path / "x.safetensors")["x"]
    assert int(mapped.count_nonzero()) == 16 * _MIB  # all of it read
    monkeypatch.setattr(memory, "_PAGES", tmp_path / "none")
    before = resident()
    release_pages([mapped])
    assert resident() >= before - 4
