"""llama.cpp's side of `tests.llama`, for an interpreter that has `llama_cpp` and need not have pytest."""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp

from benchmarks.adapters.contract import Setup
from benchmarks.adapters.llama_engine import LlamaEngine


def main() -> None:
    """A task on stdin, its result on stdout."""
    task = json.load(sys.stdin)
    result: dict[str, Any] = {}
    engine = LlamaEngine(Setup(task["file"], 1, {}))
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> Any:  # of quantized weights: what it makes for AMX crashes on some machines
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = without_repacking
    engine.load()
    if task["text"]:
        buffer = (ctypes.c_int32 * 200)()
        vocab = llama_cpp.llama_model_get_vocab(engine._model)
        encoded = task["text"].encode()
        count = llama_cpp.llama_tokenize(vocab, encoded, len(encoded), buffer, 200, False, False)
        result["ids"] = list(buffer[:count])
    if task["prompt"]:
        engine.start(1)
        engine.read(task["prompt"][:4])
        for token_id in task["prompt"][4:]:
            engine.step([token_id])
        logits = engine.logits()
        result |= {"logits": logits, "greedy": []}
        for _ in range(task["greedy"]):
            result["greedy"].append(logits.index(max(logits)))
            engine.step(result["greedy"][-1:])
            logits = engine.logits()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
