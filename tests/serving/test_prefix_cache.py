from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engine.prefix_cache import MIN_TOKENS, Checkpoint, PrefixCache
from yunmin.state import MambaState

PLENTY = 1 << 30
START = list(range(100, 100 + MIN_TOKENS))  # what makes every prompt long enough
Ids = list[int]


def checkpoint() -> tuple[MambaState, torch.Tensor]:
    return MambaState((torch.zeros(1, 2, 3),), (torch.zeros(1, 2, 4),)), torch.zeros(8)


SIZE = Checkpoint(0, *checkpoint()).nbytes


def put(cache: PrefixCache, ids: Ids) -> MambaState:
    state, logits = checkpoint()
    cache.put(ids, state, logits)
    return state


def found(cache: PrefixCache, ids: Ids) -> int:
    """Position of the checkpoint that is found."""
    best, _ = cache.find(ids, 0)
    return 0 if best is None else best.position


PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=9), min_size=1, max_size=25)


@given(PROMPTS, st.data())
def test_the_deepest_checkpoint_on_the_way_is_found(tails: list[Ids], data: st.DataObject) -> None:
    cache, kept = PrefixCache(PLENTY, 1024), dict[tuple[int, ...], MambaState]()
    for tail in tails:
        ids = START + tail
        expected = [prefix for n in range(len(ids) + 1) if (prefix := tuple(ids[:n])) in kept]
        best, outcome = cache.find(ids, cache.see(ids))
        if not expected:
            assert best is None
            assert outcome in ("unseen", "not_kept")
        else:
            assert best is not None
            assert best.state is kept[expected[-1]]
            assert best.position == len(expected[-1])
            assert outcome == ("whole" if len(expected[-1]) == len(ids) else "part")
        if data.draw(st.booleans()):
            end = data.draw(st.integers(MIN_TOKENS, len(ids)))
            kept[tuple(ids[:end])] = put(cache, ids[:end])
    assert cache.checkpoints == len(kept)
    assert cache.nbytes == len(kept) * SIZE


@settings(max_examples=50)
@given(PROMPTS, st.integers(1, 5))
def test_the_budget_holds_and_no_evicted_or_foreign_state_is_found(tails: list[Ids], room: int) -> None:
    cache, kept = PrefixCache(room * SIZE, 1024), dict[tuple[int, ...], MambaState]()
    for tail in tails:
        ids = START + tail
        cache.see(ids)
        best, _ = cache.find(ids, 0)
        if best is not None:
            assert best.state is kept[tuple(ids[: best.position])]
        kept[tuple(ids)] = put(cache, ids)
        assert cache.nbytes <= room * SIZE
        assert cache.checkpoints <= room


def test_a_checkpoint_is_planned_exactly_where_two_prompts_part() -> None:
    cache = PrefixCache(PLENTY, 1024)
    first, second = START + [1] * 20 + [2] * 9, START + [1] * 20 + [3] * 30
    assert cache.see(first) == 0
    assert cache.plan(first, [], 0) == [len(first)]
    assert cache.see(second) == len(START) + 20
    assert cache.plan(second, [], 0) == [len(second), len(START) + 20]
    assert cache.plan(second, [], len(START) + 18) == [len(second)]  # two tokens are not worth a state


def test_checkpoints_are_planned_at_turn_ends_and_at_intervals() -> None:
    cache = PrefixCache(PLENTY, 50)
    ids = [7] * 120
    cache.see(ids)
    assert cache.plan(ids, [80, 200, 3], 0) == [120, 100, 80, 50]
    assert cache.plan(ids, [80], 60) == [120, 100, 80]


@pytest.mark.parametrize("tail", [1, 4, MIN_TOKENS, 60])
@pytest.mark.parametrize("shared", [500, 1020, 1024, 1027])
def test_whatever_is_near_a_parting_the_third_prompt_resumes_there(shared: int, tail: int) -> None:
    cache = PrefixCache(PLENTY, 1024)  # an interval ends close to some of the partings
    for number in range(4):
        ids = [1] * shared + [10 + number] * tail
        cache.see(ids)
        begin = found(cache, ids)
        assert number < 2 or shared - MIN_TOKENS < begin <= shared
        for position in reversed(cache.plan(ids, [shared + 3], begin)):
            put(cache, ids[:position])


