"""OpenVINO through optimum-intel, which exports the model once and compiles it at every load."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from optimum.intel import OVModelForCausalLM
from torch import Tensor

from benchmarks.adapters.contract import Setup


class OpenvinoEngine:
    """See `Engine`. Several tokens are only read from the empty state, as the shape tells reading from stepping."""

    can_continue = False

    def __init__(self, setup: Setup) -> None:
        self.folder = setup.model
        self.threads = setup.threads
        packages = ("openvino", "optimum-intel", "transformers")
        self.versions = {package: version(package) for package in packages}
        torch.set_num_threads(setup.threads)

    @staticmethod
    def prepare(source: str, target: str) -> None:
        """Exports a Hugging Face folder to OpenVINO's format, weights in fp32."""
        model = OVModelForCausalLM.from_pretrained(source, export=True, compile=False, load_in_8bit=False)
        model.save_pretrained(target)

    def load(self) -> None:
        settings = {"INFERENCE_NUM_THREADS": str(self.threads), "PERFORMANCE_HINT": "LATENCY"}
        self.model: Any = OVModelForCausalLM.from_pretrained(self.folder, ov_config=settings)
        self.model.compile()
        precision = self.model.request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT")
        self.versions["products"] = precision.get_type_name()

    def start(self, batch_size: int) -> None:  # noqa: ARG002 (its first call makes the states)
        self.cache: Any = None

    def read(self, token_ids: Sequence[int]) -> None:
        assert self.cache is None
        self._forward(torch.tensor([list(token_ids)]), None)

    def step(self, token_ids: Sequence[int]) -> None:
        # one position tells its graph that this is a step; the first call is a reading of one token
        self._forward(torch.tensor(list(token_ids))[:, None], None if self.cache is None else torch.tensor([1]))

    def logits(self) -> list[float]:
        values: list[float] = self._logits[0].tolist()
        return values

    def _forward(self, ids: Tensor, position: Tensor | None) -> None:
        found = self.model(ids, cache_params=self.cache, use_cache=True, cache_position=position)
        self.cache = found.cache_params
        self._logits: Tensor = found.logits[:, -1]
