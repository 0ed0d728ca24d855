"""GGUF files in llama.cpp: the same logits, the same greedy tokens, the same splitting of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from export.formats import write_format
from export.gguf import GGUF_TYPES, write_gguf
from export.gguf_readback import checkpoint_tensors
from tests.export.fixtures import TEXT
from tests.llama import in_llama_cpp
from tests.models import random_tensors
from yunmin.checkpoint import load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.model import MambaLM
from yunmin.tokenizer import Tokenizer

PROMPT = [3, 250, 7, 7, 319, 0, 42]
GREEDY = 40
SAME = 1e-4  # of the largest logit


def config_for_llama(**options: Any) -> MambaConfig:
    values: dict[str, Any] = {"vocab_size": 320, "d_model": 32, "n_layers": 2, "d_state": 16, "dt_rank": 3}
    return MambaConfig.create(**values | options)


@torch.inference_mode()
def logits_of(config: MambaConfig, tensors: dict[str, Tensor], ids: list[int]) -> Tensor:
    return torch.as_tensor(MambaLM.from_tensors(config, tensors)(torch.tensor([ids]))[0])


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("n_state", [16, 5])
def test_llama_cpp_computes_the_logits_of_the_weights_in_the_file(tmp_path: Path, kind: str, n_state: int) -> None:
    """llama.cpp rounds activations to the matrices' type, too: to F16, and to Q8_0 for both Q8_0 and Q4_0.

    Over 16 such models that cost at most 0.0017 for F16, and 0.010 to 0.053 for Q8_0 and Q4_0 alike.
    """
    config = config_for_llama(tie_word_embeddings=False, d_state=n_state)
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), kind=kind)
    found = torch.tensor(in_llama_cpp(tmp_path / "model.gguf", prompt=PROMPT)["logits"])
    expected = logits_of(config, checkpoint_tensors(tmp_path / "model.gguf"), PROMPT)[-1]
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < {"F32": SAME, "F16": 5e-3, "Q8_0": 0.08, "Q4_0": 0.08}[kind]


@pytest.mark.parametrize(("tied", "n_state"), [(True, 16), (False, 5)])
def test_llama_cpp_generates_the_same_greedy_tokens_from_f32(tmp_path: Path, tied: bool, n_state: int) -> None:
    """The states are narrower than they were trained in one case: llama.cpp takes any width that all layers share."""
    config = config_for_llama(tie_word_embeddings=tied, d_state=n_state)
    (tmp_path / "source").mkdir()
    write_checkpoint(tmp_path / "source", config, random_tensors(config))
    checkpoint = load_checkpoint(tmp_path / "source")
    write_format("gguf", tmp_path / "model.gguf", checkpoint, gguf_type="f32")
    found = in_llama_cpp(tmp_path / "model.gguf", prompt=PROMPT, greedy=GREEDY)["greedy"]
    assert len(found) == GREEDY
    assert len(set(found)) > GREEDY // 4  # no loop that any model would fall into
    rows = logits_of(config, checkpoint.tensors, PROMPT + found)[len(PROMPT) - 1 : -1]
    for token_id, row in zip(found, rows, strict=True):
        assert row.max() - row[token_id] <= SAME * row.abs().max()


def test_llama_cpp_never_generates_padding_of_the_vocabulary(tmp_path: Path) -> None:
    config = config_for_llama(tie_word_embeddings=False, n_tokens=300)
    tensors = random_tensors(config)
    tensors["lm_head.weight"][300:] *= 50  # would win nearly every time
    write_gguf(tmp_path / "model.gguf", config, tensors)
    found = in_llama_cpp(tmp_path / "model.gguf", prompt=[3, 250, 7], greedy=GREEDY)["greedy"]
    rows = logits_of(config, tensors, [3, 250, 7, *found])[2:-1, :300]
    for token_id, row in zip(found, rows, strict=True):
        assert row.max() - row[token_id] <= SAME * row.abs().max()


@pytest.mark.parametrize("added", [[], ["  ", "    "]])
def test_llama_cpp_splits_text_as_we_do(tmp_path: Path, added: list[str]) -> None:
    tokenizer = Tokenizer.train([TEXT], 310)
    tokenizer.backend.add_tokens(added)
    config = config_for_llama()
    write_gguf(tmp_path / "model.gguf", config, random_tensors(config), tokenizer=tokenizer)
    text = "Grüße, the 12 quick\n\n  foxes' jumps      over;\ttheir lazy dogs… 速い"
    assert in_llama_cpp(tmp_path / "model.gguf", text=text)["ids"] == tokenizer.encode(text)
