from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serving.batch import main
from serving.batch_caller import Caller
from serving.batch_files import Answers, Asked, Requests
from tests.serving.fixtures import ROOT, YUNMIN, write_model
from yunmin.errors import DataError, RequestError, YunminError
from yunmin.language_model import LanguageModel

JSON = dict[str, Any]
GREEDY: JSON = {"prompt": "def main(", "max_tokens": 5, "temperature": 0}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YUNMIN_THREADS", "1")
    monkeypatch.setenv("YUNMIN_DEVICE", "cpu")


def line(custom_id: str, **body: Any) -> JSON:
    """A request of a batch."""
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": GREEDY | body}


def write_lines(path: Path, lines: Sequence[JSON]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[JSON]:
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(one) for one in text.splitlines()]


def without_moments(answers: Sequence[JSON]) -> list[JSON]:
    """The answers without what differs between two runs of a request: its own id, its time, what a cache has saved."""
    kept = json.loads(json.dumps(list(answers)))
    for answer in kept:
        body = answer["response"]["body"]
        del body["id"], body["created"], body["usage"]["prompt_tokens_details"]
    return kept


def test_answers_come_in_the_order_of_the_requests_and_are_the_librarys(
    model_folder: Path, model: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = [60, 1, 30, 2, 17, 3]
    asked = [line(f"line {n}", max_tokens=n, prompt="def " * n) for n in lengths]
    requests, answers = write_lines(tmp_path / "in.jsonl", asked), tmp_path / "new" / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers), "--slots", "3", "--json"]) == 0
    found = read_lines(answers)
    assert [answer["custom_id"] for answer in found] == [one["custom_id"] for one in asked]
    assert len({answer["id"] for answer in found}) == len(found)
    for answer, one in zip(found, asked, strict=True):
        expected = model.generate(**one["body"])
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["choices"][0]["text"] == expected.text
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered"], summary["refused"], summary["failed"], summary["resumed"]) == (len(asked), 0, 0, 0)
    assert summary["generated_tokens"] == sum(lengths)


def test_every_kind_of_request_is_answered(
    model_folder: Path, model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YUNMIN_CHAT_TEMPLATE", "chatml")
    settings = {"temperature": 0}
    chat = settings | {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9}
    response = settings | {"input": "hi", "max_output_tokens": 9}
    asked = [
        line("completion", max_tokens=9),
        line("chat") | {"url": "/v1/chat/completions", "body": chat},
        line("response") | {"url": "/v1/responses", "body": response},
    ]
    requests, answers = write_lines(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers)]) == 0
    completion, of_chat, of_response = (found["response"]["body"] for found in read_lines(answers))
    assert completion["choices"][0]["text"] == model.generate(**GREEDY | {"max_tokens": 9}).text
    text = of_chat["choices"][0]["message"]["content"]
    assert of_response["output"][0]["content"][0]["text"] == text
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text == model.generate(prompt, max_tokens=9, temperature=0).text


def test_a_refused_request_is_an_answer_and_counted(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [line("a"), line("b", max_tokens=-1), line("c", no_such_field=1), line("d")]
    requests, answers = write_lines(tmp_path / "in.jsonl", asked), tmp_path / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers)]) == 0
    statuses = [answer["response"]["status_code"] for answer in read_lines(answers)]
    assert statuses == [200, 400, 400, 200]
    assert "max_tokens" in read_lines(answers)[1]["response"]["body"]["error"]["message"]
    assert "2 answered, 2 refused" in capsys.readouterr().out


def test_a_killed_run_is_gone_on_with_to_the_same_answers(model_folder: Path, tmp_path: Path) -> None:
    bodies: list[JSON] = [{"max_tokens": 150}, {"max_tokens": 40, "temperature": 1.0, "seed": 5}, {"max_tokens": 0}]
    asked = [line(f"{n} ünï", prompt=f"def f{n}(", **bodies[n % 3]) for n in range(90)]
    requests = write_lines(tmp_path / "in.jsonl", asked)
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"

    def command(answers: Path) -> list[str]:
        return [*YUNMIN, "batch", str(model_folder), str(requests), str(answers), "--slots", "2"]

    subprocess.run(command(whole), cwd=ROOT, check=True, timeout=120)
    for _ in range(2):  # killed twice
        before = killed.read_bytes().count(b"\n") if killed.exists() else 0
        process = subprocess.Popen(command(killed), cwd=ROOT, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not killed.exists() or killed.read_bytes().count(b"\n") < before + 10:
            assert process.poll() is None, "it finished before it could be killed"
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = killed.read_bytes()
        assert left.count(b"\n") < len(asked)
        killed.write_bytes(left + left[: len(left.splitlines()[0]) // 2])  # what a kill within a write may leave
    subprocess.run(command(killed), cwd=ROOT, check=True, timeout=120)
    assert without_moments(read_lines(killed)) == without_moments(read_lines(whole))


def test_keys_of_a_server_do_not_concern_a_batch(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YUNMIN_API_KEYS", "secret")
    monkeypatch.setenv("YUNMIN_API_KEY_FILE", str(tmp_path / "none"))
    requests, answers = write_lines(tmp_path / "in.jsonl", [line("a")]), tmp_path / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers)]) == 0
    assert read_lines(answers)[0]["response"]["status_code"] == 200


def test_a_finished_run_is_not_repeated(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests, answers = write_lines(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers)]) == 0
    before = answers.read_bytes()
    capsys.readouterr()
    assert main([str(model_folder), str(requests), str(answers), "--json"]) == 0
    assert answers.read_bytes() == before
    summary = json.loads(capsys.readouterr().out)
    assert summary["answered"] == summary["resumed"] == 2


