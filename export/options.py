"""What an export is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from export.order import ORDERS_BY_TEXT, OrderKind
from export.texts import CALIBRATION_TOKENS, MEASURED_TOKENS
from yunmin.errors import ConfigError
from yunmin.quantization.layout import Format


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
    """

    data: str | None = None
    quantize: Format = "none"
    calibrate: str | None = None
    order: OrderKind = "trained"
    max_increase: float | None = None
    width_multiple: int = 64
    measured_tokens: int = MEASURED_TOKENS
    calibration_tokens: int = CALIBRATION_TOKENS

    def __post_init__(self) -> None:
        if self.calibrate is not None and not self.calibrates:
            raise ConfigError(
                f"--calibrate {self.calibrate}: expected --quantize int4, --max-perplexity-increase, or "
                f"--order {' or '.join(ORDERS_BY_TEXT)}"
            )
        for name, value in (("--tokens", self.measured_tokens), ("--calibration-tokens", self.calibration_tokens)):
            if value < 2:
                raise ConfigError(f"{name} must be at least 2, got {value}")

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
