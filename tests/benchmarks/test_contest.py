"""How contestants are measured side by side; engines and processes are fakes, and no timing is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.adapters import remote
from benchmarks.adapters.contract import Setup, Unavailable, make_engine
from benchmarks.adapters.remote import Failed, Remote
from benchmarks.adapters.server import Server
from benchmarks.contest import Contest, Plan, Record, add
from benchmarks.contestants import default_python, expand, interpreters
from tests.benchmarks.fakes import CountingEngine, ScriptedRemotes, contestant
from yunmin.errors import RequestError

PLAN = Plan(1, prefill=(8,), decode=(1, 4), depths=(0, 100, 10_000), repeats=2, deep_limit_s=5)
RATES = {"ours int8": 1000.0, "peer": 250.0, "forgetful": 500.0}
SERVER = """
import json, sys, time
def main(argv):
    print("noise of a library", file=sys.stderr)
    print(json.dumps({"spec": json.loads(argv[0]), "path": sys.path}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["task"] == "sleep":
            time.sleep(60)
        if request["task"] == "die":
            sys.exit("out of luck")
        if request["task"] == "fill":
            held = bytearray(300_000_000)
            held[::4096] = bytes(len(held[::4096]))
            time.sleep(60)
        print(json.dumps({"failed": "cannot"} if request["task"] == "fail" else request), flush=True)
"""


@pytest.fixture
def run_contest(monkeypatch: pytest.MonkeyPatch) -> Any:
    def run(failing: dict[tuple[str, str], str] | None = None, plan: Plan = PLAN) -> tuple[Contest, ScriptedRemotes]:
        remotes = ScriptedRemotes(RATES, failing)
        remotes.install(monkeypatch)
        contest = Contest(
            [contestant(name, is_ours=name.startswith("ours")) for name in RATES], plan, 10, lambda _: None
        )
        contest.run()
        return contest, remotes

    return run


@pytest.fixture
def scripted_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that runs `SERVER`, from a package outside everybody's path."""
    package = tmp_path / "benchmarks"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "fake.py").write_text(SERVER)
    monkeypatch.setattr(remote, "_PACKAGE", package)
    started: list[Remote] = []

    def start(**options: Any) -> Remote:
        started.append(Remote("fake", {"kind": "x"}, python=sys.executable, threads=1, **options))
        started[-1].read(20)
        return started[-1]

    yield start
    for process in started:
        process.close()


def test_contestants_take_turns_and_what_warms_up_is_not_counted(run_contest: Any) -> None:
    contest, remotes = run_contest()
    prefills = [name for name, task in remotes.log if task == "prefill"]
    assert prefills == [*RATES] * 3
    for name, rate in RATES.items():
        record = contest.records[name]
        assert record.samples["prefill 8"] == pytest.approx([rate, rate])
        assert record.samples["decode 4"] == pytest.approx([rate, rate])
        assert record.median("peak MB") == 40.0
        assert record.median("model MB") == 15.0
        assert record.samples["first token s"] == [0.2, 0.2]


def test_every_load_has_a_fresh_process_and_the_measured_one_is_the_last(run_contest: Any) -> None:
    _, remotes = run_contest()
    starts = [name for name, task in remotes.log if task == "start"]
    assert starts == [*RATES] * 3 + [*RATES]


def test_a_depth_is_measured_where_it_can_be_reached_and_else_says_why(run_contest: Any) -> None:
    contest, _ = run_contest()
    ours, peer, forgetful = (contest.records[name] for name in RATES)
    assert ours.median("depth 100") == pytest.approx(1000.0)
    assert ours.notes["depth 10000"] == "reading so far would take 10 s"
    assert peer.notes["depth 10000"] == "reading so far would take 40 s"
    assert forgetful.median("depth 0") == pytest.approx(500.0)
    assert forgetful.notes["depth 100"] == "cannot continue a text that it has read at once"


def test_who_dies_is_named_and_measured_again_in_the_next_quantity(run_contest: Any) -> None:
    contest, remotes = run_contest({("peer", "prefill"): "its process ended with status -9"})
    assert contest.records["peer"].notes == {
        "prefill 8": "its process ended with status -9",
        "depth 100": "its speed of reading is not known",
        "depth 10000": "its speed of reading is not known",
    }
    assert contest.records["peer"].median("decode 4") == pytest.approx(250.0)
    assert contest.records["ours int8"].samples["prefill 8"] == pytest.approx([1000.0, 1000.0])
    assert sum(entry == ("peer", "start") for entry in remotes.log) == 5


def test_who_does_not_load_is_named_and_asked_nothing(run_contest: Any) -> None:
    contest, remotes = run_contest({("peer", "start"): "no such file"})
    assert contest.records["peer"].notes["first token s"] == "no such file"
    assert contest.records["peer"].samples == {}
    assert [entry for entry in remotes.log if entry[0] == "peer"] == [("peer", "start")]


def test_a_slow_contestant_takes_fewer_samples(run_contest: Any) -> None:
    contest, remotes = run_contest(plan=Plan(1, prefill=(1000,), decode=(), depths=(), repeats=3, budget_s=1.5))
    counts = {name: sum(entry == (name, "prefill") for entry in remotes.log) for name in RATES}
    assert counts == {"ours int8": 2, "peer": 1, "forgetful": 2}  # 1, 4 and 2 seconds each, those that warm up at half
    assert contest.records["peer"].samples["prefill 1000"] == pytest.approx([250.0])


def test_the_sample_that_warms_up_stays_only_where_no_other_follows() -> None:
    record = Record()
    add(record, "x", 1.0, is_warm_up=True)
    assert record.samples == {"x": [1.0]}
    add(record, "x", 2.0)
    add(record, "x", 3.0)
    assert record.samples == {"x": [2.0, 3.0]}


def test_server_reads_from_the_empty_state_and_gives_everybody_the_same_text() -> None:
    first, second = CountingEngine(), CountingEngine()
    for engine in (first, second):
        Server(engine, 50).answer({"task": "prefill", "length": 9})
    assert first.calls == [("start", 1), ("read", 9)]
    assert first.texts == second.texts
    assert set(first.texts[0]) <= set(range(50))


def test_server_times_so_many_steps_after_some_that_warm_up() -> None:
    engine = CountingEngine()
    answer = Server(engine, 50).answer({"task": "decode", "batch_size": 4, "steps": 3})
    assert engine.calls == [("start", 4), *[("step", 4)] * 5]
    assert len(answer["step_s"]) == 3


def test_server_goes_deeper_from_where_it_is_and_begins_anew_after_other_tasks() -> None:
    engine = CountingEngine()
    server = Server(engine, 50)
    server.answer({"task": "deepen", "depth": 10})
    server.answer({"task": "deep", "steps": 3})  # and two that warm up: 15 tokens
    server.answer({"task": "deepen", "depth": 40})
    assert [call for call in engine.calls if call[0] != "step"] == [("start", 1), ("read", 10), ("read", 25)]
    server.answer({"task": "prefill", "length": 2})
    server.answer({"task": "deepen", "depth": 5})
    assert engine.calls[-2:] == [("start", 1), ("read", 5)]


def test_server_compares_logits_over_reading_and_stepping_where_both_can_follow() -> None:
    able, unable = CountingEngine(), CountingEngine(can_continue=False)
    assert Server(able, 50).answer({"task": "logits", "length": 6}) == {"logits": [1.0, -2.0]}
    Server(unable, 50).answer({"task": "logits", "length": 6})
    assert able.calls == [("start", 1), ("read", 3), *[("step", 1)] * 3]
    assert unable.calls == [("start", 1), ("read", 6)]


def test_a_process_answers_each_line_and_goes_on_after_a_failure(scripted_server: Any) -> None:
    process = scripted_server()
    assert process.ask({"task": "echo", "n": 1}, 10) == {"task": "echo", "n": 1}
    assert process.ask({"task": "echo", "n": 2}, 10)["n"] == 2
    with pytest.raises(Failed, match=r"^cannot$"):
        process.ask({"task": "fail"}, 10)
    assert process.is_alive


@pytest.mark.parametrize(
    ("task", "limits", "message"),
    [
        ("die", {}, r"its process ended with status 1: out of luck"),
        ("sleep", {}, r"took longer than 0.3 s"),
        pytest.param(
            "fill",
            {"memory_limit_bytes": 150_000_000},
            r"took more than 0.1 GB of memory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc"),
        ),
    ],
)
def test_a_process_that_does_not_answer_is_ended_with_the_reason(
    scripted_server: Any, task: str, limits: dict[str, int], message: str
) -> None:
    process = scripted_server(**limits)
    with pytest.raises(Failed, match=message):
        process.ask({"task": task}, 0.3 if task == "sleep" else 20)
    assert not process.is_alive
    process.close()  # harmless


