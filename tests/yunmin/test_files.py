"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yunmin.files import atomic_file, atomic_folder, sha256_file, write_json, write_safetensors

KILLED_WHILE_WRITING = """
import os, signal, sys
from yunmin.files import atomic_file, atomic_folder
with (atomic_folder if sys.argv[1] == "folder" else atomic_file)(sys.argv[2]) as aside:
    path = aside / "part" if sys.argv[1] == "folder" else aside
    path.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "out") as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "inner" / "a.txt").read_text() == "a"
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing_and_keeps_what_was_there(
    tmp_path: Path, kind: str, error: type[BaseException]
) -> None:
    target = tmp_path / "out"
    if kind == "folder":
        target.mkdir()
        (target / "old").write_text("old")
        with pytest.raises(error), atomic_folder(target, replace=True) as aside:  # noqa: PT012
            (aside / "new").write_text("new")
            raise error
        assert [p.name for p in target.iterdir()] == ["old"]
    else:
        target.write_text("old")
        with pytest.raises(error), atomic_file(target) as aside:  # noqa: PT012
            aside.write_text("new")
            raise error
        assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_killed_process_leaves_no_half_result(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, kind, str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_gives_way_only_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for content in ("first", "second"):
        with atomic_folder(target, replace=True) as aside:
            (aside / "a").write_text(content)
    with pytest.raises(OSError, match="not empty"), atomic_folder(target) as aside:
        (aside / "a").write_text("third")
    assert (target / "a").read_text() == "second"
    assert list(tmp_path.iterdir()) == [target]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as aside:
        (aside / "a").write_text("old")
    rename = Path.rename

    def fails_for_the_new(self: Path, other: Path) -> Path:
        if Path(other) == target and self.suffix != ".old":
            raise OSError(errno.EIO, "no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(OSError, match="no"), atomic_folder(target, replace=True) as aside:
        (aside / "a").write_text("new")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    before = os.umask(umask)
    try:
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
        with atomic_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == file_mode
    assert (tmp_path / "out").stat().st_mode & 0o777 == folder_mode


def test_hashes_and_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": "é", "a": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")


def test_tensors_that_are_views_are_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base = torch.arange(12.0).view(3, 4)
    write_safetensors(tmp_path / "a.safetensors", {"t": base.T, "row": base[1].clone().requires_grad_()})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], base.T)
