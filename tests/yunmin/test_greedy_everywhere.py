"""200 greedy tokens of one model are the same wherever it runs: in our runtimes and in those of other people."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import yunmin
from export.formats import write_format
from export.onnx_graph.emit import GraphOptions
from tests.greedy import require_same_greedy
from tests.llama import in_llama_cpp
from tests.models import random_tensors
from tests.onnx_artifacts import checkpoint_of, write_onnx_artifact
from yunmin.config import MambaConfig
from yunmin.language_model import LanguageModel

PROMPT = [3, 250, 7, 7, 319, 0, 42]
COUNT = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts of the same weights, each with a graph of one flavour."""
    config = MambaConfig.create(
        vocab_size=320, d_model=64, n_layers=4, d_state=16, dt_rank=4, tie_word_embeddings=False
    )
    root, tensors = tmp_path_factory.mktemp("greedy"), random_tensors(config, seed=1)
    return {
        flavour: write_onnx_artifact(root / flavour, config, GraphOptions(flavour), tensors=tensors)
        for flavour in ("ort", "portable")
    }


@pytest.fixture(scope="module")
def reference(folders: dict[str, Path]) -> LanguageModel:
    return yunmin.load(folders["ort"], device="cpu", runtime="torch")


@pytest.fixture(scope="module")
def expected(reference: LanguageModel) -> list[int]:
    ids = list(reference.generate(PROMPT, max_tokens=COUNT, temperature=0.0, ignore_eos=True).token_ids)
    assert len(ids) == COUNT
    assert len(set(ids)) > COUNT // 4  # no loop that any model would fall into
    return ids


def require_expected(found: list[int], expected: list[int], reference: LanguageModel) -> None:
    def logits_after(ids: list[int]) -> Tensor:
        return reference.prefill([*PROMPT, *ids])[0]

    require_same_greedy(found, expected, logits_after)  # type: ignore[arg-type]


@pytest.mark.parametrize(("flavour", "runtime"), [("ort", "native"), ("ort", "onnx"), ("portable", "onnx")])
def test_our_runtimes_generate_what_plain_torch_does(
    folders: dict[str, Path], reference: LanguageModel, expected: list[int], flavour: str, runtime: str
) -> None:
    model = yunmin.load(folders[flavour], device="cpu", runtime=runtime)  # type: ignore[arg-type]
    found = model.generate(PROMPT, max_tokens=COUNT, temperature=0.0, ignore_eos=True).token_ids
    require_expected(list(found), expected, reference)


def test_transformers_generates_what_plain_torch_does(
    folders: dict[str, Path], reference: LanguageModel, expected: list[int]
) -> None:
    import transformers

    model = transformers.MambaForCausalLM.from_pretrained(folders["ort"])
    prompt, options = torch.tensor([PROMPT]), {"min_new_tokens": COUNT, "max_new_tokens": COUNT, "do_sample": False}
    with torch.inference_mode():  # the mask says that no id of the prompt is padding
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    require_expected(found[0, len(PROMPT) :].tolist(), expected, reference)


def test_llama_cpp_generates_what_plain_torch_does(
    folders: dict[str, Path], reference: LanguageModel, expected: list[int], tmp_path: Path
) -> None:
    write_format("gguf", tmp_path / "model.gguf", checkpoint_of(folders["ort"]), gguf_type="f32")
    found = in_llama_cpp(tmp_path / "model.gguf", prompt=PROMPT, greedy=COUNT)["greedy"]
    require_expected(found, expected, reference)
