"""A process that holds one model and measures it on request, so that its peak memory is the model's own.

The parent writes one JSON object a line to its stdin and reads one a line from its stdout:

    {"prompt_tokens": 128, "new_tokens": 64}  ->  {"prefill_s": ..., "first_token_s": ..., "step_s": [...]}

The first line on stdout describes the model. `{"error": ...}` in its place says why there is none. At the end of stdin
the last line gives the memory used.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yunmin.artifact import is_artifact
from yunmin.cost import cost_of
from yunmin.errors import YunminError
from yunmin.language_model import LanguageModel, load
from yunmin.machine import memory_bytes
from yunmin.threads import get_threads, set_threads


@dataclass(frozen=True)
class Measurement:
    """One request, measured; times in seconds.

    Attributes:
        prefill_s: reading the prompt.
        first_token_s: reading the prompt and choosing the first token.
        step_s: each further token: one decode step and the choice.
    """

    prefill_s: float
    first_token_s: float
    step_s: tuple[float, ...]


@torch.inference_mode()
def measure(model: LanguageModel, prompt_tokens: int, new_tokens: int) -> Measurement:
    """Measures one greedy request that ignores end-of-text tokens.

    Args:
        model: to measure.
        prompt_tokens: ids in the prompt, >= 1.
        new_tokens: ids to generate, >= 2.
    """
    generator = torch.Generator().manual_seed(prompt_tokens)  # the same prompt for every model of this vocabulary
    prompt = torch.randint(0, model.config.n_tokens, (prompt_tokens,), generator=generator).tolist()
    device = model.runtime.device
    begin = _now(device)
    logits, state = model.runtime.prefill(prompt)
    read = _now(device)
    token_id = int(logits[: model.config.n_tokens].argmax())
    moments = [_now(device)]
    for _ in range(new_tokens - 1):
        step_logits, state = model.runtime.step([token_id], state)
        token_id = int(step_logits[0, : model.config.n_tokens].argmax())
        moments.append(_now(device))
    steps = tuple(later - earlier for earlier, later in itertools.pairwise(moments))
    return Measurement(read - begin, moments[0] - begin, steps)


def describe(model: LanguageModel, source: str) -> dict[str, Any]:
    """Sizes and settings of a loaded model."""
    config = model.config
    cost = cost_of(config)
    return {
        "source": source,
        "folder": str(model.folder),
        "parameters": cost.parameters,
        "weight_bytes": model.runtime.weight_bytes,
        "artifact_bytes": folder_bytes(model.folder) if is_artifact(model.folder) else None,
        "flops_per_token": cost.flops_per_token,
        "state_bytes": cost.state_bytes,
        "d_model": config.d_model,
        "d_inner": list(config.d_inner),
        "d_state": list(config.d_state),
        "vocab_size": config.vocab_size,
        "device": str(model.runtime.device),
        "threads": get_threads(),
        "runtime": model.runtime.name,
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(argv: list[str] | None = None) -> int:
    """`python -m benchmarks.worker MODEL [--threads N] [--device D]`."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    arguments.add_argument("model")
    arguments.add_argument("--threads", type=int)
    arguments.add_argument("--device", default="auto")
    options = arguments.parse_args(argv)
    channel = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # what a library prints must not break the protocol
        if options.threads is not None:
            set_threads(options.threads)
        before, _ = memory_bytes()
        try:
            model = load(options.model, device=options.device)
        except YunminError as error:
            print(json.dumps({"error": str(error)}), file=channel, flush=True)
            return 1
        print(json.dumps(describe(model, options.model)), file=channel, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            found = measure(model, request["prompt_tokens"], request["new_tokens"])
            print(json.dumps(vars(found)), file=channel, flush=True)
        _, peak = memory_bytes()
        memory: dict[str, int] = {"peak_memory_bytes": peak, "memory_before_load_bytes": before}
        if model.runtime.device.type == "cuda":
            memory["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(model.runtime.device)
        print(json.dumps(memory), file=channel, flush=True)
    return 0


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    raise SystemExit(main())
