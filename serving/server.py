"""The service in one process: a socket, uvicorn, and an end that tells the clients."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
import time

import uvicorn

from serving.connection import Connection
from serving.service import create_asgi, running_engines, served_model, served_sessions
from yunmin.errors import ConfigError

_LAST_EVENTS_S = 5
_POLL_S = 0.02


class _Server(uvicorn.Server):
    """Says where it listens, and ends what still generates some time after the signal to stop."""

    def __init__(self, config: uvicorn.Config, ready: str, grace_s: float) -> None:
        super().__init__(config)
        self._ready = ready
        self._grace_s = grace_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            print(self._ready, file=sys.stderr, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drains: no newcomers, and `/readyz` says so, while whoever is here may finish within the grace."""
        end = time.monotonic() + self._grace_s
        engines = running_engines()
        for engine in engines:
            engine.drain()
        while any(engine.is_busy for engine in engines) and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(_POLL_S)
        for engine in engines:
            await asyncio.to_thread(engine.stop)  # every stream that is left ends with an error event
        await super().shutdown(sockets)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Args:
        host: name or address, IPv4 or IPv6.
        port: 0 takes a free one.

    Raises:
        ConfigError: that is not possible.
    """
    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port: expected a port in 0..65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    return listening


def serve(listening: socket.socket, host: str, name: str, grace_s: float) -> bool:
    """Serves until a signal stops it.

    Args:
        listening: where.
        host: as the user named it, for the line that says so.
        name: of the model, for the same line.
        grace_s: seconds that running requests have after the signal.

    Returns:
        Whether it ever served.

    Raises:
        YunminError: the artifact is missing or damaged.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    served_model()  # first, so that a bad artifact is one line
    served_sessions()
    shown = f"[{host}]" if ":" in host else host
    ready = f"yunmin: serving {name!r} on http://{shown}:{listening.getsockname()[1]} (Ctrl-C stops)"
    config = uvicorn.Config(
        create_asgi(), http=Connection, log_config=None, server_header=False, timeout_graceful_shutdown=_LAST_EVENTS_S
    )
    server = _Server(config, ready, grace_s)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        server.run(sockets=[listening])
    return server.started
