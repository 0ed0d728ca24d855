"""Generates with ONNX Runtime GenAI, in any Python that has it: FOLDER PROMPT_IDS N prints a batch of two as JSON."""

import importlib
import json
import sys


def main(folder: str, prompt: list[int], n: int) -> None:
    import numpy as np

    onnxruntime_genai = importlib.import_module("onnxruntime_genai")

    model = onnxruntime_genai.Model(folder)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + n, batch_size=2)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(np.array([prompt, prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    print(json.dumps([[int(token) for token in generator.get_sequence(row)] for row in range(2)]))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
