"""Measures training steps of ours and of peers, each contestant and size in a process of its own, in turns."""

from __future__ import annotations

import datetime
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.adapters.remote import Failed, Remote
from benchmarks.contestants import OURS, default_python
from benchmarks.limits import Limits, Traffic, measure_limits
from benchmarks.models import describe, plain_checkpoint
from benchmarks.progress import say
from yunmin.checkpoint import Checkpoint
from yunmin.errors import RequestError
from yunmin.machine import machine_facts

_LOAD_LIMIT_S = 600.0
# name -> (kind of the server, products); transformers' backward takes time quadratic in the length
CONTESTANTS = {
    "ours fp32": ("yunmin", "fp32"),
    "ours bf16": ("yunmin", "bf16"),
    "transformers": ("transformers", "fp32"),
    "mambapy": ("mambapy", "fp32"),
}


@dataclass(frozen=True)
class Size:
    """Sequences and their tokens."""

    batch_size: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.batch_size}x{self.length}"

    @property
    def tokens(self) -> int:
        return self.batch_size * self.length


@dataclass(frozen=True)
class TrainPlan:
    """What to measure.

    Attributes:
        threads: of every contestant.
        sizes: for everybody.
        alone: for ours only.
        transformers_tokens: longest sequence that transformers is given.
        repeats: samples of each size, beside one that warms up.
        budget_s: a contestant takes no further sample of a size for which it has already taken this long.
        limit_s: a step that takes longer is ended.
        memory_limit_bytes: a process that holds more is ended.
    """

    threads: int
    sizes: tuple[Size, ...]
    alone: tuple[Size, ...]
    transformers_tokens: int
    repeats: int
    budget_s: float
    limit_s: float
    memory_limit_bytes: int


@dataclass
class Steps:
    """One contestant at one size.

    Attributes:
        answers: of the server, without the step that warms up unless it is the only one.
        note: why there is none.
        versions: of its packages.
    """

    answers: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def summary(self, size: Size) -> dict[str, float]:
        seconds = statistics.median(answer["seconds"] for answer in self.answers)
        return {
            "step_s": seconds,
            "tokens_per_s": size.tokens / seconds,
            "memory_mb": max(answer["memory_bytes"] for answer in self.answers) / 1e6,
            "loss": self.answers[-1]["loss"],
            "samples": len(self.answers),
        }


def measure_training(
    plan: TrainPlan,
    out: Path,
    names: Sequence[str],
    *,
    model: str | None,
    shape: str | None,
    pythons: Mapping[str, str],
) -> dict[str, Any]:
    """Prepares and measures.

    Args:
        plan: what to measure.
        out: the model that all read goes below it.
        names: of `CONTESTANTS`.
        model: folder or Hub id; None for random weights of `shape`.
        shape: name of a known size; None for `model`.
        pythons: interpreters by engine.
    """
    facts = machine_facts()
    out.mkdir(parents=True, exist_ok=True)
    plain = plain_checkpoint(model, shape, out)
    say("limits of this machine")
    limits = measure_limits(plan.threads)
    measured = {}
    for size in (*plan.sizes, *plan.alone):
        taking_part = [name for name in names if size in plan.sizes or CONTESTANTS[name][0] == "yunmin"]
        measured[size] = _measure_size(size, taking_part, plan, plain, pythons)
    limits = limits.best_of(measure_limits(plan.threads))
    sizes: list[dict[str, Any]] = []
    for size, steps in measured.items():
        sizes.append(
            {
                "size": size.name,
                "tokens": size.tokens,
                "limits_s": _limits_s(size, plain, limits),
                "steps": {name: s.summary(size) for name, s in steps.items() if s.answers},
                "notes": {name: s.note for name, s in steps.items() if s.note},
                "samples": {name: s.answers for name, s in steps.items()},
                "versions": {name: s.versions for name, s in steps.items() if s.versions},
            }
        )
    if not any(size["steps"] for size in sizes):
        missing = "; ".join(f"{name}, {size['size']}: {note}" for size in sizes for name, note in size["notes"].items())
        raise RequestError("contestants", f"none gave a figure: {missing or 'peers do not take part in --alone'}")
    return {
        "benchmark": "train",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": facts,
        "load_average_after": round(os.getloadavg()[0], 2),
        "settings": asdict(plan),
        "model": describe(plain, model, shape),
        "limits": asdict(limits),
        "sizes": sizes,
    }


def _measure_size(
    size: Size, names: Sequence[str], plan: TrainPlan, plain: Checkpoint, pythons: Mapping[str, str]
) -> dict[str, Steps]:
    """The contestants take turns; each has a process that lives for this size only."""
    found = {name: Steps() for name in names}
    running: dict[str, Remote] = {}
    spent_s = dict.fromkeys(names, 0.0)
    request = {"batch_size": size.batch_size, "length": size.length}
    try:
        for repeat in range(plan.repeats + 1):
            for name in names:
                steps = found[name]
                if steps.note or spent_s[name] > plan.budget_s:
                    continue
                kind, products = CONTESTANTS[name]
                if kind == "transformers" and size.length > plan.transformers_tokens:
                    steps.note = f"its backward is quadratic in the length: given at most {plan.transformers_tokens}"
                    continue
                say(f"{size.name}, {name}: {f'repeat {repeat}' if repeat else 'warm-up'}")
                try:
                    if name not in running:
                        engine = OURS if kind == "yunmin" else kind
                        spec = {
                            "kind": kind,
                            "model": str(plain.folder),
                            "threads": plan.threads,
                            "products": products,
                            "n_tokens": plain.config.n_tokens,
                        }
                        running[name] = Remote(
                            "adapters.train_server",
                            spec,
                            python=pythons.get(engine) or default_python(engine),
                            threads=plan.threads,
                            memory_limit_bytes=plan.memory_limit_bytes,
                        )
                        steps.versions = running[name].read(_LOAD_LIMIT_S)["versions"]
                    answer = running[name].ask(request, plan.limit_s)
                except Failed as reason:
                    steps.note = str(reason)
                    say(f"{size.name}, {name}: {reason}")
                    continue
                if repeat == 1:
                    steps.answers.clear()  # the step that warmed up
                steps.answers.append(answer)
                spent_s[name] += answer["seconds"] * (0.5 if repeat == 0 else 1.0)
    finally:
        for remote in running.values():
            remote.close()
    return found


def _limits_s(size: Size, plain: Checkpoint, limits: Limits) -> dict[str, float]:
    """Seconds that the products alone take: one forward, two backward, of projections and head at all positions."""
    traffic = Traffic.of(plain.config)
    flops = 3 * size.tokens * (traffic.layer_flops + traffic.head_flops)
    return {name: flops / limits.flops_per_s[name] for name in ("fp32", "bf16")}
