"""What a run says of itself, on the screen and in its records at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from training.clock import Clock
from training.learning import Loss
from training.phases import Phase, PhaseSpan
from training.records import Records, Screen, described, duration
from yunmin.perplexity import Perplexity

HARD_GATES = "hard_gates"  # the validation right after the gates were made exact, before anything recovers


class Reporter:
    """Tells people and trackers how far a run is.

    Args:
        records: trackers.
        screen: lines and a bar.
        total_steps: of the run.
        clock: of its steps.
    """

    def __init__(self, records: Records, screen: Screen, total_steps: int, clock: Clock) -> None:
        self.records = records
        self.screen = screen
        self._total_steps = total_steps
        self._clock = clock

    def lines(self, lines: Sequence[str], step: int | None = None) -> None:
        """Shows what a phase or a step did."""
        for line in lines:
            self.screen.line(f"  {line}" if step is None else f"  step {step}: {line}")

    def phase(self, span: PhaseSpan, step: int, trainable: int, parameters: int, peak: int, notes: list[str]) -> None:
        """Says that a phase begins.

        Args:
            span: of the phase.
            step: steps done before.
            trainable, parameters: numbers that are trained, and all numbers.
            peak: memory so far, bytes.
            notes: what was done to the model.
        """
        self.screen.line(
            f"phase {span.phase}: steps {span.start + 1} to {span.stop}, trains {trainable:,} of {parameters:,} "
            f"parameters ({trainable / parameters:.2%}), peak memory {peak / 2**20:,.0f} MiB"
        )
        self.lines(notes)
        values = {"trainable_parameters": trainable, "parameters": parameters, "peak_memory_bytes": peak}
        self.records.write(step, "phase", span.phase, {**values, "notes": notes})

    def advanced(self, step: int, phase: Phase, loss: Loss) -> None:
        """Moves the bar."""
        self.screen.advance(step, phase, loss.total, self._clock.tokens_per_second)

    def step(self, step: int, phase: Phase, loss: Loss, values: Mapping[str, Any], masking: Mapping[str, Any]) -> None:
        """Logs a step.

        Args:
            step: steps done.
            phase: the current one.
            loss: of the step.
            values: what else is recorded; `learning_rate` among them.
            masking: its statistics.
        """
        speed = self._clock.tokens_per_second
        parts = {
            "loss": loss.total,
            "cross_entropy": loss.cross_entropy,
            "regularization": loss.regularization,
            "distillation": loss.distillation,
        }
        self.records.write(step, "train", phase, {**values, **parts, "tokens_per_second": speed, **masking})
        left = duration((self._total_steps - step) * self._clock.seconds_per_step)
        distilled = f" + distil {loss.distillation:.4f}" if loss.distillation else ""
        self.screen.line(
            f"step {step}/{self._total_steps} {phase}: loss {loss.total:.4f} = ce {loss.cross_entropy:.4f} "
            f"+ reg {loss.regularization:.4f}{distilled}, lr {values['learning_rate']:.2e}, {speed:,.0f} tokens/s, "
            f"{left} left"
        )
        if phase is Phase.GATES:
            self.screen.line(f"  masking: {described(masking)}")

    def validation(self, name: str | None, step: int, phase: Phase, result: Perplexity, window: int) -> None:
        """Logs held-out perplexity.

        Args:
            name: what it ended: a phase, `HARD_GATES`; None at an interval.
            step: steps done.
            phase: the current one.
            result: as measured.
            window: tokens.
        """
        values = {
            "perplexity": result.token_perplexity,
            "mean_nll": result.mean_nll,
            "scored_tokens": result.tokens,
            "window": window,
            "at": name or "interval",
        }
        self.records.write(step, "validation", phase, values)
        note = " (gates exact, before recovery)" if name == HARD_GATES else ""
        self.screen.line(
            f"step {step}: validation perplexity {result.token_perplexity:.3f}{note} "
            f"over {result.tokens:,} held-out tokens, window {window}"
        )
