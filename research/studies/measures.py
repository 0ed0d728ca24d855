"""What is measured of an artifact in a study: quality on text kept for it, exact costs, and speed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from export.quantize import quantize_checkpoint
from research.perplexity import evaluate_perplexity
from yunmin.artifact import load_artifact
from yunmin.checkpoint import Checkpoint
from yunmin.corpus import read_documents, texts_of
from yunmin.cost import cost_of
from yunmin.language_model import LanguageModel
from yunmin.quantization.layout import Format, Quantization
from yunmin.runtime.native.runtime import NativeRuntime

_SEED = 0


@dataclass(frozen=True)
class Measures:
    """How every experiment of a study is measured; a result's file is named by it.

    Attributes:
        test: source of text that nothing was trained or tuned on.
        test_tokens: of it to score at most.
        window: tokens read at once, each scored once.
        int4: whether the weights are rounded to int4, too, and measured once more.
        prompt_tokens: of the request that is timed; 0 times none.
        new_tokens: of that request.
        repeats: of the timing; medians are kept.
    """

    test: str
    test_tokens: int = 16384
    window: int = 256
    int4: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 32
    repeats: int = 5


def measure_artifact(folder: Path, measures: Measures) -> dict[str, Any]:
    """Measures an artifact in the native runtime.

    Returns:
        `test` (quality as stored), `int4` (the same rounded to int4, or None), `cost` (of the artifact), `dense_cost`
        (of the model before it was cut) and `latency` (milliseconds; None where nothing is timed).
    """
    checkpoint, manifest = load_artifact(folder)
    found: dict[str, Any] = {"test": quality(checkpoint, measures), "int4": None, "latency": None}
    if measures.int4 and checkpoint.quantization.format == "none":
        found["int4"] = quality(quantized(checkpoint, "int4"), measures)
    found["cost"] = cost_of(checkpoint.config, checkpoint.quantization).to_dict()
    found["dense_cost"] = dict(manifest.before)
    if measures.prompt_tokens:
        found["latency"] = latency(checkpoint, measures.prompt_tokens, measures.new_tokens, measures.repeats)
    return found


def quality(checkpoint: Checkpoint, measures: Measures) -> dict[str, Any]:
    """Perplexities on the test text, as `research.perplexity.evaluate_perplexity` gives them."""
    model = LanguageModel(NativeRuntime(checkpoint), checkpoint.tokenizer, checkpoint.folder, lambda: "")
    texts = texts_of(read_documents(measures.test))
    window = measures.window
    found = evaluate_perplexity(model, texts, window=window, stride=window, max_tokens=measures.test_tokens)
    return {**found, "source": Path(measures.test).name}


def quantized(checkpoint: Checkpoint, weight_format: Format) -> Checkpoint:
    """The checkpoint with its weights rounded to nearest."""
    return quantize_checkpoint(checkpoint, Quantization(weight_format), None, lambda _: None)


def latency(checkpoint: Checkpoint, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, float]:
    """Medians of one sequence's times: `prefill_ms` for the whole prompt, `decode_ms` for a token."""
    runtime = NativeRuntime(checkpoint)
    ids = torch.randint(runtime.config.n_tokens, (prompt_tokens,), generator=torch.Generator().manual_seed(_SEED))
    prompt = ids.tolist()
    prefill_ms, decode_ms = [], []
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        _, state = runtime.prefill(prompt)
        read = time.perf_counter()
        for token_id in prompt[:1] * new_tokens:
            _, state = runtime.step([token_id], state)
        if repeat:  # the first one warms up
            prefill_ms.append(1e3 * (read - begun))
            decode_ms.append(1e3 * (time.perf_counter() - read) / new_tokens)
    return {
        "prefill_ms": statistics.median(prefill_ms),
        "decode_ms": statistics.median(decode_ms),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
