"""How fast a run goes, leaving out what is no step."""

from __future__ import annotations

import time


class Clock:
    """Speed over recent steps; the first one, in which everything is built, counts only until the second."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._tokens_per_step = 0.0
        self._steps = 0
        self._since = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        return self._tokens_per_step / max(self.seconds_per_step, 1e-9)

    def tick(self, tokens: int) -> None:
        """A step ended."""
        seconds = time.perf_counter() - self._since
        self._steps += 1
        share = 1 / min(max(1, self._steps - 1), 20)
        self.seconds_per_step += share * (seconds - self.seconds_per_step)
        self._tokens_per_step += share * (tokens - self._tokens_per_step)
        self.skip()

    def skip(self) -> None:
        """Whatever happened since the last step does not count."""
        self._since = time.perf_counter()
