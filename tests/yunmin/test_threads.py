"""One setting of threads, and a team that shares work without depending on luck."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from yunmin.errors import ConfigError
from yunmin.kernels.barrier import BARRIER_NUMBERS, meet
from yunmin.kernels.jit import cache_folder, jit
from yunmin.kernels.warmup import compile_inference
from yunmin.threads import get_threads, run_team, set_threads


@pytest.fixture(autouse=True)
def _same_threads_afterwards() -> Iterator[None]:
    before = get_threads()
    yield
    set_threads(before)


@jit
def _pass_on(numbers: NDArray[np.int64], rounds: int, barrier: int, rank: int, size: int) -> None:
    """Each round adds the left neighbour's number of the round before: wrong at once where a barrier leaks."""
    for _ in range(rounds):
        left = numbers[(rank - 1) % size]
        meet(barrier, size)
        numbers[rank] += left
        meet(barrier, size)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_team_meets_as_often_as_it_is_told(size: int) -> None:
    set_threads(size)
    numbers = np.ones(size, np.int64)
    meeting = np.zeros(BARRIER_NUMBERS, np.int64)
    for _ in range(4):
        numbers[:] = 1
        run_team(_pass_on, numbers, 50, meeting.ctypes.data)
        assert (numbers == 2**50).all()


def test_every_rank_runs_once_on_a_thread_of_its_own() -> None:
    set_threads(3)
    seen: list[tuple[int, int, int]] = []
    run_team(lambda rank, size: seen.append((rank, size, threading.get_ident())))
    assert sorted(rank for rank, _, _ in seen) == [0, 1, 2]
    assert {size for _, size, _ in seen} == {3}
    assert len({thread for _, _, thread in seen}) == 3


def test_an_error_on_any_rank_reaches_the_caller_and_the_team_lives_on() -> None:
    set_threads(2)

    def fail(failing: int, rank: int, size: int) -> None:
        if rank == failing:
            raise ValueError(f"rank {rank} of {size}")

    for rank in (0, 1):
        with pytest.raises(ValueError, match=f"rank {rank} of 2"):
            run_team(fail, rank)
    run_team(fail, 2)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")
def test_an_interrupted_caller_waits_for_the_whole_team_and_the_team_lives_on() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs started in the background ignore it
    try:
        _interrupt_a_team()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_a_team() -> None:
    set_threads(3)
    caller = threading.get_ident()
    done: list[int] = []

    def interrupt(rank: int, _size: int) -> None:
        if rank > 0:
            time.sleep(0.02)  # by now the caller waits
            if rank == 1:
                signal.pthread_kill(caller, signal.SIGINT)
            time.sleep(0.05)
        done.append(rank)

    with pytest.raises(KeyboardInterrupt):
        run_team(interrupt)
    assert sorted(done) == [0, 1, 2]
    run_team(lambda rank, _size: done.append(rank))
    assert sorted(done) == [0, 0, 1, 1, 2, 2]


def test_the_setting_reaches_torch_and_refuses_nonsense() -> None:
    set_threads(1)
    assert (get_threads(), torch.get_num_threads()) == (1, 1)
    wrong: Any
    for wrong in (0, -2, True, 1.5, "2", None):
        with pytest.raises(ConfigError, match=r"threads must be an integer in 1\.\.1024"):
            set_threads(wrong)
    assert get_threads() == 1


def test_the_environment_sets_the_threads() -> None:
    code = (
        "import os, torch; from yunmin import threads; from yunmin.errors import ConfigError\n"
        "own = torch.get_num_threads()\n"
        "for text in ('', '0', 'many', '-1', '3'):\n"
        "    os.environ['YUNMIN_THREADS'], threads._chosen = text, None\n"
        "    try: print(threads.get_threads() if threads.get_threads() != own else 'own')\n"
        "    except ConfigError as error: print('error')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["own", "own", "error", "error", "3"]


def test_kernels_are_kept_in_the_cache_folder_and_found_by_the_next_process(tmp_path: Path) -> None:
    compile_inference()
    ours = cache_folder()
    assert ours is not None
    theirs = shutil.copytree(ours, tmp_path / "yunmin" / ours.name)  # no other test's compiling changes it
    before = {path: path.stat().st_mtime_ns for path in theirs.rglob("*.nbc")}
    assert before
    command = [str(Path(sys.executable).with_name("yunmin")), "warmup", "--inference-only", "--json"]
    environment = {**os.environ, "YUNMIN_CACHE": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cache"] == str(theirs)
    assert {path: path.stat().st_mtime_ns for path in theirs.rglob("*.nbc")} == before


@pytest.mark.parametrize("cache", ["file", "~nobody-of-this-name/cache"])
def test_a_cache_folder_that_cannot_be_written_is_said_and_done_without(tmp_path: Path, cache: str) -> None:
    (tmp_path / "file").write_text("")
    code = "from yunmin.kernels.jit import cache_folder; print(cache_folder())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "YUNMIN_CACHE": cache},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"
    assert "every process compiles its own" in done.stderr
