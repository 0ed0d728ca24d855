"""Experiments that are never done twice: a training configuration, exported and measured, kept under its own hash.

A study is a list of experiments. Each has a folder named by a hash over all that its result depends on, so that a study
can be stopped at any time: finished experiments are read, a training run that was begun goes on at its last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.options import Options
from export.pipeline import export
from export.texts import Text
from research.studies.layers import layer_facts
from research.studies.measures import Measures, measure_artifact
from training.checkpointing import checkpoints_of
from training.config import RECORD_KEYS, TrainingConfig
from training.config_file import parse_config
from training.records import METRICS_FILE
from training.run import CONFIG_FILE, resume, train
from training.trainer import TrainingResult
from yunmin import __version__
from yunmin.artifact import load_artifact
from yunmin.corpus import read_documents, texts_of
from yunmin.errors import ConfigError, DivergenceError, YunminError
from yunmin.files import atomic_file, sha256_file, write_json
from yunmin.machine import machine_facts, memory_bytes, reset_peak_memory
from yunmin.memory import trim_heap
from yunmin.perplexity import token_stream
from yunmin.quantization.layout import Format

TRAINED_FILE = "trained.json"
CALLS_FILE = "calls.json"  # what training took so far, where it was stopped
_FAILURE_FILE = "failure.json"
NO_PILLARS: Mapping[str, Any] = {"scan_mode": "none", "enable_masking": False, "enable_peft": False}
MEASUREMENT_FILE = "measurement.json"
_FORMAT = 3  # of results and of what is computed: to be raised where an algorithm changes
_START = "the artifact that it starts from"  # for keys that need a checkpoint; which one is known when it is there
_KEY_LENGTH = 16  # hexadecimal digits: a study has thousands of experiments, not billions
_NAMES = ("run_name", "output_dir", "project_name", "checkpoint")  # where things lie changes no result
_CHECKPOINT_INTERVAL = 100  # steps that a killed run repeats at most
_OBSERVED_TOKENS = 4096  # for the correlations of channels


class Interrupted(KeyboardInterrupt):
    """A signal ended a training run, which will go on where it stopped."""


@dataclass(frozen=True)
class Experiment:
    """One training run, exported and measured.

    Attributes:
        training: keys of `TrainingConfig` that are not to be their defaults; not where to write and what to record.
        start: the experiment whose artifact this one starts from; None starts where `training` says.
        quantize: how the artifact is stored.
        label: for people; no part of the key.
        may_diverge: whether that is an answer, as in a search for a learning rate; no part of the key.
    """

    training: Mapping[str, Any]
    start: Experiment | None = None
    quantize: Format = "none"
    label: str = field(default="", compare=False)
    may_diverge: bool = field(default=False, compare=False)

    def config(self) -> TrainingConfig:
        """The configuration, validated.

        Raises:
            ConfigError: an unknown key or an impossible value, or one that a study decides itself.
        """
        for key in _NAMES[:-1] if self.start is None else _NAMES:
            if key in self.training:
                raise ConfigError(f"{key}: a study decides it, got {self.training[key]!r}")
        start = {} if self.start is None else {"checkpoint": _START}
        return parse_config({**start, **self.training}, where=self.label or "experiment")


class Laboratory:
    """A folder of experiments, and how they are measured.

    Args:
        folder: for one folder per experiment.
        measures: the same for all.
        report: told what is going on.
    """

    def __init__(self, folder: Path, measures: Measures, report: Callable[[str], None] = lambda _: None) -> None:
        self.folder, self.measures, self.report = folder, measures, report
        self._digests: dict[str, str] = {}

    def key(self, experiment: Experiment) -> str:
        """A hash over all that the artifact depends on: configuration, start, texts by content, version."""
        config = experiment.config()
        values = config.model_dump(mode="json", exclude={*RECORD_KEYS, *_NAMES})  # defaults, too: they may change
        values["data"] = [self._digest(source) for source in config.data]
        values["validation_data"] = [self._digest(source) for source in config.validation_data]
        facts = {
            "format": _FORMAT,
            "yunmin": __version__,
            "training": values,
            "start": None if experiment.start is None else self.key(experiment.start),
            "checkpoint": None if config.checkpoint in (None, _START) else self._digest(config.checkpoint),
            "quantize": experiment.quantize,
        }
        return hash_of(facts)

    @property
    def result_file(self) -> str:
        """The name of a result in an experiment's folder, which has one for each way of measuring."""
        measures = {**asdict(self.measures), "test": self._digest(self.measures.test)}
        return f"result-{hash_of(measures)}.json"

    def result(self, experiment: Experiment) -> dict[str, Any] | None:
        """What a finished experiment found; None before."""
        return read_result(self.folder / self.key(experiment) / self.result_file)

    def give_up(self, experiment: Experiment, reason: str) -> None:
        """Puts on record that an experiment cannot succeed, so that it is not tried again."""
        write_result(self.folder / self.key(experiment) / _FAILURE_FILE, {"error": reason})

    def failure(self, experiment: Experiment) -> str | None:
        """Why an experiment was given up; None where it was not."""
        found = read_result(self.folder / self.key(experiment) / _FAILURE_FILE)
        return None if found is None else str(found["error"])

    def run(self, experiment: Experiment, *, keep: bool = False) -> dict[str, Any]:
        """Runs an experiment, and the one it starts from, unless they are finished.

        Args:
            experiment: to run.
            keep: whether its artifact and newest checkpoint are kept, which others start from or measure further; what
                was kept before stays.

        Returns:
            What the file of its result holds.

        Raises:
            Interrupted: a signal ended it; the next call goes on.
            DivergenceError: it diverged before, and was given up.
            YunminError: as training, export and measuring say.
        """
        failure = self.failure(experiment)
        if failure is not None:
            raise DivergenceError(f"{experiment.label}: {failure}")
        folder = self.folder / self.key(experiment)
        with locked(folder):
            found = read_result(folder / self.result_file)
            if found is not None and (not keep or (folder / "artifact").is_dir()):
                return found
            if experiment.start is not None and not self.artifact(experiment.start).is_dir():
                self.run(experiment.start, keep=True)
            return self._run(experiment, folder, keep=keep)

    def artifact(self, experiment: Experiment) -> Path:
        """Where the artifact of an experiment lies that was run with `keep`."""
        return self.folder / self.key(experiment) / "artifact"

    def remember(self, facts: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a measurement found that these facts describe; measured only if it is not known yet."""
        folder = self.folder / hash_of({"format": _FORMAT, "yunmin": __version__, **facts})
        with locked(folder):
            found = read_result(folder / MEASUREMENT_FILE)
            if found is None:
                found = measure()
                write_result(folder / MEASUREMENT_FILE, found)
            return found

    def _run(self, experiment: Experiment, folder: Path, *, keep: bool) -> dict[str, Any]:
        run, artifact = folder / "run", folder / "artifact"
        trained = read_result(folder / TRAINED_FILE)
        if trained is None or not checkpoints_of(run):
            trained = self._train(experiment, folder)
            write_result(folder / TRAINED_FILE, trained)
        begun = time.perf_counter()
        was_kept = artifact.is_dir()  # by another study, which needs it
        if not was_kept:
            export(run, artifact, options=Options(data=self.measures.test, quantize=experiment.quantize))
        exported = time.perf_counter()
        self.report(f"{experiment.label}: measuring")
        measured = measure_artifact(artifact, self.measures)
        layers = layer_facts(run, self._observed(artifact).sequences())
        result = {
            "format": _FORMAT,
            "key": folder.name,
            "label": experiment.label,
            "training": experiment.config().model_dump(mode="json"),
            "start": None if experiment.start is None else self.key(experiment.start),
            "quantize": experiment.quantize,
            **trained,
            **measured,
            "layers": layers,
            "seconds": {
                "train": trained["seconds"],
                "export": exported - begun,
                "measure": time.perf_counter() - exported,
            },
            "machine": machine_facts(),
        }
        write_result(folder / self.result_file, result)
        if not keep and not was_kept:
            shutil.rmtree(artifact)
            for checkpoint in checkpoints_of(run):
                shutil.rmtree(checkpoint)
        return result

    def _train(self, experiment: Experiment, folder: Path) -> dict[str, Any]:
        """Trains, or goes on; seconds are those of all calls, the peak of memory is the highest of them.

        Of a call that was killed the seconds are lost, and so is the peak, which then is None.
        """
        self.report(f"{experiment.label}: training")
        before = read_result(folder / CALLS_FILE) if checkpoints_of(folder / "run") else None
        calls = before or {"training_memory_bytes": 0, "seconds": 0.0}
        write_result(folder / CALLS_FILE, {**calls, "training_memory_bytes": None})  # unknown if this call is killed
        trim_heap()  # what an earlier experiment left would be used again, and would not show
        reset_peak_memory()
        resident, _ = memory_bytes()
        begun = time.perf_counter()
        with (folder / "train.log").open("a", encoding="utf-8") as log, redirect_stderr(log):
            trained = self._trained(experiment, folder / "run")
        if calls["training_memory_bytes"] is not None:
            calls["training_memory_bytes"] = max(calls["training_memory_bytes"], memory_bytes()[1] - resident)
        calls["seconds"] += time.perf_counter() - begun
        if trained.interrupted:
            write_result(folder / CALLS_FILE, calls)
            raise Interrupted(f"{experiment.label} stopped after step {trained.steps} of {trained.total_steps}")
        trainable = trainable_by_phase(folder / "run")
        return {
            "validation_perplexity": trained.validations,
            "trainable_parameters": trainable,
            "adapted_parameters": list(trainable.values())[-1],
            **calls,
        }

    def _trained(self, experiment: Experiment, run: Path) -> TrainingResult:
        if (run / CONFIG_FILE).is_file() and checkpoints_of(run):
            return resume(run)
        shutil.rmtree(run, ignore_errors=True)
        own = {"output_dir": str(run.parent), "run_name": run.name, "keep_checkpoints": 1, "tensorboard": False}
        own["checkpoint_interval"] = _CHECKPOINT_INTERVAL
        if experiment.start is not None:
            own["checkpoint"] = str(self.artifact(experiment.start))
        return train(parse_config({**own, **experiment.training}, where=experiment.label))

    def _observed(self, artifact: Path) -> Text:
        checkpoint, _ = load_artifact(artifact)
        if checkpoint.tokenizer is None:
            raise YunminError(f"{artifact}: a study needs a tokenizer to read {self.measures.test} with")
        texts = texts_of(read_documents(self.measures.test))
        ids, _ = token_stream(checkpoint.tokenizer, texts, _OBSERVED_TOKENS)
        return Text(torch.tensor(ids), self.measures.test)

    def _digest(self, source: str) -> str:
        """What a source holds, by content where it is a file or a folder."""
        if source not in self._digests:
            path = Path(source)
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            there = [f"{p.relative_to(path)} {sha256_file(p)}" for p in files if p.is_file()]
            self._digests[source] = hash_of(there) if there else source
        return self._digests[source]


def trainable_by_phase(run: Path) -> dict[str, int]:
    """How many parameters each phase of a run trained, however often the run was taken up again."""
    lines = map(json.loads, (run / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    return {line["phase"]: line["trainable_parameters"] for line in lines if line["kind"] == "phase"}


def read_result(path: Path) -> dict[str, Any] | None:
    """A result that was written, or None."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result, whole or not at all."""
    with atomic_file(path) as aside:
        write_json(aside, result)


def hash_of(facts: Any) -> str:
    """The first digits of SHA-256 over facts as JSON."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:_KEY_LENGTH]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, no other process works in a folder, which is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
