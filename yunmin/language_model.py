"""The Python API: `yunmin.load(path)` and what its result can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from yunmin.artifact import Manifest, is_artifact, load_artifact
from yunmin.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, RequestError, TokenizerError
from yunmin.generate import Completion, Generation, Piece
from yunmin.model import MambaLM
from yunmin.pillars import is_trained_here
from yunmin.quantization.reference import network_of
from yunmin.runtime import Runtime
from yunmin.runtime.torch_runtime import TorchRuntime
from yunmin.sampling import sampling_params_from
from yunmin.snapshots import load_snapshot, save_snapshot
from yunmin.state import MambaState, Snapshot
from yunmin.tokenizer import Tokenizer
from yunmin.trained import load_trained

Prompt = str | Sequence[int]


class LanguageModel:
    """A model ready to generate.

    Attributes:
        runtime: runs the network.
        tokenizer: None where the folder has none; prompts are then token ids.
        folder: where it was read from.

    Args:
        runtime, tokenizer, folder: as above.
        fingerprint: computes the fingerprint when it is first asked for.
    """

    def __init__(
        self, runtime: Runtime, tokenizer: Tokenizer | None, folder: Path, fingerprint: Callable[[], str]
    ) -> None:
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.folder = folder
        self._fingerprint = fingerprint

    @classmethod
    def of_network(cls, model: MambaLM, tokenizer: Tokenizer | None, folder: Path) -> LanguageModel:
        """A network in evaluation mode, run by torch on its device."""
        gates = {name: t for name, t in model.named_buffers() if t.numel()}
        tensors = model.state_dict() | gates
        return cls(TorchRuntime(model), tokenizer, folder, lambda: fingerprint_of(model.config, tensors))

    @property
    def config(self) -> MambaConfig:
        return self.runtime.config

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, weights, gates and adapters; saved states carry it."""
        return self._fingerprint()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt given as text or as ids.

        Raises:
            RequestError: the prompt is empty or has an id outside the vocabulary.
            TokenizerError: it is text and the model has no tokenizer.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TokenizerError(f"{self.folder}: no tokenizer.json, so prompts must be token ids")
            token_ids = self.tokenizer.encode(prompt)
        else:
            token_ids = list(prompt)
        if not token_ids:
            raise RequestError("prompt", "must not be empty")
        for token_id in token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < self.config.n_tokens:
                raise RequestError("prompt", f"token ids must lie in 0..{self.config.n_tokens - 1}, got {token_id!r}")
        return token_ids

    def prefill(self, prompt: Prompt, state: MambaState | None = None) -> tuple[Tensor, MambaState]:
        """Reads a prompt: logits (V,) after its last token, and the state there."""
        return self.runtime.prefill(self.encode(prompt), state)

    def step(self, token_id: int, state: MambaState) -> tuple[Tensor, MambaState]:
        """One more token of one sequence: logits (V,) and the next state; the one given is not modified."""
        logits, state = self.runtime.step(self.encode([token_id]), state.copy())
        return logits[0], state

    def snapshot(self, prompt: Prompt, after: Snapshot | None = None) -> Snapshot:
        """Reads a prompt (after a snapshot, where given) into a snapshot to continue from, save or fork."""
        token_ids = self.encode(prompt)
        logits, state = self.runtime.prefill(token_ids, None if after is None else after.state)
        before = () if after is None else after.token_ids
        return Snapshot(state, logits, (*before, *token_ids), None if after is None else after.sampler_state)

    def stream(self, prompt: Prompt | Snapshot, **params: Any) -> Iterator[Piece]:
        """Generates piece by piece; the last piece has a finish reason, and may have no token.

        Args:
            prompt: text, token ids, or a snapshot to continue from.
            **params: fields of `yunmin.sampling.SamplingParams`: limits, temperature and filters, penalties, biases,
                `seed`, what ends the text, `logprobs`, and a `constraint` (`yunmin.constraints.Constraint`) that all
                of it must match.

        Raises:
            RequestError: the prompt or a parameter is impossible; names it.
            MissingExtraError: there is a constraint, and llguidance is not installed.
        """
        generation, start = self._start(prompt, params)
        return self._run(generation, start)

    def generate(self, prompt: Prompt | Snapshot, **params: Any) -> Completion:
        """Generates to the end; arguments as in `stream`."""
        generation, start = self._start(prompt, params)
        pieces = list(self._run(generation, start))
        assert generation.finish_reason is not None
        tokens = [piece for piece in pieces if piece.token_id is not None]
        wanted = generation.params.logprobs is not None
        return Completion(
            "".join(piece.text for piece in pieces),
            tuple(generation.token_ids),
            generation.finish_reason,
            len(start.token_ids),
            tuple(piece.logprob for piece in tokens if piece.logprob is not None) if wanted else None,
            tuple(piece.top_logprobs for piece in tokens if piece.top_logprobs is not None) if wanted else None,
        )

    def save_state(self, path: str | Path, snapshot: Snapshot) -> None:
        """Writes a snapshot to a safetensors file that only this model accepts."""
        save_snapshot(path, snapshot, self.fingerprint)

    def load_state(self, path: str | Path) -> Snapshot:
        """Reads a snapshot.

        Raises:
            StateError: the file is missing, damaged or another model's.
        """
        snapshot = load_snapshot(path, self.config, self.fingerprint)
        return replace(snapshot, state=snapshot.state.to(self.runtime.device))

    def _start(self, prompt: Prompt | Snapshot, params: dict[str, Any]) -> tuple[Generation, Snapshot]:
        sampling = sampling_params_from(params)
        token_ids = prompt.token_ids if isinstance(prompt, Snapshot) else self.encode(prompt)
        sampler_state = prompt.sampler_state if isinstance(prompt, Snapshot) and sampling.seed is None else None
        generation = Generation(sampling, token_ids, self.config, self.tokenizer, sampler_state)
        return generation, prompt if isinstance(prompt, Snapshot) else self.snapshot(token_ids)

    def _run(self, generation: Generation, start: Snapshot) -> Iterator[Piece]:
        if generation.finish_reason is not None:
            yield Piece(None, "", generation.finish_reason)
            return
        logits, state = start.logits, start.state.copy()  # steps may write over it
        while True:
            piece = generation.advance(logits)
            yield piece
            if piece.finish_reason is not None:
                return
            assert piece.token_id is not None
            batch_logits, state = self.runtime.step([piece.token_id], state)
            logits = batch_logits[0]


