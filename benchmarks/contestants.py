"""Who takes part in a comparison: ours in several formats, every peer, and the files that each of them reads.

A contestant is written `ENGINE` or `ENGINE:FORMAT`: `ours`, `ours:int8`, `ours:NAME=FOLDER`, `llama.cpp:Q8_0`,
`transformers`, ... One that cannot take part is kept with the reason.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.adapters.remote import Failed, Remote
from yunmin.artifact import is_artifact, write_manifest
from yunmin.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from yunmin.config import MambaConfig
from yunmin.cost import cost_of
from yunmin.errors import RequestError, YunminError
from yunmin.files import atomic_folder
from yunmin.quantization.layout import FLOAT32, Quantization, stored_tensors
from yunmin.quantization.packing import pack_tensors
from yunmin.quantization.rounding import round_tensors
from yunmin.tokenizer import copy_tokenizer

PEERS = ("transformers", "mambapy", "llama.cpp", "openvino", "onnxruntime")
OURS = "ours"
# formats of an engine -> the precision by which contestants are alike
FORMATS: dict[str, dict[str, str]] = {
    OURS: {"fp32": "fp32", "int8": "int8", "int4": "int4"},
    "llama.cpp": {"F32": "fp32", "Q8_0": "int8", "Q4_0": "int4"},
    "transformers": {"fp32": "fp32"},
    "mambapy": {"fp32": "fp32"},
    "openvino": {"fp32": "fp32"},
    "onnxruntime": {"fp32": "fp32"},
}
_PREPARE_LIMIT_S = 1800.0

Say = Callable[[str], None]


class Absent(Exception):  # noqa: N818 (not an error: the report names it)
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True)
class Contestant:
    """An engine with a file.

    Attributes:
        name: as the report shows it.
        engine: a key of `benchmarks.adapters.contract.ENGINES`.
        precision: of its weights: "fp32", "int8", "int4"; peers of the same precision are the like ones.
        model: what it reads.
        python: the interpreter it runs under.
        is_ours: whether it is yunmin.
        weight_bytes: that a decode step reads; only ours have it.
        config: where it is another model than the one compared; None for that one's.
    """

    name: str
    engine: str
    precision: str
    model: Path
    python: str
    is_ours: bool = False
    weight_bytes: int = 0
    config: MambaConfig | None = None


@dataclass
class Field:
    """Everybody who was asked for.

    Attributes:
        contestants: who take part.
        absent: name -> why not.
    """

    contestants: list[Contestant] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)


def expand(wanted: Sequence[str]) -> list[tuple[str, str]]:
    """(engine, format) of every contestant that was named; an engine alone stands for all its formats.

    Raises:
        RequestError: there is no such engine or format, or two would have one name.
    """
    found: list[tuple[str, str]] = []
    for text in wanted:
        engine, _, kind = text.partition(":")
        if engine not in FORMATS:
            raise RequestError("contestant", f"expected one of {', '.join(FORMATS)}, found {engine!r}")
        known = FORMATS[engine]
        is_folder = engine == OURS and "=" in kind
        if kind and not is_folder and kind not in known:
            raise RequestError("contestant", f"{engine}: expected one of {', '.join(known)}, found {kind!r}")
        if is_folder and not all(kind.partition("=")):
            raise RequestError("contestant", f"expected ours:NAME=FOLDER, found {text!r}")
        found += [(engine, kind)] if kind else [(engine, name) for name in known]
    distinct = list(dict.fromkeys(found))
    names = [_name(engine, kind) for engine, kind in distinct]
    for name in names:
        if names.count(name) > 1:
            raise RequestError("contestant", f"two are called {name!r}; give ours:NAME=FOLDER another name")
    return distinct


def interpreters(given: Sequence[str]) -> dict[str, str]:
    """Engine -> interpreter, from `ENGINE=PATH` texts.

    Raises:
        RequestError: a text is of another form, or names no engine.
    """
    found: dict[str, str] = {}
    for text in given:
        engine, sign, path = text.partition("=")
        if not sign or engine not in FORMATS or not path:
            raise RequestError("--python", f"expected ENGINE=PATH with one of {', '.join(FORMATS)}, found {text!r}")
        found[engine] = path
    return found


def gather(
    wanted: Sequence[tuple[str, str]], plain: Checkpoint, cache: Path, *, pythons: Mapping[str, str], say: Say
) -> Field:
    """Makes the files of every contestant that can take part.

    Args:
        wanted: engines and formats, as `expand` gives them.
        plain: the model in fp32; `plain.folder` is a Hugging Face folder.
        cache: folder for the files that are made; found again later.
        pythons: interpreters by engine, where another than the default is wanted.
        say: gets lines of progress.
    """
    found = Field()
    for engine, kind in wanted:
        name = _name(engine, kind)
        python = pythons.get(engine) or default_python(engine)
        try:
            found.contestants.append(_prepared(name, engine, kind, plain, cache, python, say))
        except (Absent, YunminError) as reason:
            found.absent[name] = str(reason)
    return found


def default_python(engine: str, folder: Path = Path(".venv-peers")) -> str:
    """The interpreter of an engine: ours, unless `make peers` has made an environment for it."""
    if engine != OURS:
        for name in (engine, "common"):
            python = folder / name / "bin" / "python"
            if python.exists():
                return str(python.absolute())
    return sys.executable


def bytes_read(config: MambaConfig, quantization: Quantization) -> int:
    """Bytes of weights that a decode step reads: all but a separate embedding, of which it reads single rows."""
    skipped = () if config.tie_word_embeddings else ("backbone.embeddings.",)
    stored = stored_tensors(config, quantization).items()
    return sum(math.prod(shape) * dtype.itemsize for name, (shape, dtype) in stored if not name.startswith(skipped))


def _name(engine: str, kind: str) -> str:
    return f"{engine} {kind.partition('=')[0]}" if len(FORMATS[engine]) > 1 else engine


def _prepared(name: str, engine: str, kind: str, plain: Checkpoint, cache: Path, python: str, say: Say) -> Contestant:
    if engine == OURS:
        folder, config, quantized = _our_folder(kind, plain, cache, say)
        stored = "fp32" if quantized.format == "none" else quantized.format
        size = bytes_read(config, quantized)
        other = None if config == plain.config else config
        return Contestant(name, "yunmin", stored, folder, python, is_ours=True, weight_bytes=size, config=other)
    precision = FORMATS[engine][kind]
    if engine == "llama.cpp":
        return Contestant(name, engine, precision, _gguf_file(kind, plain, cache, say), python)
    if engine == "openvino":
        return Contestant(name, engine, precision, _openvino_folder(plain, cache, python, say), python)
    if engine == "onnxruntime":
        raise Absent("yunmin exports no ONNX graph yet, and no other exporter of Mamba keeps its state")
    return Contestant(name, engine, precision, plain.folder, python)


def _our_folder(kind: str, plain: Checkpoint, cache: Path, say: Say) -> tuple[Path, MambaConfig, Quantization]:
    """A folder that `yunmin.load` reads, its config, and how its weights are stored; made by rounding to nearest."""
    if "=" in kind:
        folder = Path(kind.partition("=")[2])
        own = load_checkpoint(folder, quantized=True)
        if (own.config.n_tokens, own.config.vocab_size) != (plain.config.n_tokens, plain.config.vocab_size):
            raise Absent(f"{folder}: its vocabulary of {own.config.n_tokens} ids is not that of the compared model")
        return folder, own.config, own.quantization
    if kind == "fp32":
        return plain.folder, plain.config, FLOAT32
    quantized = Quantization("int8" if kind == "int8" else "int4")
    folder = cache / kind
    if not is_artifact(folder):
        say(f"making {folder}")
        weights = round_tensors(plain.tensors, quantized)
        packed = pack_tensors(plain.config, plain.tensors, weights, quantized)
        cost = cost_of(plain.config)
        with atomic_folder(folder, replace=True) as aside:
            write_checkpoint(aside, plain.config, packed, quantized)
            copy_tokenizer(plain.folder, aside)
            write_manifest(
                aside,
                provenance={"source": str(plain.folder), "made_by": "benchmarks.compare, rounding to nearest"},
                before=cost,
                after=cost,
                cuts=[],
                parity={},
                quantization=quantized.format,
            )
    return folder, plain.config, quantized


def _gguf_file(kind: str, plain: Checkpoint, cache: Path, say: Say) -> Path:
    from export.gguf import write_gguf

    path = cache / f"{kind}.gguf"
    if not path.is_file():
        say(f"making {path}")
        write_gguf(path, plain.config, plain.tensors, kind=kind)
    return path


def _openvino_folder(plain: Checkpoint, cache: Path, python: str, say: Say) -> Path:
    """Its own exporter makes it, under its own interpreter."""
    folder = cache / "openvino"
    if not (folder / "openvino_model.xml").is_file():
        say(f"making {folder}, which takes a minute")
        spec = {"kind": "openvino", "prepare": [str(plain.folder.absolute()), str(folder.absolute())]}
        remote = None
        try:
            remote = Remote("adapters.server", spec, python=python, threads=1)
            remote.read(_PREPARE_LIMIT_S)
        except Failed as reason:
            raise Absent(str(reason)) from None
        finally:
            if remote is not None:
                remote.close()
    return folder
