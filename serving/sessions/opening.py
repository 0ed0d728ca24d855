"""From settings to sessions."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry

from serving.metrics import SessionMetrics
from serving.sessions.keeper import Keeper, SessionLimits
from serving.sessions.manager import Sessions
from serving.sessions.memory import CachedStore, MemoryStore
from serving.sessions.named import NamedState, load_named_states
from serving.sessions.store import Store
from serving.settings import Settings
from yunmin.errors import ConfigError
from yunmin.language_model import LanguageModel


def open_store(settings: Settings) -> Store:
    """The store that the settings name: at a URL, in a folder, or in memory alone.

    Raises:
        ConfigError: two are named.
        StoreError: it cannot be opened or reached.
        MissingExtraError: the URL needs a driver that is not installed.
    """
    if settings.session_dir and settings.session_url:
        raise ConfigError("session_dir, session_url: expected one place for sessions, both are set")
    behind: Store
    if settings.session_url:
        from serving.sessions.shared import SharedStore

        behind = SharedStore(settings.session_url, settings.max_sessions)
    elif settings.session_dir:
        from serving.sessions.disk import DiskStore

        behind = DiskStore(settings.session_dir, settings.session_disk_bytes, settings.max_sessions)
    else:
        return MemoryStore(settings.session_memory_bytes, settings.max_sessions)
    return CachedStore(behind, settings.session_memory_bytes)


def open_sessions(model: LanguageModel, settings: Settings, registry: CollectorRegistry) -> Sessions:
    """Sessions as the settings say; `sessions.keeper.close()` ends them.

    Args:
        model: that they go on with.
        settings: where they are kept, how many and how long; the folder of named states.
        registry: for their metrics.

    Raises:
        YunminError: the store cannot be opened, or a named state does not belong to the model.
    """
    states = named_states(model, settings)
    limits = SessionLimits(settings.session_ttl_s or None, settings.max_session_tokens)
    keeper = Keeper(open_store(settings), limits, SessionMetrics(registry))
    keeper.start()
    return Sessions(keeper, model, states)


def named_states(model: LanguageModel, settings: Settings) -> Mapping[str, NamedState]:
    """The named states that the settings name.

    Raises:
        ConfigError: the folder is missing.
        StateError: one is damaged, or does not belong to the model.
    """
    return load_named_states(settings.states, model) if settings.states else {}