def test_partings_close_together_cost_one_checkpoint_before_them() -> None:
    cache = PrefixCache(PLENTY, 1024)
    for cut in range(100, 116):
        cache.see([1] * cut + [2] * 50)
    ids = [1] * 116 + [3] * 50
    cache.see(ids)
    assert cache.plan(ids, [], 0) == [len(ids), 108, 100]


@given(PROMPTS, st.lists(st.integers(-3, 40)), st.integers(0, 20))
def test_planned_positions_lie_apart_in_order_and_before_the_end(tails: list[Ids], turn_ends: Ids, begin: int) -> None:
    cache = PrefixCache(PLENTY, 16)
    for tail in tails:
        cache.see(START + tail)
    ids = START + tails[-1]
    end, *stops = cache.plan(ids, turn_ends, min(begin, len(ids)))
    assert end == len(ids)
    assert stops == sorted(set(stops), reverse=True)
    assert all(a - b >= MIN_TOKENS for a, b in itertools.pairwise([*stops, begin]))
    assert all(stop < end for stop in stops)


def test_nothing_is_kept_without_a_budget() -> None:
    cache = PrefixCache(0, 1024)
    assert cache.see(START) == 0
    assert cache.plan(START, [], 0) == []
    put(cache, START)
    assert found(cache, START) == 0


def test_what_saves_most_work_outlives_what_saves_little() -> None:
    cache = PrefixCache(2 * SIZE, 1024)
    long, short = [1] * 500, [2] * 20
    put(cache, long)
    put(cache, short)
    put(cache, [3] * 30)
    assert found(cache, long) == 500
    assert found(cache, short) == 0
    assert cache.evictions == 1


def test_what_saves_much_but_is_never_asked_for_gives_way_at_last() -> None:
    cache = PrefixCache(3 * SIZE, 1024)
    put(cache, [1] * 500)
    for n in range(60):
        put(cache, [2, n, *[n] * 40])
    assert found(cache, [1] * 500) == 0


def test_a_checkpoint_within_another_counts_what_it_saves_beyond_it() -> None:
    cache = PrefixCache(2 * SIZE, 1024)
    put(cache, [1] * 300)
    put(cache, [1] * 310)  # saves 10 tokens
    put(cache, [2] * 40)  # saves 40
    assert found(cache, [1] * 310) == 300
    assert found(cache, [2] * 40) == 40


def test_a_checkpoint_takes_over_what_one_before_it_saved() -> None:
    cache = PrefixCache(3 * SIZE, 1024)
    put(cache, [1] * 200)
    for n in (2, 3, 4):
        put(cache, [n] * 150)
    put(cache, [1] * 300)  # saves 100
    for n in (5, 6):
        put(cache, [n] * 150)
    assert found(cache, [1] * 200) == 0
    put(cache, [7] * 150)  # by now the other saves 300
    assert found(cache, [1] * 300) == 300


def test_outcomes_say_why_nothing_was_found() -> None:
    cache = PrefixCache(SIZE, 1024)

    def outcome(ids: Ids) -> str:
        return cache.find(ids, cache.see(ids))[1]

    assert outcome([5]) == "short"
    assert outcome([1] * 30) == "unseen"
    assert outcome([1] * 30) == "not_kept"
    put(cache, [1] * 30)
    assert outcome([1] * 30) == "whole"
    assert outcome([1] * 31) == "part"
    put(cache, [2] * 90)
    assert outcome([1] * 30) == "evicted"


def test_many_prompts_that_differ_in_one_token_are_forgotten_too() -> None:
    cache = PrefixCache(PLENTY, 1024)
    for n in range(20_000):
        cache.see([*START, n])
    assert cache.see([*START, 0, 5]) == len(START)
    assert cache.see([*START, 19_999, 5]) == len(START) + 1


def test_prompts_seen_long_ago_are_forgotten() -> None:
    cache = PrefixCache(PLENTY, 1024)
    first = [1] * (1 << 19)
    cache.see(first)
    put(cache, [9] * 20)
    for n in (2, 3, 4):
        cache.see([n] * (1 << 19))
    assert cache.see(first) == 0
    assert found(cache, [9] * 20) == 20
