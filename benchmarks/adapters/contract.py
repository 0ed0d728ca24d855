"""What an engine must be able to do to be compared; standard library only, since it runs under foreign interpreters."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Unavailable(Exception):  # noqa: N818 (not an error: the report names it)
    """An engine cannot be measured here; the message says why and what would help."""


@dataclass(frozen=True)
class Setup:
    """What an engine is started with.

    Attributes:
        model: the file or folder it reads.
        threads: for everything it computes with.
        options: of that engine alone.
    """

    model: str
    threads: int
    options: Mapping[str, Any]


class Engine(Protocol):
    """A model in some engine, driven by token ids. Construction imports, `load` reads the weights.

    Attributes:
        versions: of the packages that compute.
        can_continue: whether `read` leaves a state that further calls of `read` and `step` go on from.
    """

    versions: Mapping[str, str]
    can_continue: bool

    def load(self) -> None:
        """Reads the weights and makes the engine ready."""
        ...

    def start(self, batch_size: int) -> None:
        """Drops all sequences and begins so many, all empty."""
        ...

    def read(self, token_ids: Sequence[int]) -> None:
        """Reads a text at once, of the only sequence; logits are computed after its last token."""
        ...

    def step(self, token_ids: Sequence[int]) -> None:
        """Reads one token of each sequence; logits are computed for all of them."""
        ...

    def logits(self) -> list[float]:
        """The first sequence's logits after the last call."""
        ...


# engine -> (module, class, how to install what it needs)
ENGINES: dict[str, tuple[str, str, str]] = {
    "yunmin": ("yunmin_engine", "YunminEngine", "make install"),
    "transformers": ("transformers_engine", "TransformersEngine", "pip install 'yunmin[peers]'"),
    "mambapy": ("mambapy_engine", "MambapyEngine", "pip install 'yunmin[peers]'"),
    "llama.cpp": ("llama_engine", "LlamaEngine", "make peers, or pip install llama-cpp-python"),
    "onnxruntime": ("onnxruntime_engine", "OnnxruntimeEngine", "pip install 'yunmin[onnx]'"),
    "openvino": ("openvino_engine", "OpenvinoEngine", "make peers, or pip install 'optimum-intel[openvino]'"),
}


def make_engine(kind: str, setup: Setup) -> Engine:
    """Imports an engine and everything it computes with.

    Raises:
        Unavailable: a package is missing, or the model is not for it.
    """
    engine: Engine = engine_class(kind)(setup)
    return engine


def engine_class(kind: str) -> Any:
    """The class of an engine.

    Raises:
        Unavailable: a package that it needs does not import.
    """
    module, class_name, install = ENGINES[kind]
    try:
        return getattr(importlib.import_module(f"benchmarks.adapters.{module}"), class_name)
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        raise Unavailable(f"the package {package!r} does not import here ({reason(error)}); {install}") from None


def reason(error: BaseException) -> str:
    """An error in one line; the text alone where it was written for the report."""
    text = str(error).strip()
    first = text.splitlines()[0] if text else "(no message)"
    return first if isinstance(error, Unavailable | ImportError) else f"{type(error).__name__}: {first}"
