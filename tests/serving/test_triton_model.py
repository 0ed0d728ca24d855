"""The python backend's model without a server: what Triton hands over is let go of."""

from __future__ import annotations

import gc
import json
import sys
import threading
import types
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serving.triton.python_model import TritonPythonModel
from tests.triton_models import write_tiny_artifact


class Sender:
    """A response sender; while one lives, Triton does not unload the model."""

    def __init__(self) -> None:
        self.responses: list[types.SimpleNamespace] = []
        self.is_gone = False
        self.begun, self.ended = threading.Event(), threading.Event()

    def send(self, response: types.SimpleNamespace, flags: int) -> None:
        self.responses.append(response)
        self.begun.set()
        if flags:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.is_gone


class Request:
    def __init__(self, sender: Sender, **values: object) -> None:
        self.sender, self.values = sender, values

    def get_response_sender(self) -> Sender:
        return self.sender

    def parameters(self) -> str:
        return ""


class NamedTensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


class Backend(types.ModuleType):
    """What of the backend's module the model uses."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    Tensor = NamedTensor

    class TritonError:
        INVALID_ARG, UNAVAILABLE, CANCELLED, INTERNAL = range(4)

        def __init__(self, message: str, code: int) -> None:
            self.message, self.code = message, code

    def __init__(self) -> None:
        super().__init__("triton_python_backend_utils")

    @staticmethod
    def InferenceResponse(output_tensors: list[NamedTensor], error: object = None) -> types.SimpleNamespace:  # noqa: N802
        return types.SimpleNamespace(tensors=output_tensors, error=error)

    @staticmethod
    def get_input_tensor_by_name(request: Request, name: str) -> NamedTensor | None:
        return NamedTensor(name, np.array([request.values[name]])) if name in request.values else None


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    found = Backend()
    monkeypatch.setitem(sys.modules, found.__name__, found)
    return found


@pytest.fixture
def others() -> set[threading.Thread]:
    """Threads that other tests have left."""
    return set(threading.enumerate())


@pytest.fixture
def model(backend: Backend, tmp_path: Path) -> Iterator[TritonPythonModel]:
    write_tiny_artifact(tmp_path / "1" / "artifact")
    loaded = TritonPythonModel()
    given = {"runtime": "torch", "max_tokens": "1000000", "cache_bytes": "0"}
    config = {"parameters": {name: {"string_value": value} for name, value in given.items()}}
    loaded.initialize(
        {
            "model_config": json.dumps(config),
            "model_repository": str(tmp_path),
            "model_name": "mamba",
            "model_version": "1",
        }
    )
    yield loaded
    loaded.finalize()


def begin(model: TritonPythonModel, sender: Sender, prompt: bytes = b"x", **sampling: object) -> None:
    model.execute([Request(sender, text_input=prompt, stream=True, sampling_parameters=json.dumps(sampling))])


def test_no_reference_keeps_a_sender_after_its_last_response(model: TritonPythonModel) -> None:
    gc.collect()
    gc.disable()  # an idle process collects nothing
    try:
        for prompt, sampling in (
            (b"x", {"max_tokens": 3}),
            (b"x", {"top_q": 1}),
            (b"", {"max_tokens": 3}),
            (b"x", {"max_tokens": 1_000_000, "ignore_eos": True}),
        ):
            sender = Sender()
            kept, ended = weakref.ref(sender), sender.ended
            begin(model, sender, prompt, **sampling)
            assert sender.begun.wait(60)
            sender.is_gone = True
            del sender
            assert ended.wait(60)
            gone = threading.Event()
            model._loop.call_soon_threadsafe(model._loop.call_later, 0.2, gone.set)  # after the next look
            assert gone.wait(60)
            assert kept() is None, (prompt, sampling)
    finally:
        gc.enable()


def test_a_finalized_model_leaves_no_thread(others: set[threading.Thread], model: TritonPythonModel) -> None:
    sender = Sender()
    begin(model, sender, max_tokens=3)
    assert sender.ended.wait(60)
    assert {"yunmin-triton", "yunmin-engine"} <= {thread.name for thread in set(threading.enumerate()) - others}
    model.finalize()
    left = {thread.name for thread in set(threading.enumerate()) - others}
    assert not {name for name in left if name.startswith(("yunmin", "asyncio"))}
    model.finalize = lambda: None  # type: ignore[method-assign]
