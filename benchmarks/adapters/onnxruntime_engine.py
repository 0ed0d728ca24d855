"""ONNX Runtime with the graph that yunmin exports, driven by yunmin's runtime, as users get it."""

from __future__ import annotations

from typing import ClassVar, Literal

import onnxruntime

from benchmarks.adapters.contract import Setup
from benchmarks.adapters.yunmin_engine import YunminEngine


class OnnxruntimeEngine(YunminEngine):
    """See `Engine`."""

    runtime: ClassVar[Literal["auto", "onnx"]] = "onnx"
    module = "yunmin.runtime.onnx_runtime"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.versions = {"onnxruntime": onnxruntime.__version__, **self.versions}
