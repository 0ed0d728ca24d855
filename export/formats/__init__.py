"""The formats of other people's runtimes: Hugging Face's, `mamba_ssm`'s, and GGUF.

Whatever a format cannot say is refused before any work, by the layer and with the reason. A file or folder is written
aside, read back strictly and compared with the weights it was made from, and only then takes its name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from export.formats import hf, mamba_ssm
from export.formats.destination import require_free_file, require_free_folder
from export.formats.folder import write_folder
from export.gguf import GGUF_TYPES, check_fits_llama_cpp, gguf_type_named, write_gguf
from export.gguf_tokenizer import chat_template_of, token_table
from yunmin.checkpoint import Checkpoint, refuse_quantized
from yunmin.config import MambaConfig
from yunmin.errors import ArtifactError, ConfigError
from yunmin.tokenizer import Tokenizer

FormatKind = Literal["hf", "mamba_ssm", "gguf"]
FORMATS: tuple[FormatKind, ...] = ("hf", "mamba_ssm", "gguf")
_FOLDERS = {"hf": hf, "mamba_ssm": mamba_ssm}

__all__ = ["FORMATS", "GGUF_TYPES", "FormatKind", "check_format", "check_format_destination", "write_format"]


def check_format(
    kind: FormatKind, config: MambaConfig, tokenizer: Tokenizer | None, *, gguf_type: str = "q8_0"
) -> None:
    """Refuses what a format cannot say; takes no time.

    Args:
        kind: one of `FORMATS`.
        config: with the widths that are to be written.
        tokenizer: that goes with the model.
        gguf_type: one of `GGUF_TYPES`, in any case.

    Raises:
        ConfigError: names the layer or the option, and what the format takes.
        TokenizerError: a tokenizer that a GGUF file cannot hold.
        MissingExtraError: the package `gguf` is not installed.
    """
    if kind in _FOLDERS:
        _FOLDERS[kind].check(config)
    elif kind == "gguf":
        gguf_type_named(gguf_type)
        check_fits_llama_cpp(config)
        if tokenizer is not None:
            token_table(tokenizer, config)
    else:
        raise ConfigError(f"format: expected one of {', '.join(FORMATS)}, found {kind!r}")


def check_format_destination(kind: FormatKind, out: str | Path, *, force: bool = False) -> None:
    """Looks before any work whether a format may be written there.

    Raises:
        ArtifactError: something is there and `force` is off, or it is nothing that such an export has written, which
            `force` never replaces.
    """
    (require_free_file if kind == "gguf" else require_free_folder)(Path(out), force=force)


def write_format(
    kind: FormatKind,
    out: str | Path,
    checkpoint: Checkpoint,
    *,
    gguf_type: str = "q8_0",
    force: bool = False,
    report: Callable[[str], None] | None = None,
) -> None:
    """Writes a model in another format, proven by reading it back, or leaves nothing.

    Args:
        kind: one of `FORMATS`.
        out: the folder, or for "gguf" the file.
        checkpoint: float32 weights; the tokenizer is copied from its folder.
        gguf_type: type of a GGUF file's matrices, one of `GGUF_TYPES`, in any case.
        force: whether what such an export wrote there before gives way.
        report: called with the name of each stage as it begins.

    Raises:
        ConfigError, TokenizerError, MissingExtraError: as `check_format`.
        CheckpointError: the weights are integers, or do not fit the config.
        ArtifactError: `out` is taken or cannot be written.
        VerificationError: what was read back is not what was written.
    """
    out = Path(out)
    refuse_quantized(checkpoint.folder, checkpoint.quantization)
    check_format(kind, checkpoint.config, checkpoint.tokenizer, gguf_type=gguf_type)
    check_format_destination(kind, out, force=force)
    try:
        if kind == "gguf":
            write_gguf(
                out,
                checkpoint.config,
                checkpoint.tensors,
                kind=gguf_type_named(gguf_type),
                tokenizer=checkpoint.tokenizer,
                chat_template=chat_template_of(checkpoint.folder),
                name=out.stem,
                report=report,
            )
        else:
            write_folder(kind, _FOLDERS[kind].write, out, checkpoint, force=force, report=report)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
