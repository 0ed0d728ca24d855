"""The parts of `yunmin bench serve`, each of which starts the servers that it needs."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks import serve_parts
from benchmarks.adapters.remote import Failed, Remote
from benchmarks.contestant_files import Absent
from benchmarks.serve_client import Client, Request
from benchmarks.serve_models import Served
from benchmarks.serve_parts import Part, Plan, Prompts, completion, streams
from benchmarks.serve_servers import Server, llama_cpp_python, llama_server, our_server
from benchmarks.serve_soak import Soak
from yunmin.errors import YunminError

_SLOTS = 16
_PROMPT_TOKENS = 16
_MOST_PROMPT_TOKENS = 16_384
_LOAD_LIMIT_S = 300.0
_ANSWER_LIMIT_S = 600.0
_SOAK_CLIENTS = 12
_RESTARTS = 3
_PEER_STREAMS = 16
_PEER_TOKENS = 128


class Bench:
    """Measures one model.

    Args:
        served: the model.
        plan: how much to measure.
        work: folder for logs and session stores.
    """

    def __init__(self, served: Served, plan: Plan, work: Path) -> None:
        self._served = served
        self._plan = plan
        self._work = work
        self._prompts = Prompts(served.tokenizer, served.n_tokens)
        self._settings: dict[str, str | int] = {
            "slots": _SLOTS,
            "threads": plan.threads,
            "max_prompt_tokens": _MOST_PROMPT_TOKENS,
        }

    def throughput(self) -> Part:
        """Tokens per second of the engine alone and over HTTP, in turns."""
        plan = self._plan
        found: Part = {}
        with self._client() as (client, _), _engine(self._served.folder, self._settings, plan.threads) as engine:
            for count in plan.streams:
                alone: list[float] = []
                http: list[Part] = []
                for _ in range(1 + plan.repeats):
                    alone.append(_alone(engine, self._ids(count), plan.new_tokens))
                    http.append(streams(client, self._completions(count), plan.new_tokens))
                found[str(count)] = _against_engine(alone[1:], http[1:])
        return found

    def stall(self) -> Part:
        """Gaps between tokens of running streams while a long prompt is read."""
        with self._client() as (client, _):
            serve_parts.stall(client, self._prompts, self._plan)  # warms up
            taken = [serve_parts.stall(client, self._prompts, self._plan) for _ in range(self._plan.repeats)]
        middle = sorted(taken, key=lambda part: float(part["ratio"] or 0.0))[len(taken) // 2]
        return {
            "streams": self._plan.stall_streams,
            "prompt_tokens": self._plan.stall_prompt,
            **middle,
            "ratios": [part["ratio"] for part in taken],
        }

    def prefix(self) -> Part:
        """Time to the first token of prompts that share their beginning."""
        with self._client() as (client, _):
            client.gather(self._completions(1))
            return serve_parts.prefix(client, self._prompts, self._plan)

    def sessions(self) -> Part:
        """Many sessions created and used; one restored after a restart, against reading its text again."""
        plan = self._plan
        store = self._work / "sessions"
        shutil.rmtree(store, ignore_errors=True)
        with self._client(store) as (client, _):
            client.gather(self._completions(1))
            found, session = serve_parts.sessions(client, self._prompts, plan)
            stored = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        restored: list[float] = []
        recomputed: list[float] = []
        for _ in range(min(_RESTARTS, plan.repeats)):
            with self._client(store) as (client, _):
                client.gather(self._completions(1))
                restored.append(serve_parts.restored(client, session))
                recomputed.append(serve_parts.recomputed(client, self._prompts, plan))
        shutil.rmtree(store)
        restored_s, recomputed_s = statistics.median(restored), statistics.median(recomputed)
        return found | {
            "stored_bytes": stored,
            "session_tokens": plan.session_tokens,
            "restored_s": restored_s,
            "recomputed_s": recomputed_s,
            "ratio": recomputed_s / restored_s,
            "samples": {"restored_s": restored, "recomputed_s": recomputed},
        }

    def peers(self) -> Part:
        """Ours and llama.cpp's servers under the same client, in turns; also who is missing, and why."""
        found: dict[str, Part] = {}
        absent: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            clients: dict[str, Client] = {}
            for name, start in self._contestants().items():
                try:
                    server = stack.enter_context(start())
                except (Absent, YunminError) as reason:
                    absent[name] = str(reason)
                else:
                    clients[name] = stack.enter_context(contextlib.closing(Client(server.url)))
            for count in (1, _PEER_STREAMS):
                for name, taken in self._turns(clients, count, absent).items():
                    if taken:
                        found.setdefault(name, {})[str(count)] = _summary(taken)
        return {"new_tokens": _PEER_TOKENS, "servers": found, "absent": absent}

    def _turns(self, clients: Mapping[str, Client], count: int, absent: dict[str, str]) -> dict[str, list[Part]]:
        """Samples of each server, the one that warms up first; who fails joins the absent."""
        samples: dict[str, list[Part]] = {name: [] for name in clients if name not in absent}
        for _ in range(1 + self._plan.repeats):
            for name, taken in samples.items():
                if name in absent or sum(sample["seconds"] for sample in taken) > self._plan.limit_s:
                    continue
                requests = [completion(self._prompts.text(), _PEER_TOKENS) for _ in range(count)]
                try:
                    taken.append(streams(clients[name], requests, _PEER_TOKENS))
                except YunminError as error:
                    absent[name] = str(error)
        return samples

    def soak(self, minutes: float) -> Part:
        """Mixed load."""
        store = self._work / "soak-sessions"
        shutil.rmtree(store, ignore_errors=True)
        with self._client(store) as (client, server):
            long_tokens = self._plan.stall_prompt
            soak = Soak(server, client, self._prompts, long_tokens=long_tokens, most_tokens=_MOST_PROMPT_TOKENS)
            return soak.run(minutes, _SOAK_CLIENTS)

    def _contestants(self) -> dict[str, Callable[[], AbstractContextManager[Server]]]:
        """Name -> what starts it; a file that cannot be made is noticed then."""
        served, work, threads = self._served, self._work, self._plan.threads
        return {
            "ours": lambda: our_server(served.folder, work, self._settings),
            "llama-server": lambda: llama_server(served.gguf(), work, threads=threads, slots=_PEER_STREAMS),
            "llama-cpp-python": lambda: llama_cpp_python(served.gguf(), work, threads=threads),
        }

    @contextlib.contextmanager
    def _client(self, store: Path | None = None) -> Iterator[tuple[Client, Server]]:
        """A server of ours and a client of it."""
        settings = self._settings if store is None else self._settings | {"session_dir": str(store)}
        with (
            our_server(self._served.folder, self._work, settings) as server,
            contextlib.closing(Client(server.url)) as client,
        ):
            yield client, server

    def _ids(self, count: int) -> list[list[int]]:
        return [self._prompts.ids(_PROMPT_TOKENS) for _ in range(count)]

    def _completions(self, count: int) -> list[Request]:
        return [completion(ids, self._plan.new_tokens) for ids in self._ids(count)]


