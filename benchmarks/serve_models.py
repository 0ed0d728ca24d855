"""What is served: a folder that ours reads, and the same weights as a GGUF file for llama.cpp's servers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestant_files import Absent
from benchmarks.contestants import FORMATS, OURS, gather
from benchmarks.progress import say
from benchmarks.shapes import random_checkpoint
from yunmin.artifact import is_artifact, load_artifact
from yunmin.checkpoint import Checkpoint, load_checkpoint
from yunmin.cost import cost_of
from yunmin.errors import RequestError, YunminError
from yunmin.tokenizer import Tokenizer

_GGUF_KINDS = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}


@dataclass(frozen=True)
class Served:
    """A model in the form that is served.

    Attributes:
        folder: that `yunmin serve` reads.
        name: for a report.
        format: "fp32", "int8" or "int4".
        n_tokens: ids below it are drawn as text.
        state_bytes: of one sequence.
        tokenizer: of its vocabulary.
        plain: the float weights that a GGUF file can be made of; None where only integers are there.
        cache: folder for the files that are made.
    """

    folder: Path
    name: str
    format: str
    n_tokens: int
    state_bytes: int
    tokenizer: Tokenizer
    plain: Checkpoint | None
    cache: Path

    def describe(self) -> dict[str, Any]:
        """For a report."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "format": self.format,
            "state_bytes": self.state_bytes,
            "vocabulary": self.n_tokens,
        }

    def gguf(self) -> Path:
        """The same weights in the like precision; made once, found again later.

        Raises:
            Absent: they cannot be put into such a file; says why.
        """
        kind = _GGUF_KINDS[self.format]
        if self.plain is None:
            raise Absent(
                f"{self.folder} has {self.format} weights, and a GGUF file is made of float ones: give --shape"
            )
        path = self.cache / f"{kind}.gguf"
        if not path.is_file():
            from export.gguf import write_gguf

            say(f"making {path}")
            try:
                write_gguf(path, self.plain.config, self.plain.tensors, kind=kind, tokenizer=self.plain.tokenizer)
            except YunminError as error:
                raise Absent(str(error)) from None
        return path


def served_shape(shape: str, kind: str, out: Path) -> Served:
    """A known size with random weights and a tokenizer of its vocabulary.

    Args:
        shape: its name.
        kind: format of the weights.
        out: files that are made go below it, and are found again.

    Raises:
        RequestError: there is no such shape or format.
    """
    if kind not in FORMATS[OURS]:
        raise RequestError("--format", f"expected one of {', '.join(FORMATS[OURS])}, found {kind!r}")
    cache = out / "models" / f"{shape}-with-tokenizer"
    say(f"random weights of the shape {shape}, in {kind}")
    plain = load_checkpoint(random_checkpoint(shape, cache / "fp32", with_tokenizer=True))
    field = gather([(OURS, kind)], plain, cache, pythons={}, say=say)
    return _served(field.contestants[0].model, f"{shape} {kind}", kind, plain, plain, cache)


def served_artifact(source: str, out: Path) -> Served:
    """An artifact or a plain checkpoint as it is.

    Args:
        source: its folder, or a Hub id when online.
        out: files that are made go below it.

    Raises:
        RequestError: it has no tokenizer.
        YunminError: it is missing or damaged.
    """
    checkpoint = load_artifact(source)[0] if is_artifact(source) else load_checkpoint(source, quantized=True)
    kind = "fp32" if checkpoint.quantization.format == "none" else checkpoint.quantization.format
    name = checkpoint.folder.resolve().name
    plain = checkpoint if kind == "fp32" else None
    return _served(checkpoint.folder, f"{name} ({kind})", kind, checkpoint, plain, out / "models" / f"served-{name}")


def _served(folder: Path, name: str, kind: str, own: Checkpoint, plain: Checkpoint | None, cache: Path) -> Served:
    config = own.config
    if own.tokenizer is None:
        raise RequestError("ARTIFACT", f"{folder} has no tokenizer.json, so its streams would have no events to count")
    return Served(
        folder=folder,
        name=name,
        format=kind,
        n_tokens=config.n_tokens,
        state_bytes=cost_of(config).state_bytes,
        tokenizer=own.tokenizer,
        plain=plain,
        cache=cache,
    )