def test_other_requests_or_another_model_are_noticed_until_forced(model_folder: Path, tmp_path: Path) -> None:
    requests, answers = write_lines(tmp_path / "in.jsonl", [line("a"), line("b")]), tmp_path / "out.jsonl"
    assert main([str(model_folder), str(requests), str(answers)]) == 0
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(
        DataError, match=r"out\.jsonl: cannot go on with it, its answers are another model's; .*--force"
    ):
        main([str(other), str(requests), str(answers)])
    write_lines(requests, [line("a"), line("b", max_tokens=6)])
    with pytest.raises(DataError, match="the input has changed since"):
        main([str(model_folder), str(requests), str(answers)])
    assert main([str(model_folder), str(requests), str(answers), "--force"]) == 0
    assert read_lines(answers)[1]["response"]["body"]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"in\.jsonl: no requests found"),
        ("\n{\n", r"in\.jsonl:2: expected a JSON object, "),
        ("[1]\n", r"in\.jsonl:1: expected a JSON object, found list"),
        ('{"custom_id": "a", "body": {"x": NaN}}\n', r"in\.jsonl:1: .*NaN is no JSON number"),
        (json.dumps(line("a") | {"method": "GET"}), r"in\.jsonl:1: expected method POST, found 'GET'"),
        (json.dumps(line("a") | {"url": "/generate"}), r"in\.jsonl:1: expected url /v1/completions or .*, found '/gen"),
        (json.dumps(line("")), r"in\.jsonl:1: expected custom_id to be a text, found ''"),
        (json.dumps(line("a") | {"body": None}), r"in\.jsonl:1: expected body to be an object, found NoneType"),
        (json.dumps(line("a", stream=True)), r"in\.jsonl:1: .*leave out stream"),
        ("\n".join(map(json.dumps, [line("a"), line("b"), line("a")])), r":3: custom_id 'a' is that of line 1, too"),
    ],
)
def test_malformed_requests_are_refused_before_anything_is_answered(tmp_path: Path, text: str, message: str) -> None:
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        main([str(tmp_path / "no-model"), str(requests), str(answers)])
    assert not answers.exists()


def test_empty_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f"\n{json.dumps(line('a'))}\n  \n{json.dumps(line('b'))}", encoding="utf-8")
    assert [(asked.number, asked.custom_id) for asked in Requests(path).read(0)] == [(2, "a"), (4, "b")]


def test_missing_requests_are_one_line(tmp_path: Path) -> None:
    for path, found in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(DataError, match=f"expected a file of requests, found {found}"):
            Requests(path)


def test_a_limit_beyond_slots_and_queue_is_refused(tmp_path: Path) -> None:
    command = ["model", str(tmp_path / "in.jsonl"), "out", "--slots", "3"]
    for limit in ("0", "68"):
        with pytest.raises(RequestError, match=rf"--limit: must be in 1\.\.67, .* got {limit}"):
            main([*command, "--limit", limit])


@pytest.fixture
def requests(tmp_path: Path) -> Requests:
    return Requests(write_lines(tmp_path / "in.jsonl", [line("a"), line("b"), line("c")]))


def answer(custom_id: str, status: int = 200) -> JSON:
    return {"custom_id": custom_id, "response": {"status_code": status, "body": {}}, "error": None}


