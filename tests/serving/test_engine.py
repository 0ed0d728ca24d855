from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from serving.engine.engine import Engine
from serving.engine.job import DeadlineError, EngineStoppedError, Job, Load, QueueFullError, SequenceError
from tests.serving.engines import (
    FOREVER,
    POISON,
    REQUESTS,
    WatchedRuntime,
    alone,
    engine_on,
    idle,
    read,
    run,
    sampling,
)
from yunmin.language_model import LanguageModel
from yunmin.sampling import SamplingParams


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_output_equals_generating_alone_whoever_the_neighbours_are(model: LanguageModel, slots: int) -> None:
    async def main() -> None:
        async with engine_on(model, slots=slots) as engine:
            streams = [engine.submit(Job(model.encode(p), sampling(params), 60)) for p, params in REQUESTS * 2]
            results = await asyncio.gather(*map(read, streams))
        assert results == [alone(model, p, params) for p, params in REQUESTS * 2]

    run(main())


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(REQUESTS) - 1), st.floats(0, 0.02), st.none() | st.integers(0, 8)), max_size=12
    ),
    st.integers(1, 4),
)
def test_random_arrivals_and_departures_change_no_result_and_leak_no_slot(
    model: LanguageModel, arrivals: list[tuple[int, float, int | None]], slots: int
) -> None:
    async def visit(engine: Engine, which: int, delay_s: float, leave_after: int | None) -> None:
        prompt, params = REQUESTS[which]
        await asyncio.sleep(delay_s)
        with engine.submit(Job(model.encode(prompt), sampling(params), 60)) as stream:
            if leave_after is None:
                assert await read(stream) == alone(model, prompt, params)
                return
            for _ in range(leave_after):
                if (await anext(stream)).finish_reason is not None:
                    return

    async def main() -> None:
        async with engine_on(model, slots=slots) as engine:
            await asyncio.gather(*(visit(engine, *arrival) for arrival in arrivals))
            await idle(engine)

    run(main())


