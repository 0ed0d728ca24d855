"""The smallest precision and width whose perplexity on held-out text stays within a limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from export.cut import RANKING, channel_importance, cut_and_fit, fitted_readers, kept_channels, observed
from export.quality import measure
from export.quantize import quantize_checkpoint
from export.statistics import InputStatistics
from export.texts import Texts
from yunmin.artifact import PerplexityRecord
from yunmin.checkpoint import Checkpoint
from yunmin.errors import ConfigError, VerificationError
from yunmin.quantization.layout import Format, Quantization, stored_bytes

FORMATS: tuple[Format, ...] = ("int4", "int8", "none")
_NAMES = {"none": "float32"}
_COARSE_STEPS = 8  # in which the width first goes down


@dataclass(frozen=True)
class Candidate:
    """A measured precision and width.

    Attributes:
        format: of the weights.
        width: of the widest layer.
        bytes: of the tensors in the file.
        perplexity: on the held-out text.
        passes: whether it is within the limit.
    """

    format: Format
    width: int
    bytes: int
    perplexity: float
    passes: bool

    @property
    def name(self) -> str:
        return f"{_NAMES.get(self.format, self.format)} at width {self.width}"

    def is_whole(self, full: int) -> bool:
        """Whether nothing is saved."""
        return self.format == "none" and self.width == full

    def describe(self) -> dict[str, Any]:
        return {
            "precision": _NAMES.get(self.format, self.format),
            "width": self.width,
            "bytes": self.bytes,
            "perplexity": self.perplexity,
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        chosen: the smallest candidate that passes.
        curve: all that were measured, from large to small.
        checkpoint: the chosen one as it is stored.
        kept: per layer, the inner channels that are left, int64.
        fitted: projections that are fitted where channels are cut.
    """

    chosen: Candidate
    curve: tuple[Candidate, ...]
    checkpoint: Checkpoint
    kept: tuple[Tensor, ...]
    fitted: tuple[str, ...]


def parse_increase(text: str) -> float:
    """A largest increase of perplexity, `2%` or `0.02`, as a share.

    Raises:
        ConfigError: it is neither.
    """
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if is_percent else 1)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ConfigError(f"--max-perplexity-increase: expected a share like 2% or 0.02, found {text!r}")
    return share


