"""Who takes part in a comparison: ours in several formats, every peer, and the files that each of them reads.

A contestant is written `ENGINE` or `ENGINE:FORMAT`: `ours`, `ours:int8`, `ours:NAME=FOLDER`, `llama.cpp:Q8_0`,
`transformers`, ... One that cannot take part is kept with the reason.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.contestant_files import Absent, Say, gguf_file, graph_artifact, openvino_folder, our_folder
from yunmin.checkpoint import Checkpoint
from yunmin.config import MambaConfig
from yunmin.errors import RequestError, YunminError
from yunmin.quantization.layout import Quantization, stored_tensors

OURS = "ours"
GRAPH = "onnxruntime"  # ours, too: the graph that yunmin exports, driven by its runtime
# formats of an engine -> the precision by which contestants are alike
FORMATS: dict[str, dict[str, str]] = {
    OURS: {"fp32": "fp32", "int8": "int8", "int4": "int4"},
    "llama.cpp": {"F32": "fp32", "Q8_0": "int8", "Q4_0": "int4"},
    "transformers": {"fp32": "fp32"},
    "mambapy": {"fp32": "fp32"},
    "openvino": {"fp32": "fp32"},
    GRAPH: {"fp32": "fp32", "int8": "int8", "int4": "int4"},
}


@dataclass(frozen=True)
class Contestant:
    """An engine with a file.

    Attributes:
        name: as the report shows it.
        engine: a key of `benchmarks.adapters.contract.ENGINES`.
        precision: of its weights: "fp32", "int8", "int4"; peers of the same precision are the like ones.
        model: what it reads.
        python: the interpreter it runs under.
        is_ours: whether it is yunmin, or its graph in ONNX Runtime.
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
    """The interpreter of an engine: that of yunmin, unless `make peers` has made an environment for it."""
    if engine not in (OURS, GRAPH):
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
        folder, config, quantized = our_folder(kind, plain, cache, say)
        stored = "fp32" if quantized.format == "none" else quantized.format
        size = bytes_read(config, quantized)
        other = None if config == plain.config else config
        return Contestant(name, "yunmin", stored, folder, python, is_ours=True, weight_bytes=size, config=other)
    precision = FORMATS[engine][kind]
    if engine == GRAPH:
        folder, quantized = graph_artifact(kind, plain, cache, say)
        size = bytes_read(plain.config, quantized)
        return Contestant(name, engine, precision, folder, python, is_ours=True, weight_bytes=size)
    if engine == "llama.cpp":
        return Contestant(name, engine, precision, gguf_file(kind, plain, cache, say), python)
    if engine == "openvino":
        return Contestant(name, engine, precision, openvino_folder(plain, cache, python, say), python)
    return Contestant(name, engine, precision, plain.folder, python)
