"""The Python API: `yunmin.load(path)` and what its result can do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yunmin.artifact import is_artifact, load_artifact
from yunmin.config import MambaConfig
from yunmin.errors import ConfigError, RequestError, TokenizerError
from yunmin.generate import Completion, Generation, Piece
from yunmin.model import MambaLM
from yunmin.runtime.torch_runtime import TorchRuntime
from yunmin.sampling import sampling_params_from
from yunmin.state import MambaState, Snapshot, load_snapshot, save_snapshot
from yunmin.tokenizer import Tokenizer
from yunmin.trained import load_trained

Prompt = str | Sequence[int]


class LanguageModel:
    """A model ready to generate.

    Attributes:
        model: the network, in evaluation mode.
        runtime: runs it.
        tokenizer: None where the folder has none; prompts are then token ids.
        folder: where it was read from.
    """

    def __init__(self, model: MambaLM, tokenizer: Tokenizer | None, folder: Path) -> None:
        self.model = model
        self.runtime = TorchRuntime(model)
        self.tokenizer = tokenizer
        self.folder = folder

    @property
    def config(self) -> MambaConfig:
        return self.model.config

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config, weights, gates and adapters; saved states carry it."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        gates = {name: t for name, t in self.model.named_buffers() if t.numel()}
        for name, tensor in sorted((self.model.state_dict() | gates).items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

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
        """One more token of one sequence: logits (V,) and the next state."""
        logits, state = self.runtime.step(self.encode([token_id]), state)
        return logits[0], state

    def snapshot(self, prompt: Prompt, after: Snapshot | None = None) -> Snapshot:
        """Reads a prompt (after a snapshot, where given) into a snapshot to continue from, save or fork."""
        token_ids = self.encode(prompt)
        logits, state = self.runtime.prefill(token_ids, None if after is None else after.state)
        before = () if after is None else after.token_ids
        return Snapshot(state, logits, (*before, *token_ids), None if after is None else after.sampler_state)

    def stream(self, prompt: Prompt | Snapshot, **params: Any) -> Iterator[Piece]:
        """Generates piece by piece.

        Args:
            prompt: text, token ids, or a snapshot to continue from.
            **params: fields of `yunmin.sampling.SamplingParams`.

        Raises:
            RequestError: the prompt or a parameter is impossible; names it.
        """
        generation, start = self._start(prompt, params)
        return self._run(generation, start)

    def generate(self, prompt: Prompt | Snapshot, **params: Any) -> Completion:
        """Generates to the end; arguments as in `stream`."""
        generation, start = self._start(prompt, params)
        text = "".join(piece.text for piece in self._run(generation, start))
        assert generation.finish_reason is not None
        return Completion(text, tuple(generation.token_ids), generation.finish_reason, len(start.token_ids))

    def save_state(self, path: str | Path, snapshot: Snapshot) -> None:
        """Writes a snapshot to a safetensors file that only this model accepts."""
        save_snapshot(path, snapshot, self.fingerprint)

    def load_state(self, path: str | Path) -> Snapshot:
        """Reads a snapshot.

        Raises:
            StateError: the file is missing, damaged or another model's.
        """
        snapshot = load_snapshot(path, self.config, self.fingerprint)
        return replace(snapshot, state=snapshot.state.to(self.model.device))

    def _start(self, prompt: Prompt | Snapshot, params: dict[str, Any]) -> tuple[Generation, Snapshot]:
        sampling = sampling_params_from(params)
        start = prompt if isinstance(prompt, Snapshot) else self.snapshot(prompt)
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop", "needs a tokenizer, and this model has none")
        sampler_state = None if sampling.seed is not None else start.sampler_state
        return Generation(sampling, start.token_ids, self.config, self.tokenizer, sampler_state), start

    def _run(self, generation: Generation, start: Snapshot) -> Iterator[Piece]:
        logits, state = start.logits, start.state
        while True:
            piece = generation.advance(logits)
            yield piece
            if piece.finish_reason is not None:
                return
            assert piece.token_id is not None
            batch_logits, state = self.runtime.step([piece.token_id], state)
            logits = batch_logits[0]


def load(source: str | Path, *, device: str = "auto") -> LanguageModel:
    """Loads an artifact, a run folder, a checkpoint of it, or a plain Mamba checkpoint.

    Args:
        source: the folder, or a Hub id when online.
        device: a torch device, or "auto" for CUDA where there is one and the CPU otherwise.

    Raises:
        CheckpointError: missing or damaged files.
        ArtifactError: an artifact that does not match its manifest.
        ConfigError: unknown or impossible configuration, or no such device.
    """
    if is_artifact(source):
        checkpoint, _ = load_artifact(source)
        model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors)
    else:
        model, checkpoint = load_trained(source)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return LanguageModel(model, checkpoint.tokenizer, checkpoint.folder)
