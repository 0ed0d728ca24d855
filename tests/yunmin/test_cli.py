"""The command line: instant help, one-line errors, honest exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.models import write_model
from yunmin import cli
from yunmin.errors import ConfigError


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = (
        "import sys; from yunmin.cli import main; status = main(['--help']);"
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout
    assert "Generate text from a model on this machine" in result.stdout


def test_no_command_and_an_unknown_command_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: yunmin" in capsys.readouterr().out
    assert cli.main(["generat"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("yunmin: error: unknown command 'generat', expected one of ")
    assert error.count("\n") == 1


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("yunmin ")


def test_errors_of_the_user_are_one_line_and_others_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def config(argv: list[str]) -> int:
        raise ConfigError("one\n  two")

    def missing(argv: list[str]) -> int:
        return len(Path("/no/such/file").read_text())

    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    def broken(argv: list[str]) -> int:
        raise ZeroDivisionError

    assert cli.run(config, []) == 1
    assert capsys.readouterr().err == "yunmin: error: one two\n"
    assert cli.run(missing, []) == 1
    assert capsys.readouterr().err == "yunmin: error: /no/such/file: No such file or directory\n"
    assert cli.run(interrupted, []) == 130
    with pytest.raises(ZeroDivisionError):
        cli.run(broken, [])


def test_an_unknown_log_level_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("YUNMIN_LOG", "loud")
    assert cli.run(lambda argv: 0, []) == 1
    assert "YUNMIN_LOG: expected one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (["--max-tokens", "-3"], 1, "max_tokens: must be an integer >= 0, got -3"),
        (["--temperature", "-1"], 1, "temperature: must be a number"),
        (["--max-tokens", "x"], 2, "argument --max-tokens: invalid int value: 'x'"),
        (["--max-token", "3"], 2, "unrecognized arguments"),
        (["--logprobs", "1"], 2, "--logprobs: needs --json"),
        (["--logprobs", "21", "--json"], 1, "logprobs: must be an integer in 0..20, got 21"),
        (["--stop-id", "300"], 1, "stop_token_ids: token ids must lie in 0..299, got 300"),
        (["--regex", "(a"], 1, "regex: "),
        (["--regex", "a", "--json-schema", "x"], 2, "not allowed with argument --regex"),
        (["--json-schema", "/no/such/file"], 1, "json-schema: /no/such/file: "),
        (["--device", "nonsense"], 1, "device 'nonsense' cannot be used"),
    ],
)
def test_generate_refuses_what_is_impossible(
    model_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, named: str
) -> None:
    try:
        found = cli.main(["generate", str(model_folder), "--prompt", "a", *arguments])
    except SystemExit as exit_:
        found = int(exit_.code or 0)
    assert found == status
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_generate_prints_json_or_streams_the_same_text(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Grüße", encoding="utf-8")
    arguments = ["generate", str(model_folder), "--prompt-file", str(prompt), "--max-tokens", "12", "--seed", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"text", "token_ids", "finish_reason", "prompt_tokens", "model"}
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == result["text"] + "\n"


def test_generate_prints_logprobs_and_follows_constraints(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(model_folder), "--prompt", "Grüße", "--seed", "3"]
    assert cli.main([*arguments, "--json", "--logprobs", "2", "--max-tokens", "7"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [entry["token_id"] for entry in result["logprobs"]] == result["token_ids"]
    assert all(len(entry["top"]) == 2 for entry in result["logprobs"])
    assert all(entry["logprob"] <= entry["top"][0]["logprob"] < 0 for entry in result["logprobs"])
    assert cli.main([*arguments, "--regex", "[0-9]{3}"]) == 0
    assert re.fullmatch(r"[0-9]{3}\n", capsys.readouterr().out)
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "array", "items": {"enum": [1, "ü"]}, "minItems": 2, "maxItems": 3}', encoding="utf-8")
    assert cli.main([*arguments, "--json-schema", str(schema), "--stop-id", "299", "--ignore-eos"]) == 0
    assert set(json.loads(capsys.readouterr().out)) <= {1, "ü"}


def test_generate_without_tokenizer_prints_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_model(tmp_path))
    assert cli.main(["generate", folder, "--token-ids", "1,2", "--max-tokens", "4", "--seed", "1"]) == 0
    assert len([int(part) for part in capsys.readouterr().out.split()]) == 4
    assert cli.main(["generate", folder, "--token-ids", "1,x"]) == 1
    assert "token-ids: must be integers" in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback(model_folder: Path) -> None:
    code = "import sys; from yunmin.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "generate", str(model_folder), "--prompt", "a", "--max-tokens", "50"]
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "inspect"):
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0
        assert "examples:" in capsys.readouterr().out
