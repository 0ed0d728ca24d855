"""Experiments on a Ray cluster, whose machines share no disk: what they need is sent, what they find comes back."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.studies.experiments import Experiment, Laboratory, write_result
from research.studies.jobs import LOG_FILE, Done, Job, Queue, laboratory_in, one_line, perform
from research.studies.measures import Measures
from yunmin.errors import ConfigError, MissingExtraError

LOCAL = "local"
Files = dict[str, bytes]  # contents by path relative to a folder; a single file has the path ""

_WAIT_S = 1.0  # between two looks for signals, which arrive between calls of Ray
_RETRIES = 1  # of an experiment whose machine was lost
_PATHS = ("data", "validation_data", "checkpoint")  # keys of a training configuration that may name files
_ARTIFACT = "artifact"  # in an experiment's folder: what others need that start from it


@dataclass(frozen=True)
class Sent:
    """What comes back from a machine of the cluster.

    Attributes:
        result, error: as of `Done`.
        log: what the experiment printed.
        artifact: where others start from it.
    """

    result: dict[str, Any] | None
    error: str | None
    log: str
    artifact: Files | None


def run_on_ray(jobs: Sequence[Job], laboratory: Laboratory, address: str, workers: int) -> Generator[Done, None, None]:
    """Does jobs as Ray tasks of one CPU each (and one GPU, where the cluster has some and the device may be one).

    What they find is written here as if it had been done here. An experiment whose machine is lost is tried once more.
    One that is stopped begins anew the next time: its checkpoints are where it ran.

    Args:
        jobs: to do.
        laboratory: on this machine.
        address: of the cluster, "auto" for the one this machine belongs to, "local" for one of this machine alone.
        workers: CPUs of a local cluster.

    Raises:
        MissingExtraError: ray is not installed.
        ConfigError: there is no cluster at the address.
        KeyboardInterrupt: a signal asked to stop.
    """
    if not jobs:
        return
    ray = _connected(address, workers)
    running: dict[Any, Job] = {}
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        inputs = ray.put({source: pack(Path(source)) for source in _sources(jobs, laboratory.measures)})
        artifacts: dict[str | None, Any] = {None: None}
        queue = Queue(jobs, laboratory)
        while queue or running:
            while (job := queue.take()) is not None:
                start = queue.needs(job)
                if start not in artifacts:
                    artifacts[start] = ray.put(pack(laboratory.folder / str(start) / _ARTIFACT))
                needs_gpu = gpus and job.experiment.training.get("device", "auto") != "cpu"
                task = ray.remote(max_retries=_RETRIES, num_cpus=1, num_gpus=int(needs_gpu))(perform_there)
                running[task.remote(job, laboratory.measures, inputs, artifacts[start])] = job
            ended, _ = ray.wait(list(running), num_returns=1, timeout=_WAIT_S)
            for reference in ended:
                job = running.pop(reference)
                try:
                    done = _received(job, ray.get(reference), laboratory)
                except ray.exceptions.RayError as error:
                    done = Done(job, error=one_line(error))
                lost = queue.finish(done)
                yield done
                yield from lost
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        ray.shutdown()


def perform_there(job: Job, measures: Measures, inputs: Mapping[str, Files], start: Files | None) -> Sent:
    """What a machine of the cluster does: lays out what was sent, does the job, and packs what others need.

    Args:
        job: to do, with paths of the machine that sent it.
        measures: likewise.
        inputs: files and folders by their paths there.
        start: the artifact that it starts from.
    """
    from yunmin.threads import set_threads

    set_threads(1)
    with tempfile.TemporaryDirectory(prefix="yunmin-ablation-") as name:
        folder = Path(name)
        places = {source: folder / "inputs" / str(number) / Path(source).name for number, source in enumerate(inputs)}
        for source, files in inputs.items():
            unpack(files, places[source])
        here = {source: str(place) for source, place in places.items()}
        experiment = moved(job.experiment, here)
        laboratory = laboratory_in(folder / "experiments", replace(measures, test=here[measures.test]))
        if laboratory.key(experiment) != job.key:
            return Sent(None, "the cluster's machine has another version of yunmin", "", None)
        if start is not None and experiment.start is not None:
            unpack(start, laboratory.artifact(experiment.start))
        done = perform(replace(job, experiment=experiment), laboratory)
        log = (laboratory.folder / job.key / LOG_FILE).read_text(encoding="utf-8")
        is_wanted = job.keep and done.error is None
        return Sent(done.result, done.error, log, pack(laboratory.artifact(experiment)) if is_wanted else None)


def pack(path: Path) -> Files:
    """A file's or a folder's contents."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def unpack(files: Files, target: Path) -> None:
    """Writes what `pack` read."""
    for relative, content in files.items():
        path = target / relative if relative else target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def moved(experiment: Experiment, places: Mapping[str, str]) -> Experiment:
    """The same experiment where its files lie elsewhere."""
    training = dict(experiment.training)
    for key in set(_PATHS) & training.keys():
        value = training[key]
        is_one = isinstance(value, str) or value is None
        training[key] = places.get(value, value) if is_one else [places.get(source, source) for source in value]
    start = None if experiment.start is None else moved(experiment.start, places)
    return replace(experiment, training=training, start=start)


def _sources(jobs: Sequence[Job], measures: Measures) -> list[str]:
    """All that is a file or a folder here."""
    sources = {measures.test}
    for job in jobs:
        experiment: Experiment | None = job.experiment
        while experiment is not None:
            values = [experiment.training[key] for key in _PATHS if experiment.training.get(key)]
            sources |= {source for value in values for source in ([value] if isinstance(value, str) else value)}
            experiment = experiment.start
    return sorted(source for source in sources if Path(source).exists())


def _received(job: Job, sent: Sent, laboratory: Laboratory) -> Done:
    """Writes what came back; the result last, since it says that all is there."""
    folder = laboratory.folder / job.key
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(sent.log)
    if sent.result is None:
        return Done(job, error=sent.error)
    if sent.artifact is not None:
        unpack(sent.artifact, folder / _ARTIFACT)
    result = {**sent.result, "training": job.experiment.config().model_dump(mode="json")}  # with the paths here
    write_result(folder / laboratory.result_file, result)
    return Done(job, result)


def _connected(address: str, workers: int) -> Any:
    """The module `ray`, connected to the cluster.

    Raises:
        MissingExtraError: it is not installed.
        ConfigError: there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what later versions do, without a warning
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtraError("ray", "ray", "--ray") from None
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address == LOCAL:
            ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray {address}: expected a Ray cluster, {one_line(error)}") from None
    if in_main:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end the process
    return ray
