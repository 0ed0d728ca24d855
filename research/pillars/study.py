"""What the four comparisons share: their models, texts and budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from research.pillars.bases import SIZES, WINDOW, Budget, adapted, base_model
from research.studies.experiments import Experiment, Laboratory, hash_of
from research.studies.measures import Measures
from research.studies.texts import Split, split_text
from yunmin.config import MambaConfig
from yunmin.corpus import read_documents
from yunmin.cost import cost_of
from yunmin.errors import DataError
from yunmin.files import sha256_file


@dataclass(frozen=True)
class Study:
    """A comparison's settings.

    Attributes:
        folder: of all results; several comparisons share its experiments.
        base_source: text that base models learn.
        source: text that what starts from them learns; the base's own where it is the same.
        size: of the models, a key of `research.pillars.bases.SIZES`.
        seeds: of base models and of all that follows.
        budget: of training.
        test_tokens: scored of the test text.
        report: told how far it is.
    """

    folder: Path
    base_source: str
    source: str
    size: str = "2m"
    seeds: tuple[int, ...] = (0, 1, 2)
    budget: Budget = field(default_factory=Budget)
    test_tokens: int = 32768
    report: Callable[[str], None] = field(default=lambda _: None, compare=False)

    @property
    def base_text(self) -> Split:
        return self._split(self.base_source)

    @property
    def text(self) -> Split:
        return self._split(self.source)

    def check_texts(self) -> None:
        """Checks that base models have not seen what choices are made by, or what is reported on.

        Raises:
            DataError: they have.
        """
        if self.base_source == self.source:
            return
        seen = {d for part in (self.base_text.train, self.base_text.tune) for d in read_documents(str(part))}
        kept = [d for part in (self.text.tune, self.text.test) for d in read_documents(str(part))]
        shared = sum(document in seen for document in kept)
        if shared:
            raise DataError(
                f"--text {self.source}: base models of {self.base_source} have seen {shared} of {len(kept)} documents "
                "that are kept for tuning and testing"
            )

    def laboratory(self, text: Split) -> Laboratory:
        """Experiments that are measured on the test part of a text."""
        measures = Measures(str(text.test), test_tokens=self.test_tokens, window=WINDOW)
        return Laboratory(self.folder / "experiments", measures, self.report)

    def base(self, seed: int) -> Experiment:
        return base_model(self.size, seed, self.base_text, self.budget)

    def adapted(self, seed: int, options: Mapping[str, Any], label: str) -> Experiment:
        """What starts from the base model of a seed and learns `text`."""
        return adapted(self.base(seed), self.text, self.budget, options, label)

    def describe(self) -> dict[str, Any]:
        """What the numbers rest on."""
        budget = self.budget
        return {
            "size": self.size,
            "parameters": self._parameters(),
            "seeds": len(self.seeds),
            "base_text": _named(self.base_source, self.base_text),
            "text": _named(self.source, self.text),
            "base_steps": budget.base_steps,
            "base_batch": budget.base_batch,
            "steps": budget.steps,
            "batch": budget.batch,
            "window": WINDOW,
            "test_tokens": self.test_tokens,
        }

    def _parameters(self) -> int:
        """Of a base model."""
        return cost_of(MambaConfig.create(**SIZES[self.size])).parameters

    def _split(self, source: str) -> Split:
        return _split_once(source, self.folder / "texts" / f"{Path(source).stem}-{hash_of(source)[:6]}")


def _named(source: str, text: Split) -> str:
    """A source by its name, and by the contents that were learned."""
    return f"{Path(source).name} ({sha256_file(text.train)[:8]})"


@lru_cache(maxsize=8)
def _split_once(source: str, folder: Path) -> Split:
    return split_text([source], folder)
