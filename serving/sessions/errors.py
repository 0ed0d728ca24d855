"""What can go wrong with a session, each with an answer of its own."""

from __future__ import annotations

import errno

from yunmin.errors import StateError, YunminError


class UnknownSessionError(YunminError):
    """There is no session of that id: never made, deleted, or removed after it expired."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id[:64]!r}: no such session")


class SessionExpiredError(YunminError):
    """The session's time is over."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} has expired")


class SessionBusyError(YunminError):
    """Another request is using the session."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} is in use by another request")


class SessionConflictError(YunminError):
    """Another worker has saved, or deleted, the session since this one read it."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} has been changed by another worker since it was read")


class PositionError(YunminError):
    """A request names another position than the session has reached.

    Attributes:
        expected: what the request names.
        found: tokens the session has read.
    """

    def __init__(self, session_id: str, expected: int, found: int) -> None:
        super().__init__(f"session {session_id!r}: expected position {expected}, found {found}")
        self.expected = expected
        self.found = found


class SessionTooLongError(YunminError):
    """The session has read as many tokens as one may."""

    def __init__(self, session_id: str, tokens: int, limit: int) -> None:
        super().__init__(f"session {session_id!r} holds {tokens} tokens, at most {limit} on this server")


class EmptySessionError(YunminError):
    """The session has read nothing yet, so there is no state to give."""

    def __init__(self, session_id: str) -> None:
        super().__init__(f"session {session_id!r} has read no token yet, and has no state")


class WrongModelError(StateError):
    """A session was made with another model than the one that is served."""

    def __init__(self, session_id: str, expected: str, found: str) -> None:
        super().__init__(
            f"session {session_id!r} belongs to another model: expected {expected[:12]}, found {found[:12]}"
        )


class DamagedSessionError(StateError):
    """What a store holds is not what was saved; names the file or object."""


class UnknownStateError(YunminError):
    """There is no named state of that name."""


class StoreError(YunminError):
    """A store cannot be opened or reached."""


class StoreFullError(StoreError):
    """There is no room for another session, or for a longer one; what was stored before stays."""


def is_full(error: BaseException) -> bool:
    """Whether a disk, a quota or a limit of file sizes was the reason."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