def test_a_half_line_at_the_end_is_cut(requests: Requests, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Answers(path, requests, "f", force=False) as answers:
        answers.append(answer("a"))
        answers.append(answer("b"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # all but the line's end
    with Answers(path, requests, "f", force=False) as answers:
        assert answers.tally.total == 1
        answers.append(answer("b"))
    assert path.read_bytes() == whole


def test_two_runs_cannot_write_one_file(requests: Requests, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Answers(path, requests, "f", force=False) as answers:
        answers.append(answer("a"))
        for force in (False, True):
            with pytest.raises(DataError, match=r"out\.jsonl: another process writes it"):
                Answers(path, requests, "f", force=force)
    assert read_lines(path) == [answer("a")]


def test_a_full_disk_is_one_line(requests: Requests, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.symlink_to("/dev/full")
    with (
        pytest.raises(DataError, match=r"out\.jsonl: No space left on device; .* goes on from here$"),
        Answers(path, requests, "f", force=False) as answers,
    ):
        answers.append(answer("a"))
    assert answers.tally.total == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"custom_id": "b"}\n', r"line 1: expected custom_id 'a', found 'b'"),
        ("[]\n", r"line 1 is no answer"),
        ("text\n", r"line 1 is no answer"),
        (f"{json.dumps(answer('a'))}\n" * 2, r"line 2: expected custom_id 'b', found 'a'"),
    ],
)
def test_a_file_of_something_else_is_left_alone(requests: Requests, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "out.jsonl"
    with Answers(path, requests, "f", force=False):
        pass
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        Answers(path, requests, "f", force=False)
    (tmp_path / "out.jsonl.batch.json").unlink()
    with pytest.raises(DataError, match=r"expected out\.jsonl\.batch\.json beside it"):
        Answers(path, requests, "f", force=False)
    assert path.read_text(encoding="utf-8") == content


class ScriptedApp:
    """An ASGI application that answers each custom prompt with the next of its statuses, after so many turns."""

    def __init__(self, statuses: dict[str, list[int]], turns: dict[str, int] | None = None) -> None:
        self.statuses = statuses
        self.turns = turns or {}
        self.at_once = self.most_at_once = 0
        self.finished: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        for _ in range(self.turns.get(body["prompt"], 1)):
            await asyncio.sleep(0)
        self.at_once -= 1
        status = self.statuses[body["prompt"]].pop(0)
        self.finished.append(body["prompt"])
        reply = (
            {} if status == 200 else {"error": {"message": "why", "code": "engine_stopped" if status == 503 else None}}
        )
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps(reply).encode()})


def answers_of(app: ScriptedApp, names: Sequence[str], limit: int) -> Iterator[JSON]:
    asked = (Asked(number, name, "/v1/completions", {"prompt": name}) for number, name in enumerate(names, 1))

    async def collect() -> list[JSON]:
        return [found async for found in Caller(app, "salt", limit).answer_in_order(asked)]

    return iter(asyncio.run(collect()))


def test_a_slow_request_holds_up_no_other_and_keeps_its_place() -> None:
    names = [str(n) for n in range(40)]
    app = ScriptedApp({name: [200] for name in names}, {"3": 500})
    assert [found["custom_id"] for found in answers_of(app, names, 4)] == names
    assert app.most_at_once == 4
    assert app.finished.index("3") > app.finished.index("20")


def test_a_request_that_finds_the_queue_full_is_asked_again() -> None:
    app = ScriptedApp({"a": [200], "b": [429, 200], "c": [200]})
    statuses = [found["response"]["status_code"] for found in answers_of(app, ["a", "b", "c"], 3)]
    assert statuses == [200, 200, 200]


def test_a_request_that_the_queue_can_never_hold_is_refused() -> None:
    (found,) = answers_of(ScriptedApp({"a": [429]}), ["a"], 3)
    assert found["response"]["status_code"] == 429


def test_a_failed_request_says_why_and_the_others_go_on() -> None:
    app = ScriptedApp({"a": [500], "b": [200]})
    failed, answered = answers_of(app, ["a", "b"], 2)
    assert failed["error"] == {"code": "status_500", "message": "why"}
    assert answered["error"] is None


def test_a_stopped_engine_ends_the_run_at_that_line() -> None:
    with pytest.raises(YunminError, match="line 2: why; the same command goes on from here"):
        answers_of(ScriptedApp({"a": [200], "b": [503], "c": [200]}), ["a", "b", "c"], 1)


def test_a_failed_request_makes_the_exit_status_1(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, answers = (
        write_lines(tmp_path / "in.jsonl", [line("a", max_tokens=4000), line("b")]),
        tmp_path / "o.jsonl",
    )
    monkeypatch.setitem(os.environ, "YUNMIN_DEADLINE_S", "0.05")
    assert main([str(model_folder), str(requests), str(answers)]) == 1
    assert read_lines(answers)[0]["error"]["code"] == "deadline_exceeded"
    assert main([str(model_folder), str(requests), str(answers)]) == 1  # the file still has it