def test_cancelling_frees_the_slot_for_who_waits(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            with engine.submit(Job([1, 2], FOREVER, 60)) as endless:
                await anext(endless)
                waiting = engine.submit(Job([3], SamplingParams(max_tokens=2, temperature=0), 60))
                assert engine.load == Load(1, 1)
            assert len((await read(waiting))[1]) == 2
            await idle(engine)
            assert [piece async for piece in endless] == []

    run(main())


def test_cancelling_a_waiting_or_reading_sequence_removes_it(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1, chunk=1) as engine:
            reading = engine.submit(Job([1] * 5000, FOREVER, 60))
            waiting = engine.submit(Job([3], FOREVER, 60))
            while engine.load != Load(1, 1):
                await asyncio.sleep(0.001)
            waiting.cancel()
            reading.cancel()
            await idle(engine)

    run(main())


def test_a_full_queue_refuses_with_a_time_to_come_back(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1, queue=1) as engine:
            streams = [engine.submit(Job([1], FOREVER, 60))]
            await anext(streams[0])
            streams.append(engine.submit(Job([2], FOREVER, 60)))
            with pytest.raises(QueueFullError) as refused:
                engine.submit(Job([3], FOREVER, 60))
            assert refused.value.retry_after_s >= 1
            for stream in streams:
                stream.cancel()
            await idle(engine)
            assert len((await read(engine.submit(Job([3], SamplingParams(max_tokens=3, temperature=0), 60))))[1]) == 3

    run(main())


def test_a_burst_fits_in_slots_and_queue_together(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=2, queue=0) as engine:
            first, second = (engine.submit(Job([n], FOREVER, 60)) for n in (1, 2))
            with pytest.raises(QueueFullError):
                engine.submit(Job([3], FOREVER, 60))
            await anext(first)
            await anext(second)

    run(main())


def test_deadlines_end_running_and_waiting_sequences(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            running = engine.submit(Job([1], FOREVER, 0.3))
            waiting = engine.submit(Job([1], FOREVER, 0.1))
            with pytest.raises(DeadlineError, match=r"0\.1 s"):
                await read(waiting)
            with pytest.raises(DeadlineError, match=r"0\.3 s"):
                await read(running)
            await idle(engine)

    run(main())


def test_a_failing_prompt_fails_alone(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model) as engine:
            neighbour = engine.submit(Job(model.encode(REQUESTS[0][0]), sampling(REQUESTS[0][1]), 60))
            poisoned = engine.submit(Job([POISON], FOREVER, 60))
            with pytest.raises(SequenceError) as failed:
                await read(poisoned)
            assert "poisoned" not in str(failed.value)  # an internal error's text is for the log
            assert await read(neighbour) == alone(model, *REQUESTS[0])
            await idle(engine)

    run(main())


def test_a_failing_step_fails_its_batch_and_spares_who_waits(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    def fail_once(_: Sequence[int]) -> None:
        runtime.before_step = lambda _: None
        raise RuntimeError("out of memory")

    async def main() -> None:
        async with engine_on(model, runtime=runtime, slots=2) as engine:
            batch = [engine.submit(Job([n], FOREVER, 60)) for n in (1, 2)]
            for stream in batch:
                await anext(stream)
            waiting = engine.submit(Job(model.encode(REQUESTS[2][0]), sampling(REQUESTS[2][1]), 60))
            runtime.before_step = fail_once
            for stream in batch:
                with pytest.raises(SequenceError):
                    await read(stream)
            assert await read(waiting) == alone(model, *REQUESTS[2])
            await idle(engine)

    run(main())


def test_logits_that_are_not_finite_fail_only_their_row(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    def spoil(token_ids: Sequence[int], logits: Tensor) -> None:
        if len(token_ids) == 2:
            with torch.inference_mode():
                logits[1, 4] = torch.nan
            runtime.after_step = lambda _, __: None

    async def main() -> None:
        async with engine_on(model, runtime=runtime) as engine:
            healthy = engine.submit(Job(model.encode(REQUESTS[6][0]), sampling(REQUESTS[6][1]), 60))
            spoiled = engine.submit(Job([2] * 30, FOREVER, 60))  # longer, so read last: the second row
            runtime.after_step = spoil
            with pytest.raises(SequenceError, match="not finite"):
                await read(spoiled)
            assert await read(healthy) == alone(model, *REQUESTS[6])

    run(main())


def test_stopping_ends_everyone_and_refuses_newcomers(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            running, waiting = (engine.submit(Job([1], FOREVER, 60)) for _ in range(2))
            await anext(running)
            await asyncio.to_thread(engine.stop)
            for stream in (running, waiting):
                with pytest.raises(EngineStoppedError):
                    await read(stream)
            with pytest.raises(EngineStoppedError):
                engine.submit(Job([1], FOREVER, 60))
            assert not engine.is_alive

    run(main())


def test_an_engine_whose_thread_dies_says_so(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with engine_on(model) as engine:
            stream = engine.submit(Job([1], FOREVER, 60))
            await anext(stream)

            def broken() -> None:
                raise RuntimeError("a bug")

            monkeypatch.setattr(engine._scheduler, "turn", broken)
            with pytest.raises(EngineStoppedError, match="failed"):
                await read(stream)
            assert not engine.is_alive

    run(main())


def test_whoever_is_here_when_the_states_cannot_be_moved_any_more_is_told(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    def broken(*_: object) -> None:
        raise RuntimeError("illegal memory access")

    async def main() -> None:
        async with engine_on(model, runtime=runtime) as engine:
            leaving, *running = (engine.submit(Job([n], FOREVER, 60)) for n in (1, 2, 3))
            for stream in (leaving, *running):
                await anext(stream)
            waiting = engine.submit(Job([4], FOREVER, 60))
            runtime.gather = broken  # type: ignore[method-assign, assignment]
            leaving.cancel()
            for stream in (*running, waiting):
                with pytest.raises(EngineStoppedError, match="failed"):
                    await read(stream)
            assert not engine.is_alive

    run(main())


def test_who_waits_for_a_sequence_that_is_cancelled_waits_no_longer(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            running, waiting = (engine.submit(Job([1], FOREVER, 60)) for _ in range(2))
            await anext(running)
            reader = asyncio.create_task(anext(waiting, None))
            await asyncio.sleep(0.01)
            waiting.cancel()
            assert await reader is None

    run(main())


def test_decode_steps_go_on_while_a_long_prompt_is_read(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    async def main() -> None:
        async with engine_on(model, runtime=runtime, chunk=4) as engine:
            endless = engine.submit(Job([1], FOREVER, 60))
            await anext(endless)
            runtime.calls.clear()
            await anext(engine.submit(Job([2] * 40, FOREVER, 60)))
        turns = [call for call in runtime.calls if call != "gather"]
        prefills = [n for n, call in enumerate(turns) if call == "prefill"]
        assert len(prefills) == 10
        assert all("step" in turns[a:b] for a, b in itertools.pairwise(prefills))

    run(main())


def test_states_move_only_when_membership_changes(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    async def main() -> None:
        async with engine_on(model, runtime=runtime) as engine:
            await read(engine.submit(Job([1], SamplingParams(max_tokens=30, temperature=0), 60)))
        assert runtime.calls.count("step") == 29
        assert runtime.calls.count("gather") == 1

    run(main())


def test_the_event_loop_is_never_held_up_by_the_model(model: LanguageModel) -> None:
    runtime, held = WatchedRuntime(model), threading.Event()

    def hold(_: Sequence[int]) -> None:
        held.wait(60)

    runtime.before_step = hold

    async def main() -> None:
        async with engine_on(model, runtime=runtime) as engine:
            stream = engine.submit(Job([1], SamplingParams(max_tokens=3, temperature=0), 60))
            await anext(stream)
            await asyncio.sleep(0.05)  # would never return if the step ran on the loop
            held.set()
            assert len((await read(stream))[1]) == 2

    run(main())
