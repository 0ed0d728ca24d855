"""yunmin itself, through the runtime that users get.

torch is imported by yunmin here, which first chooses how its threads wait.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, Literal

from benchmarks.adapters.contract import Setup
from yunmin import __version__
from yunmin.language_model import LanguageModel, load
from yunmin.state import MambaState
from yunmin.threads import set_threads

if TYPE_CHECKING:
    from torch import Tensor

_READ_AT_ONCE = 2048  # tokens; longer texts are read in pieces, as a server would


class YunminEngine:
    """See `Engine`."""

    can_continue = True
    runtime: ClassVar[Literal["auto", "onnx"]] = "auto"
    module = "yunmin.runtime.native.runtime"

    def __init__(self, setup: Setup) -> None:
        importlib.import_module(self.module)  # else `load` would, and that is timed
        self.folder = setup.model
        self.versions = {"yunmin": __version__, "torch": version("torch")}
        set_threads(setup.threads)

    def load(self) -> None:
        self._logits: Tensor
        self.model: LanguageModel = load(self.folder, device="cpu", runtime=self.runtime)

    def start(self, batch_size: int) -> None:
        self.state: MambaState = self.model.runtime.new_state(batch_size)

    def read(self, token_ids: Sequence[int]) -> None:
        for begin in range(0, len(token_ids), _READ_AT_ONCE):
            piece = token_ids[begin : begin + _READ_AT_ONCE]
            self._logits, self.state = self.model.runtime.prefill(piece, self.state)

    def step(self, token_ids: Sequence[int]) -> None:
        logits, self.state = self.model.runtime.step(token_ids, self.state)
        self._logits = logits[0]

    def logits(self) -> list[float]:
        values: list[float] = self._logits.tolist()
        return values