def test_a_missing_interpreter_is_the_reason() -> None:
    with pytest.raises(Failed, match="/nowhere/python does not start: No such file or directory"):
        Remote("adapters.server", {}, python="/nowhere/python", threads=1)


def test_a_missing_package_is_named_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "benchmarks.adapters.llama_engine", raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Unavailable, match=r"the package 'llama_cpp' does not import here .*; make peers"):
        make_engine("llama.cpp", Setup("x", 1, {}))


def test_an_engine_alone_stands_for_all_its_formats() -> None:
    assert expand(["ours:int8", "llama.cpp", "mambapy", "ours:int8", "ours:mine=a/b"]) == [
        ("ours", "int8"),
        ("llama.cpp", "F32"),
        ("llama.cpp", "Q8_0"),
        ("llama.cpp", "Q4_0"),
        ("mambapy", "fp32"),
        ("ours", "mine=a/b"),
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("vllm", "contestant: expected one of ours, llama.cpp, transformers, .*, found 'vllm'"),
        ("llama.cpp:Q5", "contestant: llama.cpp: expected one of F32, Q8_0, Q4_0, found 'Q5'"),
    ],
)
def test_unknown_contestants_are_named(wanted: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        expand([wanted])


def test_interpreters_are_given_by_engine_or_found_where_make_puts_them(tmp_path: Path) -> None:
    assert interpreters(["openvino=/a/python"]) == {"openvino": "/a/python"}
    with pytest.raises(RequestError, match="--python: expected ENGINE=PATH"):
        interpreters(["/a/python"])
    for name in ("common", "openvino"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
    assert default_python("openvino", tmp_path) == str(tmp_path / "openvino" / "bin" / "python")
    assert default_python("mambapy", tmp_path) == str(tmp_path / "common" / "bin" / "python")
    assert default_python("mambapy", tmp_path / "none") == sys.executable
    assert default_python("ours", tmp_path) == sys.executable


def test_foreign_interpreters_find_this_package_and_none_of_ours(scripted_server: Any, tmp_path: Path) -> None:
    process = Remote("fake", {"kind": "x"}, python=sys.executable, threads=1)
    try:
        told = process.read(20)
    finally:
        process.close()
    assert told["spec"] == {"kind": "x"}
    assert str(Path(__file__).parents[2]) not in told["path"]
    assert json.dumps(str(tmp_path)) not in json.dumps(told["path"])


def test_peers_choose_for_themselves_how_their_threads_wait() -> None:
    code = "import os, yunmin, benchmarks.adapters.remote; print(os.environ.get('OMP_WAIT_POLICY'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_logits_that_are_not_finite_are_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedRemotes({"a": 100.0, "broken": float("nan")}).install(monkeypatch)
    contest = Contest([contestant("a"), contestant("broken")], Plan(1, (), (), (), repeats=1), 9, lambda _: None)
    contest.run()
    assert set(contest.logits) == {"a"}
    assert contest.records["broken"].notes == {"logits": "not all are finite"}


def test_logits_of_padding_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    ScriptedRemotes({"a": 100.0}).install(monkeypatch)
    contest = Contest([contestant("a")], Plan(1, (), (), (), repeats=1), 1, lambda _: None)
    contest.run()
    assert contest.logits == {"a": [4.0]}
