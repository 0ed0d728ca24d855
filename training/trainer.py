"""The training loop: phases, steps, validation, checkpoints, and how a run is stopped and taken up again."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.adaptive import AdaptiveModel
from training.allocator import freed_memory_kept
from training.checkpointing import Progress, checkpoints_of, prune_checkpoints, read_state, save_checkpoint
from training.clock import Clock
from training.config import TrainingConfig
from training.data import BatchOrder
from training.learning import Learner, Loss, mean_cross_entropy
from training.optimization import clip_gradients, moments_of, named_parameters, new_optimizer, parameter_groups
from training.parallel import Parallel, whole, without_gradients
from training.parts import Part, parts_of, tokens_of
from training.phases import Phase, PhaseSpan, plan_phases
from training.records import Records, Screen, peak_memory_bytes
from training.reporting import HARD_GATES, Reporter
from training.schedule import rate_factor_in_run
from training.start import Start, mixer_of
from training.stopping import StopRequest
from training.team import ALONE, Team
from yunmin.errors import DivergenceError, TrainingError
from yunmin.model import MambaLM
from yunmin.perplexity import perplexity
from yunmin.pillars import load_pillars
from yunmin.threads import get_threads


@dataclass(frozen=True)
class TrainingResult:
    """What a call of `Trainer.run` did.

    Attributes:
        run: the run folder.
        checkpoint: the newest one in it.
        steps: done in all.
        total_steps: planned.
        interrupted: whether a signal ended it before the last step.
        validations: held-out perplexity by the name of the phase it ended, and at "hard_gates".
        trainable_parameters: by phase of this call.
        parameters: of the model, gates and adapters included, at the end.
    """

    run: Path
    checkpoint: Path
    steps: int
    total_steps: int
    interrupted: bool
    validations: dict[str, float]
    trainable_parameters: dict[str, int]
    parameters: int


class Trainer:
    """One run.

    Args:
        config: of the run.
        run: its folder, which exists.
        start: model, data and tokenizer.
        device: to train on.
        team: that trains together; all of it must make the same calls.
    """

    def __init__(
        self, config: TrainingConfig, run: Path, start: Start, device: torch.device, team: Team = ALONE
    ) -> None:
        self.config = config
        self.run_folder = run
        self.start = start
        self.device = device
        self.team = team
        self.order = BatchOrder(len(start.data.training), config.batch_size, config.seed)
        self.total_steps = config.max_steps or config.num_epochs * self.order.batches_per_epoch
        self.spans = plan_phases(config, self.total_steps)
        self.data_sha256 = start.data.sha256
        if team.any(team.from_first(self.data_sha256) != self.data_sha256):
            raise TrainingError("the processes read different data; every machine needs the same files")
        self.generator = torch.Generator().manual_seed(config.seed)
        self.adaptive = AdaptiveModel(start.model.to(device), config, self.generator, team)
        self._learner = Learner(config, team, device)
        self._parallel: Parallel | None = None
        self.step = 0
        self.tokens = 0
        self.validations: dict[str, float] = {}
        self._entered: PhaseSpan | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._resumed_from: Progress | None = None
        self._checkpoint: Path | None = None
        self._trainable: dict[str, int] = {}
        self._stop = StopRequest(team)
        self._threads = get_threads()  # also applies YUNMIN_THREADS, before anything is computed

    # --- taking a run up again ------------------------------------------------------------------------------------

    def resume(self, checkpoint: Path, progress: Progress) -> None:
        """Continues from a checkpoint whose weights `start` already carries.

        Raises:
            TrainingError: the data is not what it was, or the plan has another number of steps.
            CheckpointError: files are damaged or do not fit.
        """
        if progress.data_sha256 != self.data_sha256:
            raise TrainingError(f"{checkpoint}: the training data has changed since this checkpoint was written")
        if self.order.position(progress.step) != (progress.epoch, progress.batch) or progress.step > self.total_steps:
            raise TrainingError(f"{checkpoint}: step {progress.step} does not fit the plan of {self.total_steps} steps")
        self.adaptive.restore(progress.phase, load_pillars(checkpoint, self.adaptive.model.config), checkpoint)
        trained = named_parameters(parameter_groups(self.adaptive.model, self.adaptive.phase, self.config))
        self._optimize(read_state(checkpoint, trained, self.generator, self.device))
        self._rng_state = torch.get_rng_state()
        self.step, self.tokens = progress.step, progress.tokens
        self.validations = dict(progress.validations)
        self._entered = next(span for span in self.spans if span.phase is progress.phase)
        self._resumed_from, self._checkpoint = progress, checkpoint

    # --- the run --------------------------------------------------------------------------------------------------

    def run(self, records: Records, screen: Screen) -> TrainingResult:
        """Trains to the last step, or until SIGINT or SIGTERM, which finish the step and write a checkpoint.

        Raises:
            DivergenceError: a loss or a gradient is not finite; the last checkpoint stays as it is.
            TrainingError: a parameter takes no part; the last checkpoint stays, too.
        """
        with self._stop.heard(screen), freed_memory_kept():
            if self._resumed_from is None:
                torch.manual_seed(self.config.seed)  # of dropout, which knows no other source
            else:
                torch.set_rng_state(self._rng_state)
                self._announce_resumption(screen, self._resumed_from)
            self._clock = Clock()
            reporter = Reporter(records, screen, self.total_steps, self._clock)
            while self.step < self.total_steps and not self._stop.is_agreed:
                span = next(span for span in self.spans if span.start <= self.step < span.stop)
                if span != self._entered:
                    self._enter(span, reporter)
                self._one_step(span, reporter)
        if self._checkpoint is None or self._checkpoint.name != f"checkpoint-{self.step}":
            self._save(reporter)
        assert self._checkpoint is not None
        return TrainingResult(
            self.run_folder,
            self._checkpoint,
            self.step,
            self.total_steps,
            self.step < self.total_steps,
            dict(self.validations),
            dict(self._trainable),
            self.adaptive.trainable_parameters()[1],
        )

    def _enter(self, span: PhaseSpan, reporter: Reporter) -> None:
        before = self.adaptive.phase if self._entered is not None else None
        moments = {} if span.phase is Phase.ADAPTERS else moments_of(self._optimizer)  # adapters start afresh
        self._optimizer = self._parallel = None
        if self.team.size > 1:
            gc.collect()  # what averaged the last phase's gradients listens to them until then
        if self.team.is_sharded and before is not None:
            self._reassemble()
        lines = self.adaptive.enter(span.phase, self._losses_ahead())
        self._optimize(moments)
        self._entered = span
        trainable, everything = self.adaptive.trainable_parameters()
        self._trainable[span.phase] = trainable
        peak = peak_memory_bytes(self.device)
        self._clock.skip()
        reporter.phase(span, self.step, trainable, everything, peak, lines)
        if before is Phase.GATES:
            self._validate(HARD_GATES, reporter)

    def _losses_ahead(self) -> Iterator[Iterator[Tensor]]:
        """Losses of the next batches without end, part by part, with gates as they are when asked for."""

        def losses(step: int) -> Iterator[Tensor]:
            for part in self._parts(step):
                self.adaptive.show(part.place)
                with self._learner.products():
                    logits = self.adaptive.model(part.inputs)  # (B, L, V)
                yield part.share * mean_cross_entropy(logits, part.labels)

        self.adaptive.model.train()
        return (losses(step) for step in itertools.count(self.step))

    def _reassemble(self) -> None:
        """Puts a model in one piece in place of a sharded one, as if resumed from a checkpoint."""
        adaptive = self.adaptive
        tensors = {name: whole(tensor).cpu() for name, tensor in adaptive.model.tensors().items()}
        model = MambaLM.from_tensors(adaptive.model.config, tensors, mixer_of(self.config))
        random_state = self.generator.get_state()
        self.adaptive = AdaptiveModel(model, self.config, self.generator, self.team)
        self.adaptive.restore(adaptive.phase, adaptive.pillars(), self.run_folder)  # adapters come last: there are none
        self.generator.set_state(random_state)
        model.to(self.device)

    def _optimize(self, moments: Mapping[str, Tensor]) -> None:
        """Distributes the phase's model over the team, and makes its optimizer."""
        self.adaptive.model.to(self.device).train()
        self._parallel = Parallel(self.adaptive.model, self.team)
        self._optimizer = new_optimizer(
            parameter_groups(self.adaptive.model, self.adaptive.phase, self.config),
            moments,
            self.adaptive.phase,
            self.device,
        )

    def _one_step(self, span: PhaseSpan, reporter: Reporter) -> None:
        factor = rate_factor_in_run(self.step, self.spans, self.config)
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * (factor if group["scheduled"] else 1.0)
        loss, norm, tokens = self._learn(span)
        lines = self.adaptive.after_step()
        self.step += 1
        self.tokens += tokens
        self._clock.tick(tokens)
        reporter.lines(lines, self.step)
        reporter.advanced(self.step, span.phase, loss)
        is_last = self.step == span.stop
        if self.step % self.config.log_interval == 0 or is_last:
            self._log(span, loss, norm, reporter)
        if is_last:
            self._validate(span.phase, reporter)
            if span.phase is Phase.GATES and span is self.spans[-1]:
                if self.team.is_sharded:
                    self._reassemble()
                reporter.lines(self.adaptive.finish())
                self._validate(HARD_GATES, reporter)
        elif self.config.validation_interval and self.step % self.config.validation_interval == 0:
            self._validate(None, reporter)
        interval = self.config.checkpoint_interval
        stops = self._stop.agree()
        if is_last or stops or (interval and self.step % interval == 0):
            self._save(reporter)

    def _learn(self, span: PhaseSpan) -> tuple[Loss, float, int]:
        """Forward, backward and the optimizer's step over one batch: its loss, the gradients' norm, its tokens."""
        assert self._optimizer is not None
        assert self._parallel is not None
        adaptive = self.adaptive
        rows = self.order.rows(self.step)
        adaptive.before_step(span.progress(self.step))
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._learner.backward(adaptive, self._parallel, self._parts(self.step), self.step)
        if not math.isfinite(loss.total):
            raise self._not_finite("loss", loss.total, rows)
        self._parallel.average_gates()
        norm = clip_gradients(self._optimizer, self.config.gradient_clip)
        if not math.isfinite(norm):
            raise self._not_finite("gradient", norm, rows)
        adaptive.after_backward()
        self._optimizer.step()
        return loss, norm, tokens_of(self.start.data.training, rows)

    def _parts(self, step: int) -> list[Part]:
        """This process's parts of a step's batch."""
        rows, accumulation = self.order.rows(step), self.config.gradient_accumulation
        return parts_of(self.start.data.training, rows, self.team, accumulation, self.device)

    # --- beside the steps -----------------------------------------------------------------------------------------

    def _log(self, span: PhaseSpan, loss: Loss, norm: float, reporter: Reporter) -> None:
        assert self._optimizer is not None
        epoch, _ = self.order.position(self.step)
        values = {
            "epoch": epoch,
            "tokens": self.tokens,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
            "gradient_norm": norm,
        }
        reporter.step(self.step, span.phase, loss, values, self.adaptive.statistics())

    def _validate(self, name: str | None, reporter: Reporter) -> None:
        """Held-out perplexity; kept under `name` where given."""
        window = self.config.sequence_length
        with self.adaptive.evaluation():
            result = perplexity(
                without_gradients(self.adaptive.model),
                self.start.data.validation,
                window=window,
                stride=window,
                batch_size=self.config.batch_size,
                device=self.device,
            )
        self._clock.skip()
        if name is not None:
            self.validations[name] = result.token_perplexity
        reporter.validation(name, self.step, self.adaptive.phase, result, window)

    def _save(self, reporter: Reporter) -> None:
        assert self._optimizer is not None
        epoch, batch = self.order.position(self.step)
        progress = Progress(
            self.step,
            self.adaptive.phase,
            epoch,
            batch,
            self.tokens,
            reporter.records.lines,
            dict(self.validations),
            self.data_sha256,
            self._threads,
            reporter.records.wandb_id,
        )
        self._checkpoint = save_checkpoint(
            self.run_folder, progress, self.adaptive, self._optimizer, self.generator, self.start.tokenizer_files
        )
        if self.team.is_first:
            prune_checkpoints(self.run_folder, self.config.keep_checkpoints)
        reporter.screen.line(f"step {self.step}: wrote {self._checkpoint}")
        self._clock.skip()

    def _not_finite(self, what: str, value: float, rows: Tensor) -> DivergenceError:
        epoch, batch = self.order.position(self.step)
        documents = self.start.data.training.documents[rows]
        kept = checkpoints_of(self.run_folder)
        return DivergenceError(
            f"step {self.step + 1}: the {what} is {value}, in batch {batch} of epoch {epoch} (sequences "
            f"{rows.tolist()} of documents {int(documents[:, 0].min())} to {int(documents[:, 1].max())}); "
            f"{f'the last good checkpoint is {kept[-1]}' if kept else 'no checkpoint was written yet'}"
        )

    def _announce_resumption(self, screen: Screen, progress: Progress) -> None:
        screen.line(f"resumed after step {self.step} of {self.total_steps}, in phase {progress.phase}")
        if progress.threads != self._threads:
            screen.line(f"  with {self._threads} threads instead of {progress.threads}: sums may round otherwise")
        self._trainable[progress.phase] = self.adaptive.trainable_parameters()[0]
