"""The model that Triton's python backend runs: requests of many callers advance together in one engine.

Triton calls `execute` from one thread and expects it back; responses go out later, from the event loop's thread, which
also looks whether a caller has gone. `finalize` comes after the last response: what runs when the model is unloaded is
finished first, or when the server exits, as long as its exit timeout allows.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from pydantic import ValidationError

from serving.engine.job import DeadlineError, EngineStoppedError, Job, QueueFullError
from serving.engine.streams import TokenStream
from serving.settings import Settings
from serving.start import start_engine
from serving.triton.asked import Asked, read_request, require_short
from yunmin.errors import ConfigError, RequestError, TokenizerError, YunminError
from yunmin.generate import Piece
from yunmin.language_model import load
from yunmin.threads import set_threads
from yunmin.triton_contract import ARTIFACT_FOLDER, IDS_OUTPUT, REASON_OUTPUT, SETTINGS, TEXT_OUTPUT

logger = logging.getLogger("yunmin.triton")

_LOOK_S = 0.05  # between two looks whether a caller has gone


class TritonPythonModel:
    """What Triton creates, once per instance; `backend` is its own module, which exists only inside the server."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the artifact beside model.py and starts the engine.

        Args:
            args: the model's configuration as JSON, its repository, its version, the kind and device of this instance.

        Raises:
            YunminError: the artifact is damaged, or a setting is impossible.
        """
        import triton_python_backend_utils as backend

        self._backend = backend
        self._settings = read_settings(json.loads(args["model_config"]))
        if self._settings.threads:
            set_threads(self._settings.threads)
        folder = Path(args["model_repository"]) / args["model_version"] / ARTIFACT_FOLDER
        is_gpu = args.get("model_instance_kind") == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if is_gpu else "cpu"
        self._model = load(folder, device=device, runtime=self._settings.runtime)
        self._engine = start_engine(self._model, self._settings, CollectorRegistry())
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # the loop itself keeps only weak references
        self._running: dict[TokenStream, Any] = {}  # response senders; the loop's thread alone touches all this
        self._watcher = self._loop.create_task(self._watch())
        self._thread = threading.Thread(target=self._loop.run_forever, name="yunmin-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Takes requests in; each is answered by its own response sender."""
        for request in requests:
            self._loop.call_soon_threadsafe(self._begin, self._answer(request, request.get_response_sender()))

    def finalize(self) -> None:
        """Ends both threads and lets go of the model."""
        self._engine.stop()
        asyncio.run_coroutine_threadsafe(self._finish(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        del self._engine, self._model

    def _begin(self, answer: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _finish(self) -> None:
        self._watcher.cancel()
        await asyncio.gather(self._watcher, *self._tasks, return_exceptions=True)
        await self._loop.shutdown_default_executor()

    async def _watch(self) -> None:
        """Cancels sequences whose callers have gone."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self._drop_departed()

    def _drop_departed(self) -> None:
        """A function of its own: a frame that sleeps with a response sender in it would keep the model loaded."""
        for stream, sender in self._running.items():
            try:
                if sender.is_cancelled():
                    stream.cancel()
            except Exception:  # of this sender: the others are still to be looked at
                logger.exception("whether a caller has gone could not be found out")

    async def _answer(self, request: Any, sender: Any) -> None:
        try:
            await self._generate(request, sender)
        except YunminError as error:
            self._fail(sender, str(error), _code(self._backend.TritonError, error))
        except Exception as error:
            logger.exception("a request has failed")
            self._fail(sender, f"internal error: {type(error).__name__}", self._backend.TritonError.INTERNAL)

    async def _generate(self, request: Any, sender: Any) -> None:
        asked = read_request(lambda name: self._values(request, name), request.parameters() or "", self._settings)
        token_ids = await self._encode(asked)
        job = Job(token_ids, asked.params, deadline_s=self._settings.deadline_s)
        with self._engine.submit(job) as stream:
            self._running[stream] = sender
            try:
                ended = await (self._send_each(stream, sender) if asked.stream else self._send_all(stream, sender))
            finally:
                del self._running[stream]
        if not ended:  # the caller has gone
            self._fail(sender, "the request was cancelled", self._backend.TritonError.CANCELLED)

    async def _encode(self, asked: Asked) -> list[int]:
        try:
            token_ids = await asyncio.to_thread(self._model.encode, asked.prompt)
        except RequestError as error:
            raise RequestError(asked.field, str(error).removeprefix(f"{error.field}: ")) from None
        require_short(asked, token_ids, self._settings)
        return token_ids

    async def _send_each(self, stream: TokenStream, sender: Any) -> bool:
        """Sends what is there as one response: a stream that falls behind the engine would never let the loop go."""
        ended = False
        async for piece in stream:
            pieces = [piece, *stream.ready()]
            ended = pieces[-1].finish_reason is not None
            self._send(sender, pieces, is_last=ended)
        return ended

    async def _send_all(self, stream: TokenStream, sender: Any) -> bool:
        pieces = [piece async for piece in stream]
        ended = bool(pieces) and pieces[-1].finish_reason is not None
        if ended:
            self._send(sender, pieces, is_last=True)
        return ended

    def _values(self, request: Any, name: str) -> Sequence[Any] | None:
        tensor = self._backend.get_input_tensor_by_name(request, name)
        return None if tensor is None else tensor.as_numpy().reshape(-1)

    def _send(self, sender: Any, pieces: Sequence[Piece], *, is_last: bool) -> None:
        backend = self._backend
        text = "".join(piece.text for piece in pieces).encode()
        ids = [piece.token_id for piece in pieces if piece.token_id is not None]
        reason = (pieces[-1].finish_reason or "").encode()
        tensors = [
            backend.Tensor(TEXT_OUTPUT, np.array([text], np.object_)),
            backend.Tensor(IDS_OUTPUT, np.array(ids, np.int64)),
            backend.Tensor(REASON_OUTPUT, np.array([reason], np.object_)),
        ]
        flags = backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        sender.send(backend.InferenceResponse(output_tensors=tensors), flags=flags)

    def _fail(self, sender: Any, message: str, code: Any) -> None:
        backend = self._backend
        response = backend.InferenceResponse(output_tensors=[], error=backend.TritonError(message, code))
        try:
            sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception:
            logger.exception("an error could not be sent: %s", message)


def read_settings(config: dict[str, Any]) -> Settings:
    """Settings from config.pbtxt, as the python backend gives it.

    Raises:
        ConfigError: one of its `parameters` is unknown or impossible, or it asks for warming up; names it.
    """
    if config.get("model_warmup"):  # such requests come before the server calls the model ready
        raise ConfigError("config.pbtxt: model_warmup: expected none, since the model warms up as it is loaded")
    given = {name: value.get("string_value", "") for name, value in config.get("parameters", {}).items()}
    for name in given:
        if name not in SETTINGS:
            raise ConfigError(f"config.pbtxt: parameter {name!r}: expected one of {', '.join(SETTINGS)}")
    try:
        return Settings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"config.pbtxt: parameter {first['loc'][0]!r}"
        raise ConfigError(f"{where}: {first['msg'].lower()}, got {first['input']!r}") from None


def _code(codes: Any, error: YunminError) -> Any:
    if isinstance(error, RequestError | TokenizerError):
        return codes.INVALID_ARG
    if isinstance(error, QueueFullError | EngineStoppedError):
        return codes.UNAVAILABLE
    if isinstance(error, DeadlineError):
        return codes.CANCELLED
    return codes.INTERNAL
