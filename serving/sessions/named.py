"""Named states: prompts that were read once, with `yunmin state build`, for requests to go on from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from serving.sessions.errors import UnknownStateError
from yunmin.errors import ConfigError, StateError
from yunmin.language_model import LanguageModel
from yunmin.snapshots import read_state_file, snapshot_from_bytes, snapshot_metadata
from yunmin.state import Snapshot

SUFFIX = ".safetensors"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class NamedState:
    """A prompt that has been read.

    Attributes:
        name: that requests refer to.
        snapshot: after its last token, on the model's device; never written to.
        size_bytes: of its file.
    """

    name: str
    snapshot: Snapshot
    size_bytes: int

    @property
    def position(self) -> int:
        return len(self.snapshot.token_ids)


def require_state_name(name: str) -> str:
    """A name as it may stand in requests, files and logs.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name of a state: expected letters, digits and . _ - (at most 64), got {name!r:.80}")
    return name


def load_named_states(folder: str | Path, model: LanguageModel) -> dict[str, NamedState]:
    """All states of a folder, by the name that each file itself gives.

    Args:
        folder: of `*.safetensors` files that `yunmin state build` wrote; others are left alone.
        model: they must have been built with.

    Raises:
        ConfigError: there is no such folder.
        StateError: a file is damaged, belongs to another model, has no name, or the name of another; names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of named states, found none")
    states: dict[str, NamedState] = {}
    files: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        data = read_state_file(path)
        snapshot = snapshot_from_bytes(path, data, model.config, model.fingerprint)
        name = snapshot_metadata(path, data).get("name", "")
        if not _NAME.fullmatch(name):
            raise StateError(
                f"{path}: expected a state with a name, as `yunmin state build` gives it, found {name!r:.80}"
            )
        if name in files:
            raise StateError(f"{path}: expected names that differ, found {name!r} in {files[name]}, too")
        files[name] = path
        on_device = replace(snapshot, state=snapshot.state.to(model.runtime.device))
        states[name] = NamedState(name, on_device, len(data))
    return states


def find_state(states: Mapping[str, NamedState], name: str) -> NamedState:
    """A named state.

    Raises:
        UnknownStateError: there is none of that name.
    """
    if name not in states:
        known = ", ".join(sorted(states)) or "none is loaded"
        raise UnknownStateError(f"state: expected one of this server's ({known:.200}), got {name!r:.80}")
    return states[name]