class Search:
    """Measures candidates; see `smallest`.

    Args:
        exact: float32, as it was trained.
        before: its perplexity.
        limit: largest perplexity that passes.
        texts: to measure on, and to rank channels, make up for cut ones and, on request, calibrate on.
        calibrates: whether int4 weights are rounded for the calibration text.
        multiple: widths are multiples of this.
        report: told how far it is.
    """

    def __init__(
        self,
        exact: Checkpoint,
        before: PerplexityRecord,
        limit: float,
        texts: Texts,
        *,
        calibrates: bool,
        multiple: int,
        report: Callable[[str], None],
    ) -> None:
        assert texts.calibration is not None
        self.exact, self.before, self.limit, self.texts = exact, before, limit, texts
        self.calibrates, self.multiple, self.report = calibrates, multiple, report
        self.full = max(exact.config.d_inner)
        self.measured: dict[tuple[Format, int], Candidate] = {}
        self._best: tuple[Candidate, Checkpoint] | None = None  # the smallest that passes

    def smallest(self, formats: Sequence[Format] = FORMATS) -> Found:
        """Finds the smallest candidate in bytes that passes.

        In each format the width goes down until the limit is exceeded, first in large steps and then between the last
        two in steps of `multiple`. Narrower ones are taken to be worse. What would be larger than the best so far is
        not measured, but for each format at full width.

        Raises:
            VerificationError: nothing smaller than the float32 model passes; names the closest.
        """
        for weight_format in formats:
            self._narrow(weight_format)
        self._measure("none", self.full)  # known already, and the first point of the curve
        curve = tuple(sorted(self.measured.values(), key=lambda c: -c.bytes))
        if self._best is None or self._best[0].is_whole(self.full):
            smaller = [candidate for candidate in curve if not candidate.is_whole(self.full)]
            closest = min(smaller, key=lambda c: c.perplexity)
            raise VerificationError(
                f"nothing smaller than the float32 model has a perplexity of at most {self.limit:.4f}; the closest of "
                f"{len(smaller)} is {closest.name} with {closest.perplexity:.4f} in {closest.bytes:,} bytes"
            )
        chosen, checkpoint = self._best
        kept = tuple(self._kept(chosen.width))
        return Found(chosen, curve, checkpoint, kept, fitted_readers(self.exact, kept))

    def _narrow(self, weight_format: Format) -> None:
        """Measures widths of a format, unless none can pass or be smaller than the best so far."""
        if not self._measure(weight_format, self.full).passes:
            return
        widths = range((self.full - 1) // self.multiple * self.multiple, 0, -self.multiple)
        smallest = self._best[0].bytes if self._best is not None else math.inf
        left = [width for width in widths if self._bytes(weight_format, width) < smallest]  # not yet decided
        step = max(1, self.full // (_COARSE_STEPS * self.multiple))
        while left:
            position = min(step, len(left)) - 1
            if self._measure(weight_format, left[position]).passes:
                left = left[position + 1 :]
            else:
                left, step = left[:position], max(1, position // 2)

    def _measure(self, weight_format: Format, width: int) -> Candidate:
        key = weight_format, width
        if key in self.measured:
            return self.measured[key]
        stored, found = self.exact, self.before.token_perplexity
        if key != ("none", self.full):
            what = f"of {_NAMES.get(weight_format, weight_format)} at width {width}"
            stored = self._stored(weight_format, width)
            found = measure(stored, self.texts.measured, self.report, what).token_perplexity
        size = self._bytes(weight_format, width)
        candidate = Candidate(weight_format, width, size, found, found <= self.limit)
        if candidate.passes and (self._best is None or size < self._best[0].bytes):
            self._best = candidate, stored
        self.measured[key] = candidate
        return candidate

    def _stored(self, weight_format: Format, width: int) -> Checkpoint:
        cut = self._cut(width)
        if weight_format == "none":
            return cut
        calibration = self.texts.calibration if self.calibrates and weight_format == "int4" else None
        return quantize_checkpoint(cut, Quantization(weight_format), calibration, self.report)

    def _cut(self, width: int) -> Checkpoint:
        if width == self.full:
            return self.exact
        return cut_and_fit(self.exact, self._kept(width), self._statistics)

    def _kept(self, width: int) -> list[Tensor]:
        if width == self.full:
            return [torch.arange(inner) for inner in self.exact.config.d_inner]
        return kept_channels(channel_importance(self.exact, self._statistics), width)

    @cached_property
    def _statistics(self) -> dict[str, InputStatistics]:
        """What channels are ranked and fitted by; it takes memory, and is not needed where no width is tried."""
        text = self.texts.calibration
        assert text is not None
        self.report(f"observing channels on {text.sequences().numel()} tokens of {text.source}")
        return observed(self.exact, text, for_fit=True)

    def _bytes(self, weight_format: Format, width: int) -> int:
        widths = [min(width, inner) for inner in self.exact.config.d_inner]
        return stored_bytes(self.exact.config.with_widths(d_inner=widths), Quantization(weight_format))


def facts_of(found: Found, share: float, limit: float, texts: Texts, full: int) -> dict[str, Any]:
    """What a manifest records of a search."""
    assert texts.calibration is not None
    facts: dict[str, Any] = {
        "search": {
            "max_perplexity_increase": share,
            "limit": limit,
            "curve": [candidate.describe() for candidate in found.curve],
        }
    }
    if found.chosen.width < full:
        facts["approximate_cut"] = {
            "inner_width": found.chosen.width,
            "of": full,
            "ranked_by": RANKING,
            "fitted": list(found.fitted),
            "ranked_on": texts.calibration.describe(),
        }
    return facts


def curve_rows(curve: Sequence[dict[str, Any]], before: float) -> list[tuple[str, str, str, str, str, str]]:
    """Precision, width, bytes, perplexity, increase and whether it passes, as text."""
    return [
        (
            candidate["precision"],
            str(candidate["width"]),
            f"{candidate['bytes']:,}",
            f"{candidate['perplexity']:.3f}",
            f"{candidate['perplexity'] / before - 1:+.2%}",
            "yes" if candidate["passes"] else "no",
        )
        for candidate in curve
    ]


CURVE_HEADER = ("precision", "width", "bytes", "perplexity", "increase", "passes")
