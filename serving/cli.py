"""Serve an artifact over HTTP."""

from __future__ import annotations

import argparse
import os

from yunmin.cli import parser

_LONGEST_GRACE_S = 86_400


def main(argv: list[str]) -> int:
    """`yunmin serve ARTIFACT`."""
    from serving.settings import variables

    arguments = parser(
        "serve",
        "Serves an artifact, a run folder or a checkpoint over HTTP: the same BentoML service that `bentoml serve` "
        "starts from the project root, in one process. Each option is a variable, too: --slots is YUNMIN_SLOTS. "
        "Keys are variables only: YUNMIN_API_KEYS, YUNMIN_ADMIN_KEY.",
        [
            "yunmin serve artifact/",
            "yunmin serve artifact/ --host 0.0.0.0 --port 8000 --slots 16 --device cpu",
            "YUNMIN_ARTIFACT=artifact bentoml serve    # from the project root",
        ],
    )
    arguments.add_argument("artifact", help="artifact, run folder or checkpoint folder")
    arguments.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    arguments.add_argument("--port", type=int, default=3000, help="port to listen on; 0 takes a free one (3000)")
    arguments.add_argument(
        "--grace-s", type=float, default=10.0, metavar="S", help="time for running requests after Ctrl-C (10)"
    )
    for variable in variables():
        if variable.field != "artifact" and not variable.is_secret:  # a command line is there for everyone to see
            default = f" ({variable.default})" if variable.default != "" else ""
            # a value goes through the environment to the settings, which check it
            arguments.add_argument(variable.option, metavar="X", help=f"{variable.description}{default}")
    options = arguments.parse_args(argv)

    # read when prometheus_client is imported; this process is the only one, so its metrics stay in its memory
    os.environ.pop("PROMETHEUS_MULTIPROC_DIR", None)
    return _start(options)


def _start(options: argparse.Namespace) -> int:
    from serving.settings import read_settings, variables

    # the service reads its settings from the environment, whoever starts it
    for variable in variables():
        if (value := getattr(options, variable.field, None)) is not None:
            os.environ[variable.name] = value

    from yunmin.errors import ConfigError, MissingExtraError

    if not 0 <= options.grace_s <= _LONGEST_GRACE_S:  # NaN fails this, too
        raise ConfigError(f"--grace-s: expected seconds in 0..{_LONGEST_GRACE_S}, got {options.grace_s:g}")
    settings = read_settings()
    try:
        import bentoml  # noqa: F401 (the service needs it)
        import prometheus_client  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "yunmin serve") from None
    from serving.server import listen, serve

    with listen(options.host, options.port) as listening:
        return 0 if serve(listening, options.host, settings.served_name, options.grace_s) else 1