def load(
    source: str | Path, *, device: str = "auto", runtime: Literal["auto", "native", "torch", "onnx"] = "auto"
) -> LanguageModel:
    """Loads an artifact, a run folder, a checkpoint of it, or a plain Mamba checkpoint.

    Args:
        source: the folder, or a Hub id when online.
        device: a torch device, or "auto" for CUDA where there is one and the CPU otherwise.
        runtime: "native" code (CPUs only; no gates or adapters beside the weights), "torch", "onnx" (the graph of an
            artifact that was exported with one, in ONNX Runtime), or "auto": native wherever it can be, else torch.

    Raises:
        CheckpointError: missing or damaged files.
        ArtifactError: an artifact that does not match its manifest.
        ConfigError: unknown or impossible configuration, no such device, or a runtime that cannot run this.
        MissingExtraError: the onnx runtime is wanted, and onnxruntime is not installed.
    """
    if runtime not in ("auto", "native", "torch", "onnx"):
        raise ConfigError(f"runtime must be 'auto', 'native', 'torch' or 'onnx', got {runtime!r}")
    if runtime == "onnx":
        return _load_graph(Path(source) if is_artifact(source) else find_checkpoint(source), device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and runtime != "native" else "cpu"
    if runtime == "native" and device != "cpu":
        raise ConfigError(f"the native runtime runs on the CPU, not on {device!r}")
    folder = Path(source) if is_artifact(source) else find_checkpoint(source)
    if not is_artifact(folder) and is_trained_here(folder):
        if runtime == "native":
            raise ConfigError(f"{folder}: the native runtime runs no gates or adapters; export it first")
        model, checkpoint = load_trained(folder)
        return LanguageModel.of_network(_moved(model, device), checkpoint.tokenizer, checkpoint.folder)
    checkpoint, fingerprint = _load_plain(folder)
    if device == "cpu" and runtime != "torch":
        from yunmin.runtime.native.runtime import NativeRuntime  # imports numba

        return LanguageModel(NativeRuntime(checkpoint), checkpoint.tokenizer, checkpoint.folder, fingerprint)
    network = _moved(network_of(checkpoint), device)
    if network.device.type == "cuda":
        from yunmin.runtime.cuda_graphs import CudaGraphRuntime

        torch_runtime: TorchRuntime = CudaGraphRuntime(network)
    else:
        torch_runtime = TorchRuntime(network)
    return LanguageModel(torch_runtime, checkpoint.tokenizer, checkpoint.folder, fingerprint)


def _load_graph(folder: Path, device: str) -> LanguageModel:
    from yunmin.runtime.onnx_runtime import OnnxRuntime  # imports onnxruntime
    from yunmin.runtime.onnx_session import GraphFile, usable_device

    if not is_artifact(folder):
        raise ConfigError(f"{folder}: the onnx runtime runs the graph of an artifact; export it with --onnx")
    checkpoint, manifest = load_artifact(folder)
    runtime = OnnxRuntime(GraphFile.of_artifact(folder, manifest), checkpoint.config, usable_device(device))
    # a graph in float32 has the weights that the artifact's stand for, however they are stored
    other = "" if runtime.precision in ("fp32", manifest.quantization) else runtime.precision
    fingerprint = partial(_artifact_fingerprint, checkpoint.config, manifest, other)
    return LanguageModel(runtime, checkpoint.tokenizer, folder, fingerprint)


def fingerprint_of(config: MambaConfig, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over a config and tensors by name."""
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_plain(folder: Path) -> tuple[Checkpoint, Callable[[], str]]:
    """A checkpoint that is nothing but weights, and how to compute its fingerprint."""
    if not is_artifact(folder):
        checkpoint = load_checkpoint(folder)
        return checkpoint, lambda: fingerprint_of(checkpoint.config, checkpoint.tensors)
    checkpoint, manifest = load_artifact(folder)
    return checkpoint, partial(_artifact_fingerprint, checkpoint.config, manifest)


def _artifact_fingerprint(config: MambaConfig, manifest: Manifest, precision: str = "") -> str:
    """SHA-256 over a config, the file of weights and, where these were rounded further, to what."""
    facts = json.dumps(asdict(config), sort_keys=True) + manifest.files["model.safetensors"].sha256 + precision
    return hashlib.sha256(facts.encode()).hexdigest()


def _moved(model: MambaLM, device: str) -> MambaLM:
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
