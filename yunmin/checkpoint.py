"""Checkpoint folders: Hugging Face's (one file or sharded, local or on the Hub) and `mamba_ssm`'s."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from yunmin.config import MambaConfig, eos_ids, read_config
from yunmin.errors import CheckpointError, ConfigError
from yunmin.files import write_aligned_safetensors, write_json, write_safetensors
from yunmin.model import check_tensors
from yunmin.quantization.layout import CONFIG_KEY, FLOAT32, Quantization, check_stored
from yunmin.tokenizer import CHAT_TEMPLATE_FILE, Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    CHAT_TEMPLATE_FILE,
]
WEIGHTS_FILE = "model.safetensors"
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        config: the architecture.
        tensors: float32 weights by Hugging Face name, or what a quantized checkpoint stores; a tied head is not listed.
        tokenizer: None where the folder has none.
        folder: where it was read from.
        quantization: how the weights are stored; `yunmin.quantization.reference` makes a network of quantized ones.
    """

    config: MambaConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer | None
    folder: Path
    quantization: Quantization = FLOAT32


def find_checkpoint(source: str | Path) -> Path:
    """The folder to read for a run folder (its latest checkpoint), a checkpoint folder, or a Hub id when online.

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    folder = Path(source)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        steps = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT_NAME.fullmatch(p.name))]
        if steps:
            return max(steps)[1]
        raise CheckpointError(f"{folder}: expected a config.json or checkpoint-STEP folders, found neither")
    if folder.exists():
        raise CheckpointError(f"{folder}: expected a folder, found a file")
    if _HUB_ID.fullmatch(str(source)):
        return _download(str(source))
    raise CheckpointError(f"{folder}: expected a checkpoint folder or a Hub id, found no such folder")


def load_checkpoint(source: str | Path, *, quantized: bool = False) -> Checkpoint:
    """Reads and checks a checkpoint.

    Args:
        source: anything `find_checkpoint` understands.
        quantized: whether the caller can do with stored integers, too; else a quantized checkpoint is refused.

    Returns:
        The checkpoint. Its config's end-of-text ids come from `generation_config.json` where that names any, else from
        `config.json`, else from the tokenizer; ids beyond the tokenizer's are padding.

    Raises:
        ConfigError: the config has unknown or impossible values.
        CheckpointError: files are missing or damaged, tensors do not fit the config, or the weights are quantized.
    """
    folder = find_checkpoint(source)
    raw = read_config(folder / "config.json")
    config = MambaConfig.from_dict(raw, where=str(folder / "config.json"))
    quantization = Quantization.from_config(raw, where=str(folder / "config.json"))
    if not quantized:
        refuse_quantized(folder, quantization)
    tokenizer = Tokenizer.from_folder(folder)
    config = _with_eos(config, folder, tokenizer)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the model's vocab_size is {config.vocab_size}"
        )
    try:
        if quantization.format == "none":
            tensors = _canonical(config, _read_tensors(folder))
            check_tensors(config, tensors)
        else:
            tensors = _read_safetensors(folder / WEIGHTS_FILE)  # mapped, not copied
            check_stored(config, quantization, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    return Checkpoint(config, tensors, tokenizer, folder, quantization)


def refuse_quantized(where: str | Path, quantization: Quantization) -> None:
    """Refuses stored integers where float32 weights are needed.

    Raises:
        CheckpointError: the weights are quantized.
    """
    if quantization.format != "none":
        raise CheckpointError(
            f"{where}: expected float32 weights, found {quantization.format} ones; "
            "use the run or checkpoint that this was exported from"
        )


def write_checkpoint(
    folder: Path,
    config: MambaConfig,
    tensors: Mapping[str, Tensor],
    quantization: Quantization = FLOAT32,
) -> None:
    """Writes `config.json`, `generation_config.json` and `model.safetensors` as Hugging Face names them.

    Args:
        folder: exists already; the caller makes it atomic.
        config: the architecture.
        tensors: by Hugging Face name, as `Checkpoint.tensors`.
        quantization: of the tensors.
    """
    raw = config.to_hf()
    if quantization.format == "none":
        check_tensors(config, tensors)
    else:
        check_stored(config, quantization, tensors)
        raw[CONFIG_KEY] = quantization.to_config()
        # of an unknown quantization transformers would only warn, and draw the missing weights at random; widths by
        # layer are what it refuses
        raw |= {"intermediate_size": list(config.d_inner), "state_size": list(config.d_state)}
    write_json(folder / "config.json", raw)
    ids = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[name] is not None}
    write_json(folder / "generation_config.json", ids)
    write = write_safetensors if quantization.format == "none" else write_aligned_safetensors
    write(folder / WEIGHTS_FILE, tensors)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
        if not any(folder.glob("*.safetensors")):  # mamba_ssm's own; never both, which would load the weights twice
            folder = Path(snapshot_download(hub_id, allow_patterns=[*_HUB_FILES, "pytorch_model.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{hub_id}: no such folder here, and the Hugging Face Hub did not give it: {reason}"
        ) from None
    return folder


def _with_eos(config: MambaConfig, folder: Path, tokenizer: Tokenizer | None) -> MambaConfig:
    """End-of-text ids from `generation_config.json` where given, and from the tokenizer where nothing names one."""
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: expected a JSON object, {error}") from None
        if eos is not None:
            try:
                config = replace(config, eos_token_ids=eos_ids(eos))
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from None
    if not config.eos_token_ids and tokenizer is not None and tokenizer.eos_id is not None:
        config = replace(config, eos_token_ids=(tokenizer.eos_id,))
    if tokenizer is not None and tokenizer.vocab_size < config.n_tokens:
        config = replace(config, n_tokens=tokenizer.vocab_size)  # rows beyond the tokenizer are padding
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / WEIGHTS_FILE).is_file():
        return _read_safetensors(folder / WEIGHTS_FILE)
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index.name}: expected a weight_map of tensors to files, {error!r}") from None
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            if not isinstance(shard, str) or shard != Path(shard).name or shard == "..":
                raise CheckpointError(f"{index.name}: shard {shard!r} leaves the folder")
            tensors |= _read_safetensors(folder / shard)
        return tensors
    if (folder / "pytorch_model.bin").is_file():
        return _read_bin(folder / "pytorch_model.bin")
    raise CheckpointError("expected model.safetensors, model.safetensors.index.json or pytorch_model.bin, found none")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged or truncated ({error})") from None


def _read_bin(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path.name} is damaged or holds more than tensors ({reason})") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise CheckpointError(f"{path.name} holds no dictionary of tensors")
    return loaded


def _canonical(config: MambaConfig, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face names, float32, one tensor for a tied head."""
    tensors = {name.replace("backbone.embedding.", "backbone.embeddings."): t.float() for name, t in raw.items()}
    head = tensors.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None:
        if not torch.equal(head, tensors.get("backbone.embeddings.weight", torch.empty(0))):
            raise CheckpointError("tensor 'lm_head.weight' differs from the embedding, and tie_word_embeddings is true")
        del tensors["lm_head.weight"]
    return tensors
