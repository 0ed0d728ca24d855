"""Compile the native kernels ahead, so that the first request need not wait for them."""

from __future__ import annotations

import sys
import time

from yunmin.cli import parser, print_json


def main(argv: list[str]) -> int:
    """`yunmin warmup`."""
    arguments = parser(
        "warmup",
        "Compiles every native kernel for this machine's processor and keeps the machine code on disk (YUNMIN_CACHE or "
        "~/.cache), where later processes find it. It fits every model: run it once, or when an image is built.",
        ["yunmin warmup", "YUNMIN_CACHE=/opt/cache yunmin warmup"],
    )
    arguments.add_argument("--inference-only", action="store_true", help="leave out what only training needs")
    arguments.add_argument("--json", action="store_true", help="print the result as one JSON object")
    options = arguments.parse_args(argv)

    from yunmin.kernels.jit import cache_folder
    from yunmin.kernels.warmup import compile_inference, compile_training

    begin = time.perf_counter()
    print("compiling the runtime ...", file=sys.stderr)
    compile_inference()
    if not options.inference_only:
        print("compiling forward and backward of training ...", file=sys.stderr)
        compile_training()
    seconds = time.perf_counter() - begin
    folder = cache_folder()
    if options.json:
        print_json({"seconds": seconds, "cache": None if folder is None else str(folder)})
    else:
        print(f"done in {seconds:.1f} s; kept in {folder}" if folder else f"done in {seconds:.1f} s, but kept nowhere")
    return 0 if folder else 1
