"""Contestants that cost nothing: an engine that counts, and processes that answer from a script."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters.remote import Failed
from benchmarks.contestants import Contestant

Answer = dict[str, Any]


class CountingEngine:
    """An `Engine` that notes what it is asked."""

    versions: Mapping[str, str] = {"counting": "1"}

    def __init__(self, *, can_continue: bool = True) -> None:
        self.can_continue = can_continue
        self.calls: list[tuple[str, int]] = []
        self.texts: list[list[int]] = []

    def load(self) -> None:
        self.calls.append(("load", 0))

    def start(self, batch_size: int) -> None:
        self.calls.append(("start", batch_size))

    def read(self, token_ids: Sequence[int]) -> None:
        self.calls.append(("read", len(token_ids)))
        self.texts.append(list(token_ids))

    def step(self, token_ids: Sequence[int]) -> None:
        self.calls.append(("step", len(token_ids)))

    def logits(self) -> list[float]:
        return [1.0, -2.0]


def contestant(name: str, *, precision: str = "fp32", is_ours: bool = False) -> Contestant:
    engine = "yunmin" if is_ours else "llama.cpp"
    size = 1000 if is_ours else 0
    return Contestant(name, engine, precision, Path(name), sys.executable, is_ours=is_ours, weight_bytes=size)


class ScriptedRemotes:
    """Stands in for the class `Remote`: processes of contestants that answer as fast as they are told to.

    Args:
        rates: by contestant, tokens per second of everything it is asked.
        failing: (contestant, task) -> the message with which its process dies.

    Attributes:
        log: (contestant, task) of every request, and (contestant, "start") of every process.
    """

    def __init__(self, rates: Mapping[str, float], failing: Mapping[tuple[str, str], str] | None = None) -> None:
        self.rates = rates
        self.failing = failing or {}
        self.log: list[tuple[str, str]] = []

    def __call__(self, module: str, spec: Mapping[str, Any], **options: Any) -> _Scripted:
        return _Scripted(self, str(spec["model"]))

    def install(self, monkeypatch: pytest.MonkeyPatch, where: str = "benchmarks.contest.Remote") -> None:
        monkeypatch.setattr(where, self)


class _Scripted:
    def __init__(self, family: ScriptedRemotes, name: str) -> None:
        self.family = family
        self.name = name
        self.is_alive = True
        self._rate = family.rates[name]
        self._tasks: dict[str, Callable[..., Answer]] = {
            "prefill": lambda length: {"seconds": length / self._rate},
            "decode": lambda batch_size, steps: {"step_s": [batch_size / self._rate] * steps},
            "deepen": lambda depth: {"seconds": depth / self._rate},
            "deep": lambda steps: {"step_s": [1 / self._rate] * steps},
            "logits": lambda length: {"logits": [4.0, self._rate / 1000]},
            "memory": lambda: {"memory_bytes": 30_000_000, "memory_peak_bytes": 40_000_000},
        }

    def read(self, limit_s: float) -> Answer:
        self._note("start")
        return {
            "load_s": 0.1,
            "first_token_s": 0.2,
            "memory_before_bytes": 10_000_000,
            "memory_loaded_bytes": 25_000_000,
            "versions": {"scripted": "1"},
            "can_continue": not self.name.startswith("forgetful"),
        }

    def ask(self, request: Mapping[str, Any], limit_s: float) -> Answer:
        arguments = dict(request)
        task = arguments.pop("task")
        self._note(task)
        return self._tasks[task](**arguments)

    def close(self) -> None:
        self.is_alive = False

    def _note(self, task: str) -> None:
        self.family.log.append((self.name, task))
        if (self.name, task) in self.family.failing:
            self.is_alive = False
            raise Failed(self.family.failing[self.name, task])
