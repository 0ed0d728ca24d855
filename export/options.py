"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from export.order import ORDERS_BY_TEXT, OrderKind
from export.texts import CALIBRATION_TOKENS, MEASURED_TOKENS
from yunmin.errors import ConfigError
from yunmin.quantization.layout import Format
from yunmin.runtime.onnx_contract import Flavour, Precision

OutFormat = Literal["artifact", "hf", "mamba_ssm", "gguf"]


@dataclass(frozen=True)
class Options:
    """What an export is asked for besides exactness.

    Attributes:
        data: text to verify and to measure perplexity on; None takes the standard library's.
        quantize: how weights are stored.
        calibrate: text that int4 weights are rounded for, and activations are observed on; without it int4 weights are
            rounded to nearest.
        order: of the channels.
        max_increase: largest increase of perplexity, as a share: the smallest precision and width that keep it are
            searched for (of `quantize` alone where that is given). None exports what was trained.
        width_multiple: of the widths that are tried.
        measured_tokens, calibration_tokens: how many tokens of either text are read at most.
        onnx: whether the artifact gets an ONNX graph, too.
        onnx_flavour: of the graph; None takes "ort".
        onnx_precision: of the graph; None takes the artifact's own.
        triton: where a model repository for Triton is written from the artifact; None writes none.
        triton_initial_states: files with states of the artifact, each for a model there whose sequences begin after it.
        format: "artifact", or that of other people's runtimes, which are written instead.
        gguf_type: how a GGUF file stores matrices; None takes "q8_0".
    """

    data: str | None = None
    quantize: Format = "none"
    calibrate: str | None = None
    order: OrderKind = "trained"
    max_increase: float | None = None
    width_multiple: int = 64
    measured_tokens: int = MEASURED_TOKENS
    calibration_tokens: int = CALIBRATION_TOKENS
    onnx: bool = False
    onnx_flavour: Flavour | None = None
    onnx_precision: Precision | None = None
    triton: str | None = None
    triton_initial_states: tuple[str, ...] = ()
    format: OutFormat = "artifact"
    gguf_type: str | None = None

    def __post_init__(self) -> None:
        if self.calibrate is not None and not self.calibrates:
            raise ConfigError(
                f"--calibrate {self.calibrate}: expected --quantize int4, --max-perplexity-increase, or "
                f"--order {' or '.join(ORDERS_BY_TEXT)}"
            )
        for name, value in (("--tokens", self.measured_tokens), ("--calibration-tokens", self.calibration_tokens)):
            if value < 2:
                raise ConfigError(f"{name} must be at least 2, got {value}")
        if self.triton_initial_states and self.triton is None:
            raise ConfigError(f"--triton-initial-state {self.triton_initial_states[0]}: expected --triton with it")
        self._check_format()
        self._check_onnx()

    def _check_format(self) -> None:
        if self.gguf_type is not None and self.format != "gguf":
            raise ConfigError(f"--gguf-type {self.gguf_type}: expected --format gguf, found --format {self.format}")
        if self.format == "artifact":
            return
        given = {
            f"--quantize {self.quantize}": self.quantize != "none",
            "--max-perplexity-increase": self.max_increase is not None,
            "--onnx": self.onnx,
            f"--triton {self.triton}": self.triton is not None,
        }
        for option, is_given in given.items():
            if is_given:
                raise ConfigError(f"{option} is of an artifact: expected no --format, found --format {self.format}")

    def _check_onnx(self) -> None:
        if not self.onnx and (self.onnx_flavour is not None or self.onnx_precision is not None):
            raise ConfigError(
                "--onnx-flavour and --onnx-precision describe the graph of --onnx, which was not asked for"
            )
        if self.onnx_precision not in ("int8", "int4"):
            return
        if self.quantize not in ("none", self.onnx_precision):
            raise ConfigError(
                f"--quantize {self.quantize}: expected --onnx-precision {self.quantize}, fp32 or fp16, "
                f"found {self.onnx_precision}"
            )
        if self.max_increase is not None and self.quantize == "none":
            raise ConfigError(
                f"--onnx-precision {self.onnx_precision}: the search of --max-perplexity-increase may store other "
                f"integers; expected --quantize {self.onnx_precision} with it, or no --onnx-precision"
            )

    def graph_precision(self, stored: Format) -> Precision:
        """The precision of the graph of an artifact whose weights are stored so."""
        if self.onnx_precision is not None:
            return self.onnx_precision
        return "fp32" if stored == "none" else stored

    @property
    def calibrates(self) -> bool:
        """Whether text is needed to calibrate on."""
        return self.rounds_by_text or self.order in ORDERS_BY_TEXT or self.max_increase is not None

    @property
    def rounds_by_text(self) -> bool:
        may_be_int4 = self.quantize == "int4" or (self.max_increase is not None and self.quantize == "none")
        return self.calibrate is not None and may_be_int4

    @property
    def measures(self) -> bool:
        """Whether something is done that perplexity has to show."""
        return self.quantize != "none" or self.max_increase is not None


EXACT = Options()
