"""`yunmin state build` reads a prompt once, and the server goes on from it as if it had read it itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.sessions.named import load_named_states
from serving.state_cli import main
from tests.serving.fixtures import write_model
from yunmin.cli import run
from yunmin.language_model import LanguageModel, load

TEXT = "def main(argument):\n    return 東京 🙂\n" * 60


def build(*arguments: object) -> int:
    return run(main, ["build", *map(str, arguments), "--device", "cpu"])


def test_a_state_that_was_built_goes_on_as_its_prompt_does(
    model: LanguageModel, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "states" / "support.safetensors"
    prompt.write_text(TEXT, encoding="utf-8")
    assert build(model_folder, "--prompt-file", prompt, out, "--json") == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    ids = model.encode(TEXT)
    assert result["name"] == "support"
    assert result["tokens"] == len(ids) > 1024
    assert result["bytes"] == out.stat().st_size
    assert result["fingerprint"] == model.fingerprint
    assert f"read {len(ids)} of {len(ids)} tokens" in said.err
    snapshot = load_named_states(out.parent, model)["support"].snapshot
    assert snapshot.token_ids == tuple(ids)
    assert model.generate(snapshot, max_tokens=20, temperature=0) == model.generate(TEXT, max_tokens=20, temperature=0)


def test_a_name_of_ones_own_and_ids_in_place_of_text(
    model: LanguageModel, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    assert build(model_folder, "--token-ids", "5,6,7", out, "--name", "few-shot") == 0
    assert "state 'few-shot' after 3 tokens" in capsys.readouterr().out
    assert load_named_states(tmp_path, model)["few-shot"].snapshot.token_ids == (5, 6, 7)
    assert build(model_folder, "--token-ids", "5,6", out, "--name", "few-shot") == 1
    assert "expected no such file" in capsys.readouterr().err
    assert build(model_folder, "--token-ids", "5,6", out, "--name", "few-shot", "--force") == 0
    assert load_named_states(tmp_path, model)["few-shot"].position == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--token-ids", "5,x", "out.safetensors"], "--token-ids: expected integers and commas"),
        (["--token-ids", "99999", "out.safetensors"], "token ids must lie in 0.."),
        (["--token-ids", "5", "out.bin"], "expected a name that ends in .safetensors"),
        (["--token-ids", "5", "a b.safetensors"], "name of a state: expected letters"),
        (["--token-ids", "5", "out.safetensors", "--name", "../x"], "name of a state: expected letters"),
        (["--prompt-file", "nowhere.txt", "out.safetensors"], "nowhere.txt"),
        (["--prompt-file", "empty.txt", "out.safetensors"], "must not be empty"),
        (["--prompt-file", "binary.txt", "out.safetensors"], "binary.txt: expected UTF-8 text, byte 1 is not"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_no_file(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("binary.txt").write_bytes(b"a\xff")
    before = sorted(tmp_path.iterdir())
    assert build(model_folder, *arguments) == 1
    errors = capsys.readouterr().err
    assert expected in errors
    assert len(errors.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_command_it_does_not_know_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["delete", "x"])
    assert ended.value.code == 2
    assert "unknown command 'state delete', expected 'state build'" in capsys.readouterr().err
    assert main([]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "examples:" in capsys.readouterr().out


def test_another_models_states_stop_the_server_before_it_begins(
    model: LanguageModel, model_folder: Path, tmp_path: Path
) -> None:
    from prometheus_client import CollectorRegistry

    from serving.sessions.opening import open_sessions
    from serving.settings import read_settings
    from yunmin.errors import StateError

    other = load(write_model(tmp_path / "other", seed=1), device="cpu")
    assert build(model_folder, "--token-ids", "5", tmp_path / "states" / "a.safetensors") == 0
    settings = read_settings({"YUNMIN_STATES": str(tmp_path / "states"), "YUNMIN_SESSION_DIR": str(tmp_path / "kept")})
    with pytest.raises(StateError, match=r"a.safetensors: belongs to another model"):
        open_sessions(other, settings, CollectorRegistry())
    opened = open_sessions(model, settings, CollectorRegistry())
    assert list(opened.states) == ["a"]
    opened.keeper.close()
