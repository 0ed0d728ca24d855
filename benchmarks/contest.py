"""Measures contestants side by side: one process each, repeats in turns (A B C A B C ...), medians."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.adapters.remote import Failed, Remote
from benchmarks.contestant_files import Say
from benchmarks.contestants import Contestant

_LOAD_LIMIT_S = 600.0
_CHECKED_TOKENS = 16
_STEPS_S = 1.0  # time that one sample of decode steps should take
_STEPS = (4, 64)  # at least and at most so many
_WARM_UP_STEPS = 2

READY = "first token s"

Answer = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        threads: of every contestant.
        prefill: lengths of texts.
        decode: sizes of batches.
        depths: tokens that a sequence has read before its steps are timed.
        repeats: samples of each quantity, beside one that warms up.
        budget_s: a contestant takes no further sample of a quantity for which it has already taken this long.
        answer_limit_s: a contestant that takes longer for one sample is ended.
        deep_limit_s: a depth is left out if reading so far takes longer.
    """

    threads: int
    prefill: tuple[int, ...] = (128, 512, 2048)
    decode: tuple[int, ...] = (1, 4, 16, 64)
    depths: tuple[int, ...] = (0, 4096, 16384, 32768)
    repeats: int = 5
    budget_s: float = 20.0
    answer_limit_s: float = 600.0
    deep_limit_s: float = 300.0


@dataclass
class Record:
    """What is known about one contestant.

    Attributes:
        facts: of its last start: versions, memory, whether it can continue a text.
        samples: quantity -> figures, in the order they were taken, without the one that warms up.
        notes: quantity -> why there is no figure.
        warmed: quantities whose only sample so far is the one that warmed up.
    """

    facts: Answer = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    warmed: set[str] = field(default_factory=set)

    def median(self, quantity: str) -> float | None:
        taken = self.samples.get(quantity)
        return statistics.median(taken) if taken else None


