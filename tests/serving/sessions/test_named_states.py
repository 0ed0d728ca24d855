"""Named states: prompts that a server reads at its start, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import yunmin
from serving.sessions.errors import UnknownStateError
from serving.sessions.manager import Sessions
from serving.sessions.named import load_named_states
from tests.serving.fixtures import write_model
from tests.serving.sessions.test_sessions import in_memory
from yunmin.errors import ConfigError, StateError
from yunmin.language_model import LanguageModel
from yunmin.snapshots import save_snapshot
from yunmin.state import Snapshot


def test_named_states_are_loaded_by_the_names_in_their_files(model: LanguageModel, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "one.safetensors", model.snapshot([1, 2]), model.fingerprint, name="few-shot")
    save_snapshot(tmp_path / "two.safetensors", model.snapshot([3]), model.fingerprint, name="policy.v2")
    (tmp_path / "README").write_text("not a state")
    states = load_named_states(tmp_path, model)
    assert {name: state.snapshot.token_ids for name, state in states.items()} == {"few-shot": (1, 2), "policy.v2": (3,)}
    assert states["few-shot"].size_bytes == (tmp_path / "one.safetensors").stat().st_size

    async def body(sessions: Sessions) -> None:
        named = sessions.of_model(model, states)
        record = await named.create(named.named("few-shot"))
        assert record.position == 2
        with pytest.raises(UnknownStateError, match=r"one of this server's \(few-shot, policy.v2\), got 'other'"):
            named.named("other")
        with pytest.raises(UnknownStateError, match="none is loaded"):
            sessions.named("other")

    in_memory(model, body)


def test_a_folder_of_states_with_a_wrong_one_is_refused_by_its_file(model: LanguageModel, tmp_path: Path) -> None:
    other = yunmin.load(write_model(tmp_path / "model", seed=1), device="cpu")
    folder = tmp_path / "states"
    folder.mkdir()
    wrong = folder / "b.safetensors"
    save_snapshot(folder / "a.safetensors", model.snapshot([1]), model.fingerprint, name="taken")
    cases: list[tuple[Snapshot, str, str | None, str]] = [
        (other.snapshot([1]), other.fingerprint, "x", "belongs to another model"),
        (model.snapshot([1]), model.fingerprint, "taken", "found 'taken' in .*a.safetensors"),
        (model.snapshot([1]), model.fingerprint, None, "expected a state with a name"),
        (model.snapshot([1]), model.fingerprint, "../x", "expected a state with a name"),
    ]
    for snapshot, fingerprint, name, named in cases:
        save_snapshot(wrong, snapshot, fingerprint, name=name)
        with pytest.raises(StateError, match=f"b.safetensors: .*{named}"):
            load_named_states(folder, model)
    wrong.write_bytes(b"not a state")
    with pytest.raises(StateError, match=r"b.safetensors: .* damaged"):
        load_named_states(folder, model)
    with pytest.raises(ConfigError, match="nowhere"):
        load_named_states(tmp_path / "nowhere", model)
