"""Known sizes of Mamba with random weights: a benchmark of speed needs no download."""

from __future__ import annotations

from pathlib import Path

import torch

from yunmin.checkpoint import write_checkpoint
from yunmin.config import MambaConfig
from yunmin.corpus import read_documents, texts_of
from yunmin.errors import RequestError
from yunmin.files import atomic_folder
from yunmin.model import MambaLM
from yunmin.tokenizer import Tokenizer

# name -> (d_model, layers); `tiny` is for trying a command out, `130m-half` is 130m with half its inner channels cut,
# the others are those of the Mamba paper
SHAPES = {
    "tiny": (64, 2),
    "130m": (768, 24),
    "130m-half": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
}
_VOCAB_SIZE = {"tiny": 512}
_EXPAND = {"130m-half": 1}


def shape_config(name: str) -> MambaConfig:
    """The configuration of a known size.

    Raises:
        RequestError: there is none of that name.
    """
    if name not in SHAPES:
        raise RequestError("--shape", f"expected one of {', '.join(SHAPES)}, found {name!r}")
    d_model, n_layers = SHAPES[name]
    return MambaConfig.create(
        vocab_size=_VOCAB_SIZE.get(name, 50280), d_model=d_model, n_layers=n_layers, expand=_EXPAND.get(name, 2)
    )


def random_checkpoint(name: str, folder: Path, *, seed: int = 0, with_tokenizer: bool = False) -> Path:
    """A checkpoint with Mamba's own initialization; written once, found again later.

    Args:
        name: of the shape.
        folder: where to write it, or where an earlier call did.
        seed: of the weights.
        with_tokenizer: whether it takes text, by a tokenizer of its vocabulary that is trained on the standard library.
    """
    config = shape_config(name)
    if not (folder / "config.json").is_file():
        with torch.no_grad():
            model = MambaLM.initialized(config, torch.Generator().manual_seed(seed))
        with atomic_folder(folder) as aside:
            write_checkpoint(aside, config, model.tensors())
            if with_tokenizer:
                Tokenizer.train(texts_of(read_documents("stdlib")), config.vocab_size).save(aside)
    return folder
