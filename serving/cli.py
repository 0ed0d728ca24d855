"""Serve an artifact over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket

from yunmin.cli import parser

_GRACE_S = 10


def main(argv: list[str]) -> int:
    """`yunmin serve ARTIFACT`."""
    from serving.settings import variables

    arguments = parser(
        "serve",
        "Serves an artifact, a run folder or a checkpoint over HTTP: the same BentoML service that `bentoml serve` "
        "starts from the project root, in one process. Every option is also an environment variable: --slots is YUNMIN_SLOTS.",
        [
            "yunmin serve artifact/",
            "yunmin serve artifact/ --host 0.0.0.0 --port 8000 --slots 16 --device cpu",
            "YUNMIN_ARTIFACT=artifact bentoml serve    # from the project root",
        ],
    )
    arguments.add_argument("artifact", help="artifact, run folder or checkpoint folder")
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    arguments.add_argument("--port", type=int, default=3000, help="port to listen on; 0 takes a free one (3000)")
    for variable in variables():
        if variable.field != "artifact":
            default = f" ({variable.default})" if variable.default != "" else ""
            # a value goes through the environment to the settings, which check it
            arguments.add_argument(variable.option, metavar="X", help=f"{variable.description}{default}")
    options = arguments.parse_args(argv)

    import tempfile

    with tempfile.TemporaryDirectory(prefix="yunmin-metrics-", ignore_cleanup_errors=True) as folder:
        # read when prometheus_client is imported; BentoML's own folder is shared by all servers of a user
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        return _start(options)


def _start(options: argparse.Namespace) -> int:
    from serving.settings import read_settings, variables

    # the service reads its settings from the environment, whoever starts it
    for variable in variables():
        if (value := getattr(options, variable.field)) is not None:
            os.environ[variable.name] = value

    from yunmin.errors import MissingExtraError

    settings = read_settings()
    try:
        import bentoml  # noqa: F401 (the service needs it)
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "yunmin serve") from None
    with _listen(options.host, options.port) as listening:
        return _serve(listening, options.host, settings.served_name)


def _listen(host: str, port: int) -> socket.socket:
    from yunmin.errors import ConfigError

    if not 0 <= port <= 65_535:
        raise ConfigError(f"--port: expected a port in 0..65535, got {port}")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: cannot listen there: {error}") from None
    return listening


def _serve(listening: socket.socket, host: str, name: str) -> int:
    import signal
    import sys

    import uvicorn

    from serving.service import create_asgi, served_model

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                shown = f"[{host}]" if ":" in host else host
                port = listening.getsockname()[1]
                print(f"yunmin: serving {name!r} on http://{shown}:{port} (Ctrl-C stops)", file=sys.stderr, flush=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops as Ctrl-C does
    served_model()  # first, so that a bad artifact is one line
    config = uvicorn.Config(create_asgi(), log_config=None, server_header=False, timeout_graceful_shutdown=_GRACE_S)
    running = Server(config)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
        running.run(sockets=[listening])
    return 0 if running.started else 1