@contextlib.contextmanager
def _engine(folder: Path, settings: Mapping[str, Any], threads: int) -> Iterator[Remote]:
    """The engine alone, in a process of its own."""
    spec = {"artifact": str(folder), "settings": settings}
    try:
        with contextlib.closing(Remote("serve_engine", spec, python=sys.executable, threads=threads)) as engine:
            engine.read(_LOAD_LIMIT_S)
            yield engine
    except Failed as reason:
        raise YunminError(f"the engine alone: {reason}") from None


def _alone(engine: Remote, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per second of one run."""
    answer = engine.ask({"prompts": prompts, "max_tokens": new_tokens}, _ANSWER_LIMIT_S)
    assert answer["tokens"] == len(prompts) * new_tokens, "the engine ended a sequence before its length"
    return float(answer["tokens"] / answer["seconds"])


def _against_engine(alone: list[float], http: list[Part]) -> Part:
    rates = [sample["tokens_per_s"] for sample in http]
    return {
        "engine_tokens_per_s": statistics.median(alone),
        "http_tokens_per_s": statistics.median(rates),
        "ratio": statistics.median(rates) / statistics.median(alone),
        "first_token_s": statistics.median(sample["first_token_s"] for sample in http),
        "client_cpu_share": statistics.median(sample["client_cpu_share"] for sample in http),
        "events_per_token": statistics.median(sample["events_per_token"] for sample in http),
        "samples": {"engine": alone, "http": http},
    }


def _summary(taken: list[Part]) -> Part:
    """Medians without the sample that warmed up, unless there is no other."""
    counted = taken[1:] or taken
    names = ("tokens_per_s", "first_token_s")
    medians = {name: statistics.median(sample[name] for sample in counted) for name in names}
    return {**medians, "samples": counted, "warm_up_only": len(taken) == 1}
