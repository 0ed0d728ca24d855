"""Every engine that is installed computes our logits, so that speeds are compared of one and the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.adapters.contract import ENGINES, Setup, Unavailable, engine_class
from benchmarks.contestants import gather
from benchmarks.models import plain_checkpoint
from yunmin.checkpoint import Checkpoint
from yunmin.model import MambaLM

TEXTS = torch.tensor([[5, 300, 7, 7, 511, 0, 42, 9], [1, 2, 3, 4, 5, 6, 7, 8], [500, 400, 300, 200, 100, 50, 20, 10]])
# of the largest logit; openvino multiplies in bfloat16 where the processor can, Q8_0 and int8 round activations
TOLERANCE = {"fp32": 1e-4, "openvino": 2e-2, "int8": 3e-2}
FORMATS = [("yunmin", "ours", "fp32"), ("yunmin", "ours", "int8"), ("transformers", "transformers", "fp32")]
FORMATS += [("mambapy", "mambapy", "fp32"), ("llama.cpp", "llama.cpp", "F32"), ("llama.cpp", "llama.cpp", "Q8_0")]
FORMATS += [("onnxruntime", "onnxruntime", "fp32"), ("onnxruntime", "onnxruntime", "int8")]
FORMATS += [("openvino", "openvino", "fp32")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return plain_checkpoint(None, "tiny", tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def expected(plain: Checkpoint) -> Tensor:
    """Logits after every position (B, L, V)."""
    with torch.inference_mode():
        return MambaLM.from_tensors(plain.config, plain.tensors)(TEXTS)


@pytest.mark.parametrize(("engine", "name", "kind"), FORMATS)
def test_engine_reads_and_steps_to_our_logits(
    plain: Checkpoint, expected: Tensor, tmp_path: Path, engine: str, name: str, kind: str
) -> None:
    try:
        build = engine_class(engine)
    except Unavailable as reason:
        pytest.skip(str(reason))
    field = gather([(name, kind)], plain, tmp_path, pythons={}, say=lambda _: None)
    assert field.absent == {}
    contestant = field.contestants[0]
    threads = torch.get_num_threads()
    found = build(Setup(str(contestant.model), threads, {}))
    tolerance = TOLERANCE[engine if engine == "openvino" else contestant.precision] * float(expected.abs().max())

    def check(row: int, position: int) -> None:
        assert (torch.tensor(found.logits()) - expected[row, position]).abs().max() <= tolerance

    found.load()
    found.start(1)
    found.read(TEXTS[0, :5].tolist())
    check(0, 4)
    if found.can_continue:
        found.read(TEXTS[0, 5:7].tolist())
        check(0, 6)
        found.step(TEXTS[0, 7:].tolist())
        check(0, 7)
    found.start(3)
    for position in range(4):
        found.step(TEXTS[:, position].tolist())
        check(0, position)
    found.start(1)  # nothing is left of the batch
    for position in range(3):
        found.step([int(TEXTS[2, position])])
        check(2, position)


def test_every_engine_says_how_to_install_it() -> None:
    assert all(install.startswith(("make ", "pip install")) for _, _, install in ENGINES.values())
