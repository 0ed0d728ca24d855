"""What the engine does with states: prefixes, snapshots, siblings."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import yunmin
from serving.engine.engine import Engine
from serving.engine.job import DeadlineError, EngineStoppedError, Job, QueueFullError, SequenceError
from serving.engine.streams import TokenStream
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
from yunmin.state import Snapshot

PLENTY = 1 << 28
LONG = "def main(argument):\n    return argument + 1\n" * 2


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0)


def job(model: LanguageModel, prompt: str | list[int], **params: Any) -> Job:
    return Job(model.encode(prompt), sampling(params), 60)


def same(a: Snapshot, b: Snapshot) -> bool:
    tensors = zip((*a.state.conv, *a.state.ssm, a.logits), (*b.state.conv, *b.state.ssm, b.logits), strict=True)
    return a.token_ids == b.token_ids and all(torch.equal(x, y) for x, y in tensors)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_cached_output_equals_uncached_output_and_says_what_was_reused(model: LanguageModel, chunk: int) -> None:
    async def main() -> None:
        async with engine_on(model, chunk=chunk, cache_bytes=PLENTY, cache_interval=16) as engine:
            for _ in range(2):
                for prompt, params in REQUESTS:
                    stream = engine.submit(Job(model.encode(prompt), sampling(params), 60))
                    assert await read(stream) == alone(model, prompt, params)
            for prompt, params in REQUESTS:
                ids = model.encode(prompt)
                stream = engine.submit(Job(ids, sampling(params), 60))
                await read(stream)
                assert stream.cached_tokens == (len(ids) if len(ids) >= 8 else 0)
                assert stream.prompt_tokens == len(ids)

    run(main())


def test_the_next_turn_reads_only_what_is_new(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, cache_bytes=PLENTY) as engine:
            ids = model.encode(LONG)
            first = engine.submit(Job(ids, greedy(12), 60))
            _, answer, _ = await read(first)
            turn = [*ids, *answer, *model.encode("\nx = ")]
            second = engine.submit(Job(turn, greedy(9), 60))
            text = (await read(second))[0]
            assert second.cached_tokens == len(ids) + len(answer) - 1  # the last token was not fed
            assert text == model.generate(turn, max_tokens=9, temperature=0).text

    run(main())


def test_a_third_prompt_resumes_exactly_where_two_were_seen_to_part(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    async def main() -> None:
        async with engine_on(model, runtime=runtime, chunk=256, cache_bytes=PLENTY) as engine:
            shared = model.encode(LONG)[:23]
            prompts = [[*shared, *tail] for tail in ([1] * 30, [2] * 30, [3] * 30)]
            cached = []
            for ids in prompts:
                stream = engine.submit(Job(ids, greedy(3), 60))
                assert (await read(stream))[1] == list(model.generate(ids, max_tokens=3, temperature=0).token_ids)
                cached.append(stream.cached_tokens)
            assert cached == [0, 0, 23]
            assert sum(runtime.read) == 53 + 53 + 30

    run(main())


def test_prompts_of_one_burst_read_what_they_share_once(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    async def main() -> None:
        async with engine_on(model, runtime=runtime, slots=4, chunk=256, cache_bytes=PLENTY) as engine:
            shared = model.encode(LONG)[:40]
            prompts = [[*shared, *[n] * 9] for n in range(1, 5)]
            streams = [engine.submit(Job(ids, greedy(5), 60)) for ids in prompts]
            for ids, result in zip(prompts, await asyncio.gather(*map(read, streams)), strict=True):
                assert result[1] == list(model.generate(ids, max_tokens=5, temperature=0).token_ids)
        # the first may have been read before the second came
        assert sum(runtime.read) <= 40 + 4 * 9 + 40

    run(main())


@pytest.mark.parametrize(("prompt", "params"), REQUESTS)
def test_a_kept_sequence_goes_on_as_if_it_had_never_stopped(
    model: LanguageModel, prompt: str | list[int], params: dict[str, Any]
) -> None:
    first = {**params, "max_tokens": 4, "stop": ()}
    whole = {**params, "max_tokens": 15, "stop": ()}
    expected = model.generate(prompt, **whole)
    rest = {key: value for key, value in whole.items() if key != "seed"} | {"max_tokens": 11}

    async def main() -> None:
        async with engine_on(model, cache_bytes=PLENTY) as engine:
            ids = model.encode(prompt)
            begun = engine.submit(Job(ids, sampling(first), 60, keep=True))
            ids_begun = (await read(begun))[1]
            snapshot = begun.snapshot
            assert snapshot is not None
            assert snapshot.token_ids == (*ids, *ids_begun)
            assert same(snapshot, model.snapshot([*ids, *ids_begun]))
            again = engine.submit(Job(snapshot.token_ids, sampling(rest), 60, start=snapshot, keep=True))
            ids_rest = (await read(again))[1]
            assert tuple(ids_begun + ids_rest) == expected.token_ids
            assert again.cached_tokens == len(snapshot.token_ids)

    run(main())


def test_a_session_goes_on_with_a_tail(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model) as engine:
            ids, tail = model.encode(LONG), model.encode(" Grüße")
            begun = engine.submit(Job(ids, greedy(0), 60, keep=True))
            pieces = [piece async for piece in begun]
            assert [(p.token_id, p.finish_reason) for p in pieces] == [(None, "length")]
            assert begun.snapshot is not None
            stream = engine.submit(Job([*ids, *tail], greedy(9), 60, start=begun.snapshot, keep=True))
            text, _, _ = await read(stream)
            assert text == model.generate([*ids, *tail], max_tokens=9, temperature=0).text
            assert stream.cached_tokens == len(ids)

    run(main())


def test_an_end_of_text_leaves_a_snapshot_before_it(model: LanguageModel) -> None:
    (first,) = model.generate("x", max_tokens=1, temperature=0).token_ids

    async def main() -> None:
        async with engine_on(model) as engine:
            params = SamplingParams(max_tokens=5, temperature=0, stop_token_ids=(first,))
            stream = engine.submit(Job(model.encode("x"), params, 60, keep=True))
            assert (await read(stream))[1] == []
            assert stream.snapshot is not None
            assert same(stream.snapshot, model.snapshot("x"))

    run(main())


def test_siblings_share_one_reading_and_equal_their_own_runs(model: LanguageModel) -> None:
    runtime = WatchedRuntime(model)

    async def main() -> None:
        async with engine_on(model, runtime=runtime, slots=2) as engine:
            ids = model.encode(LONG)
            params = [SamplingParams(max_tokens=9 + seed, seed=seed) for seed in range(5)]
            streams = engine.submit_all(Job(ids, params[0], 60), params)
            results = await asyncio.gather(*map(read, streams))
            for own, result in zip(params, results, strict=True):
                assert result == alone(model, LONG, {"max_tokens": own.max_tokens, "seed": own.seed})
            assert sum(runtime.read) == len(ids)
            assert [stream.cached_tokens for stream in streams] == [0, *[len(ids)] * 4]
            await idle(engine)

    run(main())


def test_a_sibling_takes_over_where_the_reading_one_leaves(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1, chunk=1) as engine:
            params = [SamplingParams(max_tokens=4, seed=seed) for seed in (1, 2, 3)]
            first, *others = engine.submit_all(Job([1] * 2000, params[0], 60), params)
            first.cancel()
            for own, stream in zip(params[1:], others, strict=True):
                assert await read(stream) == alone(model, [1] * 2000, {"max_tokens": 4, "seed": own.seed})
            await idle(engine)

    run(main())


def test_siblings_beyond_the_queue_are_refused_together(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=2, queue=1) as engine:
            with pytest.raises(QueueFullError):
                engine.submit_all(Job([1], FOREVER, 60), [FOREVER] * 4)
            streams = engine.submit_all(Job([1], FOREVER, 60), [FOREVER] * 3)
            for stream in streams[:2]:
                await anext(stream)
            assert (engine.load.running, engine.load.waiting) == (2, 1)
            for stream in streams:
                stream.cancel()
            await idle(engine)

    run(main())


def test_a_higher_priority_is_served_first(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            blocking = engine.submit(Job([1], FOREVER, 60))
            await anext(blocking)
            low, high = (engine.submit(Job([2], greedy(40), 60, priority=p)) for p in (0, 1))
            blocking.cancel()
            await read(high)
            assert low.timings.admitted == 0 or low.timings.admitted >= high.timings.finished
            await read(low)

    run(main())


def test_a_short_prompt_need_not_wait_for_a_long_one(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=2, chunk=4) as engine:
            long = engine.submit(Job([1] * 4000, greedy(1), 60))
            short = engine.submit(Job([2] * 9, greedy(1), 60))
            await read(short)
            assert long.timings.first_token == 0
            long.cancel()

    run(main())


def test_draining_refuses_newcomers_and_finishes_who_is_here(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            here = [engine.submit(Job(model.encode("x"), greedy(30), 60)) for _ in range(2)]
            engine.drain()
            assert not engine.accepting
            assert engine.is_alive
            with pytest.raises(EngineStoppedError, match="shutting down"):
                engine.submit(Job([1], FOREVER, 60))
            for stream in here:
                assert await read(stream) == alone(model, "x", {"max_tokens": 30, "temperature": 0})

    run(main())


def test_probabilities_of_a_prompt_are_those_of_the_whole_sequence(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, chunk=5, cache_bytes=PLENTY) as engine:
            ids = model.encode(LONG)
            stream = engine.submit(Job(ids, greedy(2), 60, prompt_logprobs=3))
            await read(stream)
            logits = model.runtime.forward(torch.tensor([ids]))[0, :, : model.config.n_tokens]
            logprobs = torch.log_softmax(logits, 1)
            first, *found = stream.prompt_logprobs
            assert first is None
            assert len(found) == len(ids) - 1
            for position, entry in enumerate(found):
                assert entry is not None
                assert entry.logprob == pytest.approx(float(logprobs[position, ids[position + 1]]), abs=1e-5)
                best = torch.topk(logprobs[position], 3)
                assert [token for token, _ in entry.top] == best.indices.tolist()

    run(main())


def test_the_torch_runtime_gives_the_same_tokens_and_nearly_the_same_logits(
    model: LanguageModel, model_folder: Path
) -> None:
    other = yunmin.load(model_folder, device="cpu", runtime="torch")

    async def main() -> None:
        async with engine_on(other, runtime=WatchedRuntime(other), chunk=16, cache_bytes=PLENTY) as engine:
            ids = model.encode(LONG)
            jobs = [Job(ids[:cut], greedy(12), 60, keep=True) for cut in (9, 23, 40, len(ids))]
            for _ in range(2):  # uncached and cached
                streams = [engine.submit(job) for job in jobs]
                results = await asyncio.gather(*map(read, streams))
                for job, stream, result in zip(jobs, streams, results, strict=True):
                    assert result == alone(model, list(job.prompt_ids), {"max_tokens": 12, "temperature": 0})
                    assert stream.snapshot is not None
                    expected = model.snapshot(stream.snapshot.token_ids).logits
                    tolerance = 1e-4 * float(expected.abs().max())
                    torch.testing.assert_close(stream.snapshot.logits, expected, rtol=0, atol=tolerance)

    run(main())


Arrival = tuple[int, float, int | None, int, bool, int]
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, len(REQUESTS)),  # the last one fails
        st.floats(0, 0.01),
        st.none() | st.integers(0, 6),  # leaves after so many pieces
        st.integers(1, 3),  # siblings
        st.booleans(),  # kept
        st.integers(-1, 1),  # priority
    ),
    max_size=10,
)


@settings(max_examples=25, deadline=None)
@given(ARRIVALS, st.integers(1, 4), st.sampled_from([0, 40_000, PLENTY]), st.sampled_from([1, 8, 64]))
def test_whatever_happens_no_slot_is_lost_and_no_output_changed(
    model: LanguageModel,
    arrivals: list[tuple[int, float, int | None, int, bool, int]],
    slots: int,
    budget: int,
    chunk: int,
) -> None:
    async def follow(stream: TokenStream, leave_after: int | None, expected: Any) -> None:
        with stream:
            if expected is None:
                with pytest.raises(SequenceError):
                    await read(stream)
            elif leave_after is None:
                assert await read(stream) == expected
            else:
                for _ in range(leave_after):
                    if (await anext(stream)).finish_reason is not None:
                        return

    async def visit(
        engine: Engine, which: int, delay_s: float, leave_after: int | None, siblings: int, keep: bool, priority: int
    ) -> None:
        await asyncio.sleep(delay_s)
        fails = which == len(REQUESTS)
        prompt, params = ([POISON, 1], REQUESTS[0][1]) if fails else REQUESTS[which]
        asked = Job(model.encode(prompt), sampling(params), 60, keep=keep, priority=priority)
        streams = engine.submit_all(asked, [asked.params] * siblings)
        expected = None if fails else alone(model, prompt, params)
        await asyncio.gather(*(follow(s, leave_after if n == 0 else None, expected) for n, s in enumerate(streams)))

    async def main() -> None:
        async with engine_on(model, slots=slots, chunk=chunk, cache_bytes=budget, cache_interval=16) as engine:
            await asyncio.gather(*(visit(engine, *arrival) for arrival in arrivals))
            await idle(engine)

    run(main())


def test_a_deadline_ends_a_sibling_that_waits(model: LanguageModel) -> None:
    async def main() -> None:
        async with engine_on(model, slots=1) as engine:
            _, second = engine.submit_all(Job([1], FOREVER, 0.2), [FOREVER] * 2)
            with pytest.raises(DeadlineError):
                await read(second)
            await idle(engine)

    run(main())