class Contest:
    """Runs the contestants and collects their figures.

    Args:
        contestants: who take part.
        plan: what to measure.
        n_tokens: ids below it are drawn as text.
        say: gets lines of progress.

    Attributes:
        records: by name.
        logits: of the tokens that exist, by name, after the same text.
    """

    def __init__(self, contestants: Sequence[Contestant], plan: Plan, n_tokens: int, say: Say) -> None:
        self.contestants = contestants
        self.plan = plan
        self.records = {contestant.name: Record() for contestant in contestants}
        self.logits: dict[str, list[float]] = {}
        self._n_tokens = n_tokens
        self._say = say
        self._running: dict[str, Remote] = {}

    def run(self) -> None:
        """Measures everything in the plan, in this order: loading, agreement, prefill, decode, depths, memory."""
        try:
            self._loads()
            self._agreement()
            for length in self.plan.prefill:
                self._prefill(length)
            for batch_size in self.plan.decode:
                self._decode(batch_size)
            self._deep()
            self._memory()
        finally:
            for remote in self._running.values():
                remote.close()

    def _loads(self) -> None:
        quantities = {READY: "first_token_s", "load s": "load_s"}
        for repeat in range(self.plan.repeats + 1):
            self._say(f"load: {self._turn(repeat)}")
            for contestant in self.contestants:
                record = self.records[contestant.name]
                taken_s = 0.0 if repeat < 2 else sum(record.samples.get(READY, ()))  # what warms up may compile
                if READY in record.notes or taken_s > self.plan.budget_s:
                    continue
                try:
                    facts = self._start(contestant)
                except Failed as reason:
                    record.notes[READY] = str(reason)
                    self._say(f"{contestant.name}: {reason}")
                    continue
                for quantity, key in quantities.items():
                    add(record, quantity, facts[key], is_warm_up=repeat == 0)
                self._running.pop(contestant.name).close()

    def _agreement(self) -> None:
        self._say("logits after the same text")
        for contestant, answer in self._each("logits", lambda _: {"task": "logits", "length": _CHECKED_TOKENS}):
            if all(map(math.isfinite, answer["logits"])):
                self.logits[contestant.name] = answer["logits"][: self._n_tokens]  # a GGUF file has no padding
            else:
                self.records[contestant.name].notes["logits"] = "not all are finite"

    def _prefill(self, length: int) -> None:
        self._rounds(
            f"prefill {length}",
            lambda _: {"task": "prefill", "length": length},
            lambda answer: length / answer["seconds"],
        )

    def _decode(self, batch_size: int) -> None:
        quantity = f"decode {batch_size}"

        def request(contestant: Contestant) -> Answer:
            steps = self._step_count(contestant, quantity, batch_size)
            return {"task": "decode", "batch_size": batch_size, "steps": steps}

        self._rounds(quantity, request, lambda answer: batch_size / statistics.median(answer["step_s"]))

    def _deep(self) -> None:
        reached = dict.fromkeys(self.records, 0)
        for depth in self.plan.depths:
            quantity = f"depth {depth}"
            able = []
            for contestant in self.contestants:
                why_not = self._why_not_so_deep(contestant, depth)
                if why_not:
                    self.records[contestant.name].notes[quantity] = why_not
                else:
                    able.append(contestant)
            self._say(f"reading up to {depth} tokens")
            deepen = {"task": "deepen", "depth": depth}
            for contestant, _ in self._each(quantity, lambda _, asked=deepen: dict(asked), able):  # type: ignore[misc]
                reached[contestant.name] = depth
            able = [contestant for contestant in able if reached[contestant.name] == depth]

            def request(contestant: Contestant, quantity: str = quantity) -> Answer:
                return {"task": "deep", "steps": self._step_count(contestant, quantity, 1)}

            self._rounds(quantity, request, lambda answer: 1 / statistics.median(answer["step_s"]), able)

    def _memory(self) -> None:
        for contestant, answer in self._each("memory", lambda _: {"task": "memory"}):
            record = self.records[contestant.name]
            before = record.facts["memory_before_bytes"]
            add(record, "imports MB", before / 1e6)
            add(record, "model MB", (record.facts["memory_loaded_bytes"] - before) / 1e6)
            add(record, "peak MB", answer["memory_peak_bytes"] / 1e6)

    def _rounds(
        self,
        quantity: str,
        request: Callable[[Contestant], Answer],
        figure: Callable[[Answer], float],
        able: Sequence[Contestant] | None = None,
    ) -> None:
        """Takes the samples of one quantity, in turns."""
        spent_s: dict[str, float] = {}
        for repeat in range(self.plan.repeats + 1):
            self._say(f"{quantity}: {self._turn(repeat)}")
            waiting = [
                contestant
                for contestant in (self.contestants if able is None else able)
                if repeat == 0 or spent_s.get(contestant.name, 0.0) < self.plan.budget_s
            ]
            for contestant, answer in self._each(quantity, request, waiting):
                add(self.records[contestant.name], quantity, figure(answer), is_warm_up=repeat == 0)
                # what warms up may compile, so it counts little
                share = 0.5 if repeat == 0 else 1.0
                taken_s = share * (answer.get("seconds") or sum(answer["step_s"]))
                spent_s[contestant.name] = spent_s.get(contestant.name, 0.0) + taken_s

    def _each(
        self, quantity: str, request: Callable[[Contestant], Answer], able: Sequence[Contestant] | None = None
    ) -> Iterable[tuple[Contestant, Answer]]:
        """Asks one after the other; who fails gets a note and is not asked for this quantity again."""
        for contestant in self.contestants if able is None else able:
            record = self.records[contestant.name]
            if quantity in record.notes or READY in record.notes:
                continue
            try:
                if contestant.name not in self._running:
                    self._start(contestant)
                yield contestant, self._running[contestant.name].ask(request(contestant), self.plan.answer_limit_s)
            except Failed as reason:
                record.notes[quantity] = str(reason)
                self._say(f"{contestant.name}, {quantity}: {reason}")
                remote = self._running.get(contestant.name)
                if remote is not None and not remote.is_alive:
                    del self._running[contestant.name]  # the next quantity finds a fresh process

    def _start(self, contestant: Contestant) -> Answer:
        spec = {
            "kind": contestant.engine,
            "model": str(contestant.model),
            "threads": self.plan.threads,
            "options": {},
            "n_tokens": self._n_tokens,
        }
        remote = Remote("adapters.server", spec, python=contestant.python, threads=self.plan.threads)
        self._running[contestant.name] = remote
        try:
            facts = remote.read(_LOAD_LIMIT_S)
        except Failed:
            self._running.pop(contestant.name).close()
            raise
        self.records[contestant.name].facts = facts
        return facts

    def _step_count(self, contestant: Contestant, quantity: str, batch_size: int) -> int:
        """As many steps as fit the time of a sample; few where their duration is not known yet."""
        rate = self.records[contestant.name].median(quantity)
        if rate is None:
            return _WARM_UP_STEPS
        fewest, most = _STEPS
        return max(fewest, min(most, round(_STEPS_S * rate / batch_size)))

    def _why_not_so_deep(self, contestant: Contestant, depth: int) -> str:
        record = self.records[contestant.name]
        if depth == 0:
            return ""
        if not record.facts.get("can_continue"):
            return "cannot continue a text that it has read at once"
        rate = record.median(f"prefill {max(self.plan.prefill)}")
        if rate is None:
            return "its speed of reading is not known"
        wanted_s = depth / rate
        if wanted_s > self.plan.deep_limit_s:
            return f"reading so far would take {wanted_s:.0f} s"
        return ""

    def _turn(self, repeat: int) -> str:
        return f"repeat {repeat} of {self.plan.repeats}" if repeat else "warm-up"


def add(record: Record, quantity: str, figure: float, *, is_warm_up: bool = False) -> None:
    """Adds a sample; the first real one replaces the one that warmed up, which stays only where none follows."""
    taken = record.samples.setdefault(quantity, [])
    if is_warm_up:
        record.warmed.add(quantity)
    elif quantity in record.warmed:
        record.warmed.discard(quantity)
        taken.clear()
    taken.append(figure)
