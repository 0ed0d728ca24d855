"""The process of one contestant in training: whole steps without an optimizer, one request a line.

A step is forward, cross-entropy at all positions, and backward into fresh gradients. Runs under any interpreter that
has torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.adapters.contract import reason
from yunmin.machine import memory_bytes, reset_peak_memory

Logits = Callable[[Any], Any]


def main(argv: list[str]) -> int:
    """Takes one JSON object: `kind`, `model`, `threads`, `products`, `n_tokens`."""
    spec = json.loads(argv[0])
    with contextlib.ExitStack() as surroundings, contextlib.redirect_stdout(sys.stderr):
        channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

        def say(message: Mapping[str, Any]) -> None:
            print(json.dumps(message), file=channel, flush=True)

        try:
            if spec["kind"] == "yunmin":
                surroundings.enter_context(_as_trained())
            model, logits, versions = _LOADERS[spec["kind"]](spec["model"], spec["threads"])
            loaded_bytes, _ = memory_bytes()
            say({"versions": versions})
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the reason that this one is not measured)
            say({"unavailable": reason(error)})
            return 0
        for line in sys.stdin:
            try:
                say(step(model, logits, spec["products"], spec["n_tokens"], loaded_bytes, **json.loads(line)))
            except Exception as error:  # noqa: BLE001 (the report names it)
                say({"failed": reason(error)})
    return 0


def step(
    model: Any, logits: Logits, products: str, n_tokens: int, loaded_bytes: int, batch_size: int, length: int
) -> dict[str, Any]:
    """One step.

    Args:
        model: a torch module with parameters that take gradients.
        logits: ids (B, L) -> logits (B, L, V).
        products: "bf16" for products of matrices in bfloat16, else "fp32".
        n_tokens: ids below it are drawn as text.
        loaded_bytes: resident memory with the model loaded, before any step.
        batch_size: sequences.
        length: their tokens.

    Returns:
        `seconds`, `loss`, and `memory_bytes`: by how much the peak exceeds `loaded_bytes`, gradients of the weights and
        memory that an earlier step left to the allocator included.
    """
    import torch

    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, n_tokens, (batch_size, length + 1), generator=generator)
    model.zero_grad(set_to_none=True)
    reset_peak_memory()
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=products == "bf16"):
        predicted = logits(ids[:, :-1])  # (B, L, V)
    loss = torch.nn.functional.cross_entropy(predicted.flatten(0, 1).float(), ids[:, 1:].flatten())
    del predicted
    loss.backward()
    seconds = time.perf_counter() - begin
    _, peak = memory_bytes()
    return {"seconds": seconds, "loss": loss.item(), "memory_bytes": peak - loaded_bytes}


def _as_trained() -> contextlib.AbstractContextManager[None]:
    """What `yunmin train` sets up around its steps."""
    from training.allocator import freed_memory_kept

    return freed_memory_kept()


def _yunmin(folder: str, threads: int) -> tuple[Any, Logits, dict[str, str]]:
    from importlib.metadata import version

    from yunmin import __version__
    from yunmin.checkpoint import load_checkpoint
    from yunmin.model import MambaLM
    from yunmin.threads import set_threads

    set_threads(threads)
    checkpoint = load_checkpoint(folder)
    model = MambaLM.from_tensors(checkpoint.config, checkpoint.tensors).train()
    return model, model, {"yunmin": __version__, "torch": version("torch")}


def _transformers(folder: str, threads: int) -> tuple[Any, Logits, dict[str, str]]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return model, lambda ids: model(ids, use_cache=False).logits, versions


def _mambapy(folder: str, threads: int) -> tuple[Any, Logits, dict[str, str]]:
    import torch

    from benchmarks.adapters.mambapy_engine import load_mambapy, mambapy_version

    torch.set_num_threads(threads)
    model = load_mambapy(folder).train()
    return model, model, {"mambapy": mambapy_version(), "torch": torch.__version__}


_LOADERS: dict[str, Callable[[str, int], tuple[Any, Logits, dict[str, str]]]] = {
    "yunmin": _yunmin,
    "transformers": _transformers,
    "mambapy": _mambapy,
}
