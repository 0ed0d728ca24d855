from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import yunmin
from tests.models import write_model
from yunmin.runtime.cuda_graphs import CudaGraphRuntime
from yunmin.runtime.torch_runtime import TorchRuntime

pytestmark = pytest.mark.gpu


@pytest.fixture
def runtime(tmp_path_factory: pytest.TempPathFactory) -> CudaGraphRuntime:
    runtime = yunmin.load(write_model(tmp_path_factory.mktemp("graphs") / "model"), device="cuda").runtime
    assert isinstance(runtime, CudaGraphRuntime)
    return runtime


def test_replayed_steps_equal_eager_ones_for_every_number_of_rows(runtime: CudaGraphRuntime) -> None:
    eager = TorchRuntime(runtime.model)
    pool, expected = runtime.new_state(4), runtime.new_state(4)
    for step in range(24):
        rows = 1 + step % 4
        ids = [(7 * step + row) % runtime.config.n_tokens for row in range(rows)]
        logits, _ = runtime.step(ids, pool.first_rows(rows))
        wanted, after = eager.step(ids, expected.first_rows(rows))
        eager.scatter(expected, range(rows), after)
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(pool.conv + pool.ssm, expected.conv + expected.ssm, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_logits_outlive_the_next_step(runtime: CudaGraphRuntime) -> None:
    state = runtime.new_state(1)
    for _ in range(4):
        logits, state = runtime.step([1], state)
    before = logits.clone()
    runtime.step([2], state)
    assert torch.equal(logits, before)


def test_a_capture_does_not_mind_what_other_threads_allocate_and_copy(runtime: CudaGraphRuntime) -> None:
    stop = threading.Event()

    def allocate_and_copy() -> int:
        kept, rounds = [], 0
        while not stop.is_set():
            kept.append(torch.ones(1 << 20, device="cuda"))  # new memory, not what the allocator has at hand
            assert kept[-1].cpu().sum() == 1 << 20
            rounds += 1
            if len(kept) == 500:
                kept.clear()
        return rounds

    with ThreadPoolExecutor(1) as other:
        rounds = other.submit(allocate_and_copy)
        try:
            pool = runtime.new_state(16)
            for rows in range(1, 17):
                for _ in range(4):
                    runtime.step([1] * rows, pool.first_rows(rows))
        finally:
            stop.set()
        assert rounds.result() > 0


def test_a_graph_of_memory_that_was_freed_is_never_replayed_on_another(runtime: CudaGraphRuntime) -> None:
    eager = TorchRuntime(runtime.model)
    for start in range(6):
        state, expected = runtime.new_state(2), runtime.new_state(2)  # likely where the last one lay
        for step in range(5):
            logits, state = runtime.step([start, step], state)
            wanted, expected = eager.step([start, step], expected)
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
